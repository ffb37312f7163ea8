"""Type checkers must accept this file: the caller methods carry the task's own types."""

from datetime import timedelta
from typing import Any

from celery import Celery
from typing_extensions import assert_type

from celery_memolock import MISS, MemoLockTask, memolocked_task

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
