"""The smallest script of the inline engine: ten threads in each of two processes ask, and one of them computes.

With a Redis or Valkey server at MEMOLOCK_REDIS_URL (default redis://localhost:6379/0), and neither queue nor worker:

    python -m examples.inline

Then it does the same from asyncio.
"""

import asyncio
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from celery_memolock import MemoLock

memo = MemoLock(os.environ.get("MEMOLOCK_REDIS_URL", "redis://localhost:6379/0"), ttl=5)


def count() -> dict[str, Any]:
    """Count, slowly."""
    time.sleep(0.5)  # stands for a slow query
    return {"waiting": 5500, "counted_by": os.getpid(), "counted_at": time.time()}


async def count_in_a_loop() -> dict[str, Any]:
    """Count, slowly, and let the loop go on meanwhile."""
    await asyncio.sleep(0.5)
    return {"waiting": 5500, "counted_by": os.getpid(), "counted_at": time.time()}


def ask_from_threads(key: str) -> list[Any]:
    """Ask as ten threads of a web process do."""
    with ThreadPoolExecutor(10) as pool:
        return list(pool.map(lambda _: memo.get(key, count), range(10)))


def ask_from_asyncio(key: str) -> list[Any]:
    """Ask as ten requests to an async web process do."""

    async def ask() -> list[Any]:
        async with memo:  # closes its connections before the loop ends
            return await asyncio.gather(*(memo.aget(key, count_in_a_loop) for _ in range(10)))

    return asyncio.run(ask())


if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        for how, ask in (("threads", ask_from_threads), ("asyncio", ask_from_asyncio)):
            answers = [answer for found in processes.map(ask, [f"queue of {how}"] * 2) for answer in found]
            print(answers[0])
            print(f"{how}: {len(answers)} callers, {len({str(answer) for answer in answers})} run")
