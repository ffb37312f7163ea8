"""Type checkers must refuse every line that ends with the word `refused`, and no other."""

from celery_memolock import memolocked_task


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
