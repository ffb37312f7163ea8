"""Type checkers must refuse every line that ends with the word `refused`, and no other."""

from celery_memolock import MemoLock, memolocked_task
from celery_memolock.rq import memolocked_job


@memolocked_task(ttl=5)
def queue_size(queue_id: str) -> int:
    return len(queue_id)


queue_size.get_cached(1)  # refused
queue_size.get_cached()  # refused
queue_size.get_cached("q1", "q2")  # refused
text: str = queue_size.get_cached("q1")  # refused
queue_size.set_cached("seven", "q1")  # refused
queue_size.peek(queue="q1")  # refused
memolocked_task()  # refused
memolocked_task(5)  # refused


def site_of(number: int) -> str:
    return f"site {number}"


memo = MemoLock("redis://localhost", ttl=5)
counts = memo.client("counts", key=site_of, of=int)
MemoLock(5)  # refused
memo.get("k")  # refused
memo.get("k", 7)  # refused
memo.get(7, lambda: 7)  # refused
counts.get("k", lambda: 7)  # refused
counts.get(7, lambda: "seven")  # refused
counts.get_many([7], lambda: 7)  # refused
counts.set(7, "seven")  # refused
counts.set_many({7: "seven"})  # refused
text = counts.get(7, lambda: 7) + "seven"  # refused
memo.client("counts", key=7)  # refused


@memo.memoize(ttl=5)
def area(width: int, height: int = 1) -> int:
    return width * height


@memo.memoize(ttl=5)
async def volume(width: int) -> float:
    return width * 1.5


area("2")  # refused
area(2, depth=3)  # refused
text = area(2)  # refused
area.set_cached("six", 2)  # refused
volume.get_cached("2")  # refused
text = volume.get_cached(2)  # refused


async def in_a_loop() -> None:
    print((await volume(2)) + "seven")  # refused
    await volume.aset_cached("six", 2)  # refused
    await area(2)  # refused
    await counts.aget("k", lambda: 7)  # refused


@memolocked_job("reports", ttl=5)
def report(article: str) -> int:
    return len(article)


report.get_cached(7)  # refused
report.get_cached()  # refused
text = report.get_cached("tea")  # refused
text = report.with_options(wait_timeout=2).get_cached("tea")  # refused
text = report.enqueue("tea")  # refused
report.set_cached("seven", "tea")  # refused
memolocked_job("reports")  # refused
memolocked_job(7, ttl=5)  # refused
