"""One cold key, many callers in several processes, a real worker: how many runs, and how soon everybody has the value.

Beside it, in the same rounds, the limit: a bare PUBLISH heard by as many processes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import redis
from celery import Celery

from benchmarks.harness import arguments, record, spread
from celery_memolock import memolocked_task
from celery_memolock.server import serve_or_use

URL = os.environ.get("BENCHMARK_URL", "")
TASK_SECONDS = 0.5
BARE_CHANNEL = "benchmark-bare"

app = Celery("benchmarks.herd", broker=URL)


@memolocked_task(ttl=600, app=app, name="benchmarks.herd.slow")
def slow(key: str) -> float:
    """Take half a second, and return when it was over: time.monotonic is one clock for all processes of a machine."""
    redis.Redis.from_url(URL).incr(f"runs:{key}")
    time.sleep(TASK_SECONDS)
    return time.monotonic()


def in_threads(key: str, callers: int) -> list[float]:
    """Ask with threads → for each, how long after the task's end it had the value."""
    late: list[float] = []

    def ask() -> None:
        over = slow.get_cached(key)
        late.append(time.monotonic() - over)

    crowd = [threading.Thread(target=ask) for _ in range(callers)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    return late


def in_tasks(runner: asyncio.AbstractEventLoop, key: str, callers: int) -> list[float]:
    """Ask with coroutines of one loop."""

    async def ask() -> float:
        over = await slow.aget_cached(key)
        return time.monotonic() - over

    async def main() -> list[float]:
        return await asyncio.gather(*(ask() for _ in range(callers)))

    return runner.run_until_complete(main())


def caller(url: str, driver: str, callers: int, pipe: Connection) -> None:
    """Be one web process: for each key that comes down the pipe, ask with all callers at once."""
    app.conf.update(broker_url=url, memolock_redis_url=url)
    bare = redis.Redis.from_url(url, socket_timeout=60).pubsub()
    bare.subscribe(BARE_CHANNEL)
    bare.get_message(timeout=10)
    loop = asyncio.new_event_loop()
    pipe.send("ready")
    for key in iter(pipe.recv, None):
        late = in_threads(key, callers) if driver == "threads" else in_tasks(loop, key, callers)
        pipe.send(late)
        message = bare.get_message(timeout=30)
        assert message is not None
        pipe.send(time.monotonic() - float(message["data"]))


def herd(url: str, driver: str, processes: int, callers: int, rounds: int) -> dict[str, object]:
    """Measure one size of herd."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(processes)]
    crowd = [context.Process(target=caller, args=(url, driver, callers, there)) for _, there in pipes]
    for process in crowd:
        process.start()
    for here, _ in pipes:
        here.recv()
    client = redis.Redis.from_url(url)
    runs, typical, slowest, hops, ratios = [], [], [], [], []
    for number in range(rounds + 1):
        key = f"{driver}:{processes}x{callers}:{number}"
        for here, _ in pipes:
            here.send(key)
        late = sorted(value for here, _ in pipes for value in here.recv())
        time.sleep(0.2)  # let everybody reach the bare channel
        client.publish(BARE_CHANNEL, repr(time.monotonic()))
        hop = sorted(here.recv() for here, _ in pipes)
        if number == 0:
            continue  # the first round makes connections
        runs.append(int(client.get(f"runs:{key}") or 0))  # type: ignore[arg-type]
        typical.append(late[len(late) // 2] * 1e3)
        slowest.append(late[int(len(late) * 0.99)] * 1e3)
        hops.append(hop[len(hop) // 2] * 1e3)
        ratios.append(typical[-1] / hops[-1])
    for here, _ in pipes:
        here.send(None)
    for process in crowd:
        process.join()
    return {
        "driver": driver,
        "processes": processes,
        "callers": processes * callers,
        "runs": spread(runs),
        "stored to caller p50 ms": spread(typical),
        "stored to caller p99 ms": spread(slowest),
        "bare hop p50 ms": spread(hops),
        "p50 as a multiple of the bare hop": spread(ratios),
    }


def main() -> None:
    args = arguments(__doc__, rounds=7)
    with serve_or_use() as url, tempfile.NamedTemporaryFile("w+") as log:
        app.conf.update(broker_url=url, memolock_redis_url=url)
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "benchmarks.herd", "worker", "-c", "2", "-l", "WARNING"],
            env={**os.environ, "BENCHMARK_URL": url},
            stdout=log,
            stderr=log,
        )
        try:
            while not app.control.ping(timeout=0.5):
                assert worker.poll() is None, Path(log.name).read_text()
            sizes = [
                *(("threads", *size) for size in [(1, 1), (1, 100), (4, 25), (4, 100), (10, 100)]),
                *(
                    ("asyncio", *size)
                    for size in [(1, 1), (1, 100), (1, 1000), (1, 10_000), (4, 100), (10, 100), (10, 1000)]
                ),
            ]
            record("herd", url, [herd(url, *size, args.rounds) for size in sizes], args)
        finally:
            worker.terminate()
            worker.wait()


if __name__ == "__main__":
    main()
