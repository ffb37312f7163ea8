"""Type checkers must accept this file: the caller methods carry the task's own types."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import redis
import rq
from celery import Celery
from typing_extensions import assert_type

from celery_memolock import MISS, CachedEntry, Client, MemoLock, MemoLockTask, memolocked_task
from celery_memolock.rq import memolocked_job

app = Celery("typing")


@memolocked_task(ttl=5)
def queue_size(queue_id: str, region: int = 1) -> int:
    return len(queue_id) + region


@memolocked_task(ttl=timedelta(minutes=1), app=app, bind=True, max_retries=3, queue="slow", key="{page}")
def page(self: Any, page: str) -> dict[str, int]:
    return {page: self.request.retries}


assert_type(queue_size.get_cached("q1"), int)
assert_type(queue_size.get_cached(queue_id="q1", region=2), int)
assert_type(page.get_cached("front"), dict[str, int])
assert_type(queue_size.with_options(wait_timeout=2).get_cached("q1"), int)
assert_type(queue_size.get_cached_many([("q1",), ("q2", 1)]), list[int])
assert_type(queue_size.get_cached_many([("q1",)], return_exceptions=True), list[int | Exception])
assert_type(queue_size.refresh("q1"), bool)
assert_type(queue_size.invalidate("q1"), bool)
queue_size.set_cached(7, "q1")
size = queue_size.peek("q1")
if size is not MISS:
    assert_type(size, int)


async def in_a_loop() -> None:
    assert_type(await queue_size.aget_cached("q1"), int)
    assert_type(await queue_size.with_options(wait_timeout=2).aget_cached("q1"), int)
    assert_type(await queue_size.arefresh("q1"), bool)
    assert_type(await queue_size.ainvalidate("q1"), bool)
    await queue_size.aset_cached(7, "q1")
    found = await queue_size.apeek("q1")
    if found is not MISS:
        assert_type(found, int)


task: MemoLockTask[[str], int] | None = None
queue_size.delay("q1")
queue_size.s("q1")


# ---- the inline engine: values by their key


@dataclass
class Visits:
    """A value of a type of its own."""

    count: int


def site_of(number: int) -> str:
    return f"site {number}"


async def count() -> int:
    return 7


memo = MemoLock("redis://localhost", ttl=5, stale_ttl=timedelta(minutes=1))
MemoLock(redis.Redis(), name="shop", eager=True)
memo.get("k", lambda: 7)
memo.get("k", count, ttl=timedelta(seconds=5), tags=["a"], cache_if=lambda value: value is not None)
with memo as entered:
    assert_type(entered, MemoLock)
visits = memo.client("visits", key=site_of, of=Visits, serializer="msgpack")
assert_type(visits, Client[int, Visits])
assert_type(visits.get(7, lambda: Visits(1)), Visits)
assert_type(visits.get_many([7, 8], lambda number: Visits(number)), list[Visits])
assert_type(visits.get_entry(7, lambda: Visits(1)), CachedEntry[Visits])
assert_type(visits.refresh(7, lambda: Visits(1)), bool)
assert_type(
    visits.get_many([7], lambda number: Visits(number), return_exceptions=True, ttl=5), list[Visits | Exception]
)
assert_type(visits.set_many({7: Visits(1)}.items(), ttl=5), list[Exception | None])
assert_type(visits.invalidate_many([7, 8]), list[bool])
assert_type(visits.invalidate_many([7, 8], return_exceptions=True), list[bool | Exception])
assert_type(visits.invalidate_all(on_progress=print), int)
visits.set(7, Visits(1), ttl=5)
seen = visits.peek(7)
if seen is not MISS:
    assert_type(seen, Visits)
assert_type(memo.client("counts", of=int), Client[str, int])
assert_type(memo.client("counts", of=int).get("k", count), int)
assert_type(memo.client("anything", key=site_of), Client[int, Any])
assert_type(memo.client("anything"), Client[str, Any])


# ---- and of functions


@memo.memoize(stale_ttl=5)
def area(width: int, height: int = 1) -> int:
    return width * height


@memo.memoize(name="volume", ttl=lambda value: 5.0)
async def volume(width: int, height: int = 1) -> float:
    return width * height


assert_type(area(2, height=3), int)
assert_type(area.get_cached(2), int)
assert_type(area.with_options(wait_timeout=2).get_cached(2), int)
assert_type(area.get_cached_many([(2, 3)]), list[int])
assert_type(volume.get_cached(2, 3), float)
volumes = volume.peek(2, 3)
if volumes is not MISS:
    assert_type(volumes, float)
area.set_cached(6, 2, height=3)


async def in_another_loop() -> None:
    assert_type(await visits.aget(7, lambda: Visits(1)), Visits)
    assert_type(await memo.client("counts", of=int).aget("k", count), int)
    assert_type(await visits.aget_many([7], lambda number: Visits(number)), list[Visits])
    assert_type(await area.aget_cached(2), int)
    assert_type(await volume(2, height=3), float)
    assert_type(await volume.aget_cached(2), float)
    await volume.aset_cached(6.0, 2)
    async with memo as opened:
        assert_type(opened, MemoLock)
    async for progress in volume.afollow(2):
        assert_type(progress.fraction, float)
    async for progress in visits.afollow(7, lambda: Visits(1)):
        assert_type(progress.fraction, float)


# ---- RQ


@memolocked_job("reports", ttl=5, timeout=60, retry=rq.Retry(max=2))
def report(article: str, year: int = 2026) -> list[str]:
    return [article] * year


@memolocked_job(rq.Queue("reports", connection=redis.Redis()), ttl=lambda value: 5.0)
async def later(article: str) -> int:
    return len(article)


@memolocked_job(
    lambda: rq.Queue("reports", connection=redis.Redis()), ttl=timedelta(seconds=5), redis="redis://localhost"
)
def lazily(article: str) -> int:
    return len(article)


assert_type(report.get_cached("tea", year=2025), list[str])
assert_type(later.get_cached("tea"), int)
assert_type(lazily.get_cached("tea"), int)
assert_type(report.with_options(wait_timeout=2).get_cached("tea"), list[str])
assert_type(report.get_cached_many([("tea",)], return_exceptions=True), list[list[str] | Exception])
assert_type(report.invalidate("tea"), bool)
assert_type(report.enqueue("tea", job_id="one"), rq.job.Job)
assert_type(report.delay("tea"), rq.job.Job)
report.set_cached(["tea"], "tea")


async def in_a_third_loop() -> None:
    assert_type(await report.aget_cached("tea"), list[str])
    assert_type(await later.with_options(force_refresh=True).aget_cached("tea"), int)
