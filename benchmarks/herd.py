"""One cold key, many callers in several processes: how many runs, and how soon everybody has the value.

The value is computed by a Celery worker, by an RQ worker, or by one of the callers. Beside each of these, in the same
rounds, other ways to share one computation, and the limit: a bare PUBLISH heard by as many processes. One more round
for each size counts, with MONITOR, what the asking processes send, and with tracemalloc what a waiting coroutine keeps.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import random
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import psutil
import redis
from celery import Celery
from celery_singleton import Singleton  # type: ignore[import-untyped]

from benchmarks import jobs
from benchmarks.harness import arguments, celery_worker, percentile, program, record, server_seconds, spread
from benchmarks.jobs import slow
from benchmarks.peers import Tasked, Threaded, of_aiocache, of_cashews, of_dogpile, of_redis_lock, of_rq_unique
from celery_memolock import MemoLock, memolocked_task
from celery_memolock.server import serve_or_use

URL = os.environ.get("BENCHMARK_URL", "")
TASK_SECONDS = jobs.SECONDS
BARE_CHANNEL = "benchmark-bare"
THE_END = "that-is-all"
LONG = 600

app = Celery("benchmarks.herd", broker=URL, backend=URL)


async def aslow(key: str) -> float:
    """Do what `slow` does, in a loop."""
    jobs.count_run(key)
    await asyncio.sleep(TASK_SECONDS)
    return time.monotonic()


@memolocked_task(ttl=LONG, app=app, name="benchmarks.herd.memolocked")
def memolocked(key: str) -> float:
    return slow(key)


@app.task(base=Singleton, name="benchmarks.herd.singleton", lock_expiry=60)
def singleton(key: str) -> float:
    return slow(key)


# ---- the contenders, in a process that asks --------------------------------------------------------------------


def of_memolock(url: str) -> Threaded:
    memo = MemoLock(url, ttl=LONG)
    return lambda key: memo.get(key, partial(slow, key))


def of_memolock_in_loop(url: str) -> Tasked:
    memo = MemoLock(url, ttl=LONG)
    return lambda key: memo.aget(key, partial(aslow, key))


THREADED: dict[str, Callable[[str], Threaded]] = {
    "get_cached": lambda _: memolocked.get_cached,
    "celery-singleton .delay().get()": lambda _: lambda key: singleton.delay(key).get(timeout=60),
    "RQ get_cached": lambda _: jobs.memo_slow.get_cached,
    "RQ unique + latest_result": lambda _: of_rq_unique(jobs.queue(), slow),
    "MemoLock.get": of_memolock,
    "dogpile.cache": lambda url: of_dogpile(url, slow),
    "dogpile.cache, lock_sleep=0.01": lambda url: of_dogpile(url, slow, lock_sleep=0.01),
    "python-redis-lock": lambda url: of_redis_lock(url, slow),
}
TASKED: dict[str, Callable[[str], Tasked]] = {
    "aget_cached": lambda _: memolocked.aget_cached,
    "RQ aget_cached": lambda _: jobs.memo_slow.aget_cached,
    "MemoLock.aget": of_memolock_in_loop,
    "cashews lock=True": lambda url: of_cashews(url, aslow),
    "aiocache cached_stampede": lambda url: of_aiocache(url, aslow),
}
OURS = {"get_cached", "aget_cached", "RQ get_cached", "RQ aget_cached", "MemoLock.get", "MemoLock.aget"}

#: (processes, callers in each, with the peers?). What a peer takes minutes for is left to those sizes that it can.
SIZES = {
    "threads": [(1, 1, True), (1, 100, True), (4, 25, True), (10, 10, True), (10, 100, False), (50, 1, False)],
    "asyncio": [
        *((1, 1, True), (1, 100, True), (1, 1000, False), (1, 10_000, False)),
        *((4, 100, True), (10, 100, True), (10, 1000, False), (50, 20, False), (50, 200, False)),
    ],
}


def in_threads(get: Threaded, key: str, callers: int) -> list[float]:
    """Ask with threads → for each, how long after the computation's end it had the value."""

    def ask(_: int) -> float:
        over = get(key)
        return time.monotonic() - over

    with ThreadPoolExecutor(callers) as crowd:
        return list(crowd.map(ask, range(callers)))


def in_tasks(loop: asyncio.AbstractEventLoop, get: Tasked, key: str, callers: int) -> list[float]:
    """Ask with coroutines of one loop."""

    async def ask() -> float:
        over = await get(key)
        return time.monotonic() - over

    async def main() -> list[float]:
        return await asyncio.gather(*(ask() for _ in range(callers)))

    return loop.run_until_complete(main())


def memory_of(loop: asyncio.AbstractEventLoop, get: Tasked, key: str, callers: int) -> float:
    """Return the bytes for each coroutine while all wait, with its asyncio task and its own frame."""

    async def main() -> float:
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        waiting = [asyncio.ensure_future(get(key)) for _ in range(callers)]
        await asyncio.sleep(TASK_SECONDS * 0.8)
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        await asyncio.gather(*waiting)
        return kept / callers

    return loop.run_until_complete(main())


