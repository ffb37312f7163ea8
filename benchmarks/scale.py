"""What grows with the number of keys, and with the number of waiting processes.

Keys: a hit, a cold look that starts a flight, and an invalidation among 1,000 to 1,000,000 stored values, and the
server's memory for each value and each flight. Processes: 1 to 200 inboxes, which are connections of this very
process, register with one flight; what the last to join pays, and how long settling takes and the notices travel.
"""

from __future__ import annotations

import random
import secrets
import selectors
import time
from collections.abc import Callable
from typing import Any

import redis
from celery import Celery

from benchmarks.harness import arguments, percentile, record, spread
from celery_memolock import memolocked_task
from celery_memolock.codec import Packed
from celery_memolock.effects import Acquire, Claim, Put, Run, Settle, new_nonce
from celery_memolock.server import serve_or_use
from celery_memolock.wire import arguments as script_arguments
from celery_memolock.wire import reply, script_of

SIZES = [1_000, 10_000, 100_000, 1_000_000]
INBOXES = [1, 10, 50, 100, 200]
VALUE = {"queue": "q1", "waiting": 5500, "names": ["ada", "grace", "edsger"]}
CRASHED = Packed("application/json utf-8 - =", b"{}")
BATCH = 1_000

app = Celery("benchmarks.scale")


@memolocked_task(ttl=3600, app=app, name="benchmarks.scale.queue_size")
def queue_size(number: int) -> dict[str, Any]:
    return dict(VALUE)


def microseconds(call: Callable[[int], Any], numbers: list[int]) -> float:
    """Return the median time of a call."""
    took = []
    for number in numbers:
        began = time.perf_counter()
        call(number)
        took.append((time.perf_counter() - began) * 1e6)
    return percentile(took, 0.5)


def look(number: int) -> Acquire:
    """Be a caller that found nothing, and starts a flight."""
    call = queue_size.memo.call((number,), {})
    return Acquire(call.keys, call.options, new_nonce(), "miss", "", "", 1, 30.0, call.park, CRASHED)


def memory(client: redis.Redis) -> int:
    found: Any = client.info("memory")
    return int(found["used_memory_dataset"])


def keys(client: redis.Redis, rounds: int, calls: int) -> list[dict[str, Any]]:
    """Measure with more and more keys."""
    memo = queue_size.memo
    store = memo._engine.store
    packed = memo.codec.pack(VALUE)
    results = []
    filled = 0
    empty = memory(client)
    for size in SIZES:
        while filled < size:
            batch = range(filled, min(size, filled + BATCH))
            names = [memo.call((number,), {}).keys for number in batch]
            store.run_all([Put(each, new_nonce(), packed, 3600.0, 3600.0, 30.0, False) for each in names])
            filled += len(batch)
        row: dict[str, Any] = {"keys": size, "bytes per value": (memory(client) - empty) / size}
        found: dict[str, list[float]] = {"hit": [], "cold look": [], "invalidate": []}
        for _ in range(rounds):
            some = [random.randrange(size) for _ in range(calls)]
            cold = [size + random.randrange(10**9) for _ in range(calls)]
            found["hit"].append(microseconds(queue_size.get_cached, some))
            found["cold look"].append(microseconds(lambda number: store.run(look(number)), cold))
            found["invalidate"].append(microseconds(queue_size.invalidate, cold))
            for number in cold:
                client.delete(*memo.call((number,), {}).keys.all)
        results.append({**row, **{f"{what} microseconds": spread(each) for what, each in found.items()}})
    before = memory(client)
    flights = range(2 * 10**9, 2 * 10**9 + 10_000)
    for start in range(0, len(flights), BATCH):
        store.run_all([look(number) for number in flights[start : start + BATCH]])
    results[-1]["bytes per flight"] = (memory(client) - before) / len(flights)
    return results


def run(client: redis.Redis, effect: Any, inbox: str = "") -> Any:
    """Run a script in the name of some process."""
    source = script_of(effect)
    parts = (4, *effect.keys.all, *script_arguments(effect, inbox))
    try:
        return reply(effect, client.evalsha(source.sha, *parts))  # type: ignore[arg-type]
    except redis.exceptions.NoScriptError:
        return reply(effect, client.eval(source.text, *parts))  # type: ignore[arg-type]


def inboxes(client: redis.Redis, url: str, rounds: int) -> list[dict[str, Any]]:
    """Measure with more and more processes that wait for one flight."""
    memo = queue_size.memo
    packed = memo.codec.pack(VALUE)
    links: list[Any] = []
    results = []
    for size in INBOXES:
        while len(links) < size:
            link = redis.Redis.from_url(url).pubsub()
            link.subscribe(f"benchmark:{secrets.token_hex(8)}")
            link.get_message(timeout=5)
            links.append(link)
        channels = [next(iter(link.channels)).decode() for link in links]
        found: dict[str, list[float]] = {"last look": [], "settle": [], "all told": [], "bare publishes": []}
        for _ in range(rounds):
            call = queue_size.memo.call((random.randrange(10**12),), {})
            fence = ""
            for channel in channels:
                looked = Acquire(call.keys, call.options, new_nonce(), "miss", "", "", 1, 30.0, call.park, CRASHED)
                began = time.perf_counter()
                answer = run(client, looked, channel)
                took = time.perf_counter() - began
                fence = answer.fence
            found["last look"].append(took * 1e6)
            claim = Claim(call.keys, call.options, fence, new_nonce(), "h/1/2", 0, False, call.park, CRASHED)
            claimed = run(client, claim)
            assert isinstance(claimed, Run)
            settle = Settle(call.keys, claimed, "V", packed, 60.0, 60.0, call.park)
            began = time.perf_counter()
            assert run(client, settle) == "OK"
            found["settle"].append((time.perf_counter() - began) * 1e6)
            heard(links)
            found["all told"].append((time.perf_counter() - began) * 1e6)
            began = time.perf_counter()
            with client.pipeline(transaction=False) as pipe:
                for channel in channels:
                    pipe.publish(channel, packed.body)
                pipe.execute()
            heard(links)
            found["bare publishes"].append((time.perf_counter() - began) * 1e6)
        results.append({"inboxes": size, **{f"{what} microseconds": spread(each) for what, each in found.items()}})
    for link in links:
        link.close()
    return results


def heard(links: list[Any]) -> None:
    """Return when a notice has reached each."""
    with selectors.DefaultSelector() as selector:
        for link in links:
            selector.register(link.connection._sock, selectors.EVENT_READ, link)
        left = len(links)
        while left:
            for key, _ in selector.select(10):
                while (message := key.data.get_message(timeout=0)) is not None:
                    left -= message["type"] == "message"


def main() -> None:
    args = arguments(__doc__, rounds=11, calls=500)
    with serve_or_use() as url:
        app.conf.memolock_redis_url = url
        client = redis.Redis.from_url(url)
        waiting = inboxes(client, url, args.rounds)
        record("scale", url, {"keys": keys(client, args.rounds, args.calls), "inboxes": waiting}, args)


if __name__ == "__main__":
    main()
