"""The task of the storm, and the witness's server, which no fault touches."""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

import redis
from celery import Celery, signals

from benchmarks.chaos.broken import break_build
from celery_memolock import current_flight, memolocked_task

WAIT = 20.0

break_build(os.environ.get("CHAOS_BREAK", ""))
witness = redis.Redis.from_url(os.environ["CHAOS_WITNESS"], decode_responses=True)
app = Celery("benchmarks.chaos.tasks", broker=os.environ["CHAOS_BROKER"])
app.conf.memolock_redis_url = os.environ["CHAOS_STORE"]
app.conf.task_acks_late = os.environ.get("CHAOS_ACKS") == "late"
app.conf.worker_prefetch_multiplier = 1
app.conf.broker_connection_retry_on_startup = True
app.conf.broker_transport_options = {"visibility_timeout": 10}


@signals.after_task_publish.connect
def duplicate(headers: dict[str, object], body: object, exchange: str, routing_key: str, **_: object) -> None:
    """Deliver some messages twice, as brokers may."""
    if random.random() < 0.1:
        with app.producer_pool.acquire(block=True) as producer:
            producer.publish(body, exchange=exchange, routing_key=routing_key, headers=headers, serializer="json")


class SourceDown(Exception):
    """What the task raises now and then."""


OPTIONS: dict[str, Any] = {
    "ttl": 2,
    "lease": 1,
    "dispatch_lease": 2,
    "queue_timeout": 5,
    "wait_timeout": WAIT,
    "poll_interval": 0.5,
    "max_poll_interval": 2,
    "max_crashes": 100,
}
LOCAL_LEASE = 0.5


@memolocked_task(app=app, name="chaos.value", **OPTIONS)
def value(key: str) -> list[object]:
    """Read the source's version, take a while, and return it; some values are too large to ride along."""
    return look_up(key)


@memolocked_task(app=app, name="chaos.kept", local_ttl=2, local_lease=LOCAL_LEASE, **OPTIONS)
def kept(key: str) -> list[object]:
    """Do the same; callers keep the value in their processes."""
    return look_up(key)


def look_up(key: str) -> list[object]:
    version = int(witness.get(f"source:{key}") or 0)  # type: ignore[arg-type]
    witness.rpush("runs", json.dumps([key, current_flight.fence, current_flight.attempt, version, time.monotonic()]))
    time.sleep(random.random() * 0.3)
    if random.random() < 0.03:
        raise SourceDown(key)
    return [key, version, "x" * random.choice([8, 8, 8000])]