async def bare_wait(key: str) -> None:
    """Be the least that can wait: a task with a future and a timer."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(TASK_SECONDS, lambda: None if future.done() else future.set_result(None))
    await future


def asker(url: str, driver: str, callers: int, names: list[str], pipe: Connection) -> None:
    """Be one web process: for each order that comes down the pipe, ask with all callers at once."""
    os.environ["BENCHMARK_URL"] = url
    app.conf.update(broker_url=url, result_backend=url, memolock_redis_url=url)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    made = {name: (THREADED if driver == "threads" else TASKED)[name](url) for name in names}
    bare = redis.Redis.from_url(url, socket_timeout=60).pubsub()
    bare.subscribe(BARE_CHANNEL)
    bare.get_message(timeout=10)
    pipe.send("ready")
    for order, name, key in iter(pipe.recv, None):
        get: Any = made.get(name, bare_wait)
        if order == "hop":
            message = bare.get_message(timeout=30)
            assert message is not None
            pipe.send(time.monotonic() - float(message["data"]))
        elif order == "ports":
            pipe.send([each.laddr.port for each in psutil.Process().net_connections()])
        elif order == "memory":
            pipe.send(memory_of(loop, get, key, callers))
        else:
            pipe.send(in_threads(get, key, callers) if driver == "threads" else in_tasks(loop, get, key, callers))


class Crowd:
    """All processes that ask."""

    def __init__(self, url: str, driver: str, processes: int, callers: int, names: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes = [context.Pipe() for _ in range(processes)]
        self._running = [
            context.Process(target=asker, args=(url, driver, callers, names, there), daemon=True)
            for _, there in self._pipes
        ]
        for process in self._running:
            process.start()
        for here, _ in self._pipes:
            here.recv()

    def __len__(self) -> int:
        return len(self._pipes)

    def order(self, order: str, name: str = "", key: str = "") -> None:
        for here, _ in self._pipes:
            here.send((order, name, key))

    def answers(self) -> list[Any]:
        found = []
        for (here, _), process in zip(self._pipes, self._running, strict=True):
            while not here.poll(1):
                assert process.is_alive(), "an asking process died"
            found.append(here.recv())
        return found

    def close(self) -> None:
        for here, _ in self._pipes:
            here.send(None)
        for process in self._running:
            process.join()


def commands_sent(url: str, crowd: Crowd, name: str, key: str) -> float:
    """Return how many commands each asking process sent, from MONITOR's log: what scripts call does not count."""

    def read() -> list[str]:
        ports = []
        with redis.Redis.from_url(url, socket_timeout=60) as client, client.monitor() as monitor:
            listening.set()
            while (line := monitor.next_command())["command"] != f"ECHO {THE_END}":
                if line["client_type"] != "lua":
                    ports.append(line["client_port"])
        return ports

    listening = threading.Event()
    theirs = ports_of(crowd)
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read)
        listening.wait(10)
        try:
            crowd.order("ask", name, key)
            crowd.answers()
        finally:
            with redis.Redis.from_url(url) as client:
                client.echo(THE_END)  # or the reader would read on
        ports = reading.result()  # a log that was not read to its end is an error, not a smaller number
    theirs |= ports_of(crowd)  # some connections were made only now
    return sum(port in theirs for port in ports) / len(crowd)


def ports_of(crowd: Crowd) -> set[str]:
    """Return the ports of all connections of the processes that ask."""
    crowd.order("ports")
    return {str(port) for each in crowd.answers() for port in each}


def herd(url: str, driver: str, processes: int, callers: int, with_peers: bool, rounds: int) -> list[dict[str, Any]]:
    """Measure one size of herd."""
    names = list(THREADED if driver == "threads" else TASKED)
    names = [name for name in names if with_peers or name in OURS]
    crowd = Crowd(url, driver, processes, callers, names)
    client = redis.Redis.from_url(url)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}

    def note(name: str, what: str, value: float) -> None:
        found[name].setdefault(what, []).append(value)

    for number in range(rounds + 1):
        hop = 0.0
        for name in random.sample(names, len(names)):
            key = f"{name}:{driver}:{processes}x{callers}:{number}"
            used = server_seconds(client)
            crowd.order("ask", name, key)
            late = [value for each in crowd.answers() for value in each]
            if number == 0:
                continue  # the first round makes connections
            note(name, "server CPU ms", (server_seconds(client) - used) * 1e3)
            note(name, "runs", int(client.get(f"runs:{key}") or 0))  # type: ignore[arg-type]
            note(name, "stored to caller p50 ms", percentile(late, 0.5) * 1e3)
            note(name, "stored to caller p99 ms", percentile(late, 0.99) * 1e3)
        crowd.order("hop")
        time.sleep(0.2)  # let everybody reach the bare channel
        client.publish(BARE_CHANNEL, repr(time.monotonic()))
        hop = percentile(crowd.answers(), 0.5) * 1e3
        for name in names if number else ():
            note(name, "bare hop p50 ms", hop)
            note(name, "p50 as a multiple of the bare hop", found[name]["stored to caller p50 ms"][-1] / hop)
    results = []
    for name in names:
        figures: dict[str, Any] = {what: spread(values) for what, values in found[name].items()}
        key = f"{name}:{driver}:{processes}x{callers}:monitored"
        figures["commands per asking process"] = commands_sent(url, crowd, name, key)
        if name == "aget_cached" and processes == 1 and callers >= 1000:  # the others wait in the same way
            for what, who in (("", name), (" of a bare future", "bare")):
                crowd.order("memory", who, f"{name}:memory:{callers}{what}")
                figures[f"bytes per waiter{what}"] = crowd.answers()[0]
        size = {"driver": driver, "contender": name, "processes": processes, "callers": processes * callers}
        results.append({**size, **figures})
    crowd.close()
    return results


def main() -> None:
    args = arguments(__doc__, rounds=5)
    with serve_or_use() as url:
        app.conf.update(broker_url=url, result_backend=url, memolock_redis_url=url)
        with (
            celery_worker(app, url, "-c", "2"),
            program(url, "rq.cli", "worker", "-u", url, "-w", "benchmarks.jobs.Simple", "--quiet", jobs.QUEUE),
        ):
            sizes = [(driver, *size) for driver, each in SIZES.items() for size in each]
            record("herd", url, [row for size in sizes for row in herd(url, *size, args.rounds)], args)


if __name__ == "__main__":
    main()
