"""The smallest script: ten threads ask, one task runs.

With a Redis or Valkey server at MEMOLOCK_REDIS_URL (default redis://localhost:6379/0), in two shells:

    celery -A examples.smallest worker
    python -m examples.smallest
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

from celery import Celery

from celery_memolock import memolocked_task

app = Celery("examples.smallest", broker=os.environ.get("MEMOLOCK_REDIS_URL", "redis://localhost:6379/0"))


@memolocked_task(ttl=5)
def queue_size(queue_id: str) -> dict[str, object]:
    """Count, slowly."""
    time.sleep(0.5)  # stands for a slow query; the demo has a real one
    return {"queue": queue_id, "waiting": 5500, "counted_at": time.time()}


if __name__ == "__main__":
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(queue_size.get_cached, ["q1"] * 10))
    print(answers[0])
    print(f"{len(answers)} callers, {len({str(answer) for answer in answers})} run")
