"""What a miss costs: a cold key and an empty function, in a Celery worker, in an RQ worker, or in the caller itself.

One caller, one miss after the other, each of a key of its own; within a round the contenders of a lane take turns, over
the same worker. Where the caller computes, the floor is the four commands of a lock around a cache.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from celery import Celery
from celery_singleton import Singleton  # type: ignore[import-untyped]

from benchmarks import jobs
from benchmarks.harness import arguments, celery_worker, percentile, program, record, spread
from benchmarks.jobs import empty
from benchmarks.peers import (
    Tasked,
    Threaded,
    of_aiocache,
    of_cashews,
    of_dogpile,
    of_redis_lock,
    of_rq,
    of_rq_unique,
    the_least,
    the_least_in_loop,
)
from celery_memolock import MemoLock, memolocked_task
from celery_memolock.server import serve_or_use

URL = os.environ.get("BENCHMARK_URL", "")
NUMBERS = itertools.count()
FLOOR = "GET, SET NX, SET, DEL"

app = Celery("benchmarks.miss", broker=URL, backend=URL)
app.conf.memolock_redis_url = URL

memolocked = memolocked_task(ttl=60, app=app, name="benchmarks.miss.memolocked")(empty)
plain: Any = app.task(name="benchmarks.miss.plain")(empty)
singleton: Any = app.task(base=Singleton, name="benchmarks.miss.singleton", lock_expiry=60)(empty)


async def aempty(key: str) -> str:
    return key


def timed(get: Threaded, keys: list[str]) -> list[float]:
    """Ask for one key after the other → milliseconds of each."""
    took = []
    for key in keys:
        began = time.perf_counter()
        assert get(key) == key
        took.append((time.perf_counter() - began) * 1e3)
    return took


async def timed_in_loop(get: Tasked, keys: list[str]) -> list[float]:
    took = []
    for key in keys:
        began = time.perf_counter()
        assert await get(key) == key
        took.append((time.perf_counter() - began) * 1e3)
    return took


def lane(
    ours: str, threaded: Mapping[str, Threaded], tasked: Mapping[str, Tasked], rounds: int, calls: int
) -> dict[str, Any]:
    """Measure what callers have in common the way to a worker, or that there is none."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)

    def measured(name: str) -> list[float]:
        keys = [f"{name}:{next(NUMBERS)}" for _ in range(calls)]
        return timed(threaded[name], keys) if name in threaded else loop.run_until_complete(asked(name, keys))

    def asked(name: str, keys: list[str]) -> Any:
        return timed_in_loop(tasked[name], keys)

    names = [*threaded, *tasked]
    found: list[dict[str, list[float]]] = []
    for number in range(rounds + 1):
        took = {name: measured(name) for name in random.sample(names, len(names))}
        if number:  # the first round makes connections
            found.append(took)
    for task in asyncio.all_tasks(loop):  # what reads the connections
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    return {
        **{
            f"p{round(part * 100)} ms": {
                name: spread([percentile(each[name], part) for each in found]) for name in names
            }
            for part in (0.5, 0.99)
        },
        f"p50 of {ours} as a multiple of": {
            name: spread([percentile(each[ours], 0.5) / percentile(each[name], 0.5) for each in found])
            for name in names
            if name != ours
        },
    }


def celery_lane(url: str, pool: str, rounds: int, calls: int) -> dict[str, Any]:
    threaded: dict[str, Threaded] = {
        "task.delay().get()": lambda key: plain.delay(key).get(timeout=30),
        "get_cached": memolocked.get_cached,
        "celery-singleton .delay().get()": lambda key: singleton.delay(key).get(timeout=30),
    }
    with celery_worker(app, url, "-c", "1", "-P", pool):
        return lane("get_cached", threaded, {"aget_cached": memolocked.aget_cached}, rounds, calls)


def rq_lane(url: str, worker: type, rounds: int, calls: int) -> dict[str, Any]:
    queue = jobs.queue()
    threaded: dict[str, Threaded] = {
        "RQ enqueue + latest_result": of_rq(queue, empty),
        "RQ unique + latest_result": of_rq_unique(queue, empty),
        "RQ get_cached": jobs.memo_empty.get_cached,
    }
    name = f"{worker.__module__}.{worker.__name__}"
    with program(url, "rq.cli", "worker", "-u", url, "-w", name, "--quiet", jobs.QUEUE):
        return lane("RQ get_cached", threaded, {"RQ aget_cached": jobs.memo_empty.aget_cached}, rounds, calls)


def inline_lane(url: str, rounds: int, calls: int) -> dict[str, Any]:
    with MemoLock(url, ttl=60) as memo:
        threaded: dict[str, Threaded] = {
            FLOOR: the_least(url, empty),
            "dogpile.cache": of_dogpile(url, empty),
            "python-redis-lock": of_redis_lock(url, empty),
            "MemoLock.get": lambda key: memo.get(key, partial(empty, key)),
        }
        return lane("MemoLock.get", threaded, {}, rounds, calls)


def inline_lane_in_loop(url: str, rounds: int, calls: int) -> dict[str, Any]:
    with MemoLock(url, ttl=60) as memo:
        tasked: dict[str, Tasked] = {
            FLOOR: the_least_in_loop(url, aempty),
            "cashews lock=True": of_cashews(url, aempty),
            "aiocache cached_stampede": of_aiocache(url, aempty),
            "MemoLock.aget": lambda key: memo.aget(key, partial(aempty, key)),
        }
        return lane("MemoLock.aget", {}, tasked, rounds, calls)


def main() -> None:
    args = arguments(__doc__, rounds=11, calls=200)
    with serve_or_use() as url:
        os.environ["BENCHMARK_URL"] = url
        app.conf.update(broker_url=url, result_backend=url, memolock_redis_url=url)
        results = {
            "Celery worker, prefork": celery_lane(url, "prefork", args.rounds, args.calls),
            "Celery worker, threads": celery_lane(url, "threads", args.rounds, args.calls),
            "RQ SimpleWorker": rq_lane(url, jobs.Simple, args.rounds, args.calls),
            # A fork for each job takes so long that a quarter of the calls shows as much.
            "RQ Worker, which forks": rq_lane(url, jobs.Forking, args.rounds, max(1, args.calls // 4)),
            "caller, in a thread": inline_lane(url, args.rounds, args.calls),
            "caller, in a loop": inline_lane_in_loop(url, args.rounds, args.calls),
        }
        record("miss", url, results, args)


if __name__ == "__main__":
    main()
