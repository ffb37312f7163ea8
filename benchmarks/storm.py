"""Many keys of very different fame expire under load: how often the origin is asked, and how long callers wait.

Callers ask at random moments for keys that are drawn by Zipf's law; the origin takes a tenth of a second. A cache that
coalesces asks it once for each time that a key expired while somebody wanted it. Whatever it is asked beyond that is
needless: it began before the value of an earlier computation of the same key had expired.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import redis
from celery import Celery
from dogpile.cache import make_region

from benchmarks.harness import arguments, celery_worker, percentile, record, spread
from celery_memolock import memolocked_task
from celery_memolock.server import serve_or_use

URL = os.environ.get("BENCHMARK_URL", "")
TTL = 1.0
ORIGIN_SECONDS = 0.1
KEYS = 200
EXPONENT = 1.1
PROCESSES = 2
THREADS = 48
LOG = "origin"

app = Celery("benchmarks.storm", broker=URL)
app.conf.memolock_redis_url = URL
Get = Callable[[str], Any]


def origin(key: str) -> dict[str, Any]:
    """Compute the value, slowly, and write down when that was: time.monotonic is one clock for all processes."""
    began = time.monotonic()
    time.sleep(ORIGIN_SECONDS)
    log().rpush(LOG, json.dumps([key, began, time.monotonic()]))
    return {"key": key, "rows": [1, 2, 3]}


_log: redis.Redis | None = None


def log() -> redis.Redis:
    global _log
    if _log is None:
        _log = redis.Redis.from_url(URL)
    return _log


@memolocked_task(ttl=TTL, app=app, name="benchmarks.storm.memolocked")
def memolocked(key: str) -> dict[str, Any]:
    return origin(key)


def of_ttl(url: str) -> Get:
    """Return what most programs begin with: look, compute, store."""
    client = redis.Redis.from_url(url)

    def get(key: str) -> Any:
        found: Any = client.get(f"ttl:{key}")
        if found is not None:
            return json.loads(found)
        value = origin(key)
        client.set(f"ttl:{key}", json.dumps(value), px=int(TTL * 1000))
        return value

    return get


def of_lock(url: str) -> Get:
    """Return the same under a lock of dogpile.cache, which polls for it and looks again."""
    region = make_region().configure(
        "dogpile.cache.redis",
        expiration_time=TTL,
        arguments={"url": url, "distributed_lock": True, "thread_local_lock": False, "lock_sleep": 0.01},
    )
    return region.cache_on_arguments()(origin)  # type: ignore[no-any-return]


CONTENDERS: dict[str, Callable[[str], Get]] = {
    "none": lambda _: origin,
    "TTL": of_ttl,
    "lock (dogpile.cache)": of_lock,
    "memolock": lambda _: memolocked.get_cached,
}


def asker(url: str, rate: float, seconds: float, pipe: Connection) -> None:
    """Be one web process: let calls arrive at random, at a steady rate, whether or not the earlier ones are over."""
    global URL
    URL = url
    app.conf.update(broker_url=url, memolock_redis_url=url)
    made = {name: make(url) for name, make in CONTENDERS.items()}
    names = [f"key {number}" for number in range(KEYS)]
    fame = [1 / (rank + 1) ** EXPONENT for rank in range(KEYS)]

    def ask(get: Get, prefix: str, due: float) -> float:
        key = random.choices(names, fame)[0]
        get(f"{prefix} {key}")
        return time.monotonic() - due

    with ThreadPoolExecutor(THREADS) as crowd:
        list(crowd.map(lambda _: time.sleep(0.05), range(THREADS)))
        pipe.send("ready")
        for name, prefix in iter(pipe.recv, None):
            calls = []
            due = time.monotonic()
            over = due + seconds
            while (due := due + random.expovariate(rate)) < over:
                time.sleep(max(0.0, due - time.monotonic()))
                calls.append(crowd.submit(ask, made[name], prefix, due))
            pipe.send([call.result() * 1e3 for call in calls])


def origin_calls(client: redis.Redis) -> tuple[int, int]:
    """Return how often the origin was asked, and how often needlessly."""
    lines: Any = client.lrange(LOG, 0, -1)
    runs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for key, began, over in map(json.loads, lines):
        runs[key].append((began, over))
    needless = 0
    for each in runs.values():
        stored = float("-inf")
        for began, over in sorted(each):
            # A worker's clock reading is a little earlier than the moment at which the server stores the value.
            if began < stored + TTL:
                needless += 1
            else:
                stored = over
    return len(lines), needless


def main() -> None:
    args = arguments(__doc__, rounds=5, seconds=8, rate=200)
    with serve_or_use() as url:
        app.conf.update(broker_url=url, memolock_redis_url=url)
        client = redis.Redis.from_url(url)
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(PROCESSES)]
        crowd = [
            context.Process(target=asker, args=(url, args.rate, args.seconds, there), daemon=True) for _, there in pipes
        ]
        found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in CONTENDERS}
        with celery_worker(app, url, "-c", "32", "-P", "threads"):
            for process in crowd:
                process.start()
            for here, _ in pipes:
                here.recv()
            for number in range(args.rounds + 1):
                for name in random.sample(sorted(CONTENDERS), len(CONTENDERS)):
                    client.delete(LOG)
                    for here, _ in pipes:
                        here.send((name, str(number)))
                    waited = [each for here, _ in pipes for each in here.recv()]
                    asked, needless = origin_calls(client)
                    if number == 0:
                        continue  # the first round makes connections
                    figures = found[name]
                    figures["calls"].append(len(waited))
                    figures["origin calls"].append(asked)
                    figures["needless origin calls"].append(needless)
                    for part, what in ((0.5, "p50 ms"), (0.95, "p95 ms"), (0.99, "p99 ms"), (1.0, "most ms")):
                        figures[what].append(percentile(waited, part))
            for here, _ in pipes:
                here.send(None)
            for process in crowd:
                process.join()
        results = [
            {"contender": name, **{what: spread(each) for what, each in figures.items()}}
            for name, figures in found.items()
        ]
        record("storm", url, results, args)


if __name__ == "__main__":
    main()
