"""What a hit in this process costs, with the key made of the arguments, beside other local caches and the remote hit.

All are measured in one process, interleaved, round after round; a ratio is formed within its round.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

from cachetools import TTLCache, cached
from cashews import Cache
from celery import Celery
from dogpile.cache import make_region

from benchmarks.harness import arguments, record, spread
from celery_memolock import memolocked_task
from celery_memolock.local import MISSING
from celery_memolock.server import serve_or_use

VALUES = {"a number": 5500, "an object": {"queue": "q1", "waiting": 5500, "names": ["ada", "grace", "edsger"]}}


def contenders(url: str, value: Any) -> dict[str, Callable[[], Any]]:
    """Return functions that all return a stored value for the same argument."""
    app = Celery("benchmarks.local")
    app.conf.memolock_redis_url = url
    found: dict[str, Callable[[], Any]] = {}
    for name, options in (("local_ttl", {"local_ttl": 600}), ("remote hit", {})):

        @memolocked_task(ttl=600, app=app, name=f"benchmarks.local.{name}", **options)  # type: ignore[arg-type]
        def task(queue_id: str) -> Any: ...

        task.set_cached(value, "q1")
        found[name] = lambda task=task: task.get_cached("q1")  # type: ignore[misc]
        while options and task.memo.kept(("q1",), {}) is MISSING:
            task.get_cached("q1")

    @cached(TTLCache(1000, 600))
    def of_cachetools(queue_id: str) -> Any:
        return value

    region = make_region().configure("dogpile.cache.memory", expiration_time=600)

    @region.cache_on_arguments()
    def of_dogpile(queue_id: str) -> Any:
        return value

    return {**found, "cachetools.cached": lambda: of_cachetools("q1"), "dogpile.cache.memory": lambda: of_dogpile("q1")}


def measure(get: Callable[[], Any], calls: int) -> float:
    """Return microseconds per call."""
    began = time.perf_counter()
    for _ in range(calls):
        get()
    return (time.perf_counter() - began) / calls * 1e6


def of_cashews(value: Any, calls: int) -> float:
    """Return microseconds per call of cashews' memory backend, which is asyncio's alone."""

    async def main() -> float:
        cache = Cache()
        cache.setup("mem://")

        @cache(ttl="10m", key="q:{queue_id}")
        async def queue_size(queue_id: str) -> Any:
            return value

        await queue_size("q1")
        began = time.perf_counter()
        for _ in range(calls):
            await queue_size("q1")
        return (time.perf_counter() - began) / calls * 1e6

    return asyncio.run(main())


def lane(url: str, value: Any, rounds: int, calls: int) -> dict[str, Any]:
    found = contenders(url, value)
    for get in found.values():
        measure(get, calls // 10)
    figures = []
    for _ in range(rounds):
        order = random.sample(sorted(found), len(found))
        each = {name: measure(found[name], calls // 10 if name == "remote hit" else calls) for name in order}
        figures.append({**each, "cashews mem (asyncio)": of_cashews(value, calls // 10)})
    return {
        "microseconds": {name: spread([each[name] for each in figures]) for name in figures[0]},
        "local_ttl as a multiple of": {
            name: spread([each["local_ttl"] / each[name] for each in figures])
            for name in figures[0]
            if name != "local_ttl"
        },
    }


def main() -> None:
    args = arguments(__doc__, rounds=15, calls=20_000)
    with serve_or_use() as url:
        record("local", url, {name: lane(url, value, args.rounds, args.calls) for name, value in VALUES.items()}, args)


if __name__ == "__main__":
    main()
