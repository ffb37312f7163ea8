"""Jobs that RQ's workers import: on the queue that their environment names."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time
from typing import Any

import redis
import rq
from rq.serializers import JSONSerializer

from celery_memolock import MemoLock
from celery_memolock.rq import memolocked_job

if "RQ_JOBS_URL" in os.environ:
    QUEUE = os.environ["RQ_JOBS_QUEUE"]
    serializer = JSONSerializer if "--serializer" in sys.argv else None
    queue = rq.Queue(QUEUE, connection=redis.Redis.from_url(os.environ["RQ_JOBS_URL"]), serializer=serializer)
    records: Any = redis.Redis.from_url(os.environ["RQ_JOBS_URL"], socket_timeout=60)
    COMMON: dict[str, Any] = {"ttl": 60, "lease": 1.0, "poll_interval": 0.5, "prefix": QUEUE, "failure_ttl": 60}

    def note(what: str) -> int:
        """Note a run; return how many there were."""
        return int(records.rpush(f"ran:{QUEUE}:{what}", os.getpid()))

    def stand_at_gate(key: str) -> None:
        """Say that a run began, and wait: in one step, so that who began first goes first."""
        with records.pipeline(transaction=False) as both:
            both.rpush(f"started:{QUEUE}:{key}", os.getpid()).blpop([f"gate:{QUEUE}:{key}"], 50).execute()

    def on_stopped(job: Any, connection: Any) -> None:
        """Called by RQ."""
        connection.set(f"stopped:{job.args[0]}", 1, ex=60)

    def on_success(job: Any, connection: Any, result: Any) -> None:
        """Called by RQ."""
        connection.set(f"succeeded:{job.args[0]}", repr(result), ex=60)

    def on_failure(job: Any, connection: Any, *error: Any) -> None:
        """Called by RQ."""
        connection.set(f"failed:{job.args[0]}", str(error[1]), ex=60)

    @memolocked_job(queue, **COMMON)
    def stock(key: str) -> list[str]:
        note(f"stock {key}")
        return [key, "stock"]

    @memolocked_job(queue, **COMMON)
    def failing(key: str) -> str:
        raise Sold(key)

    @memolocked_job(queue, retry=rq.Retry(max=2), **COMMON)
    def flaky(key: str, failures: int) -> int:
        count = note(f"flaky {key}")
        if count <= failures:
            raise Sold(key)
        return count

    @memolocked_job(queue, retry=rq.Retry(max=2), **COMMON)
    def gated_flaky(key: str) -> int:
        count = note(f"gated {key}")
        stand_at_gate(key)
        if count == 1:
            raise Sold(key)
        return count

    @memolocked_job(queue, retry=rq.Retry(max=1, interval=60), **COMMON)
    def patient(key: str) -> None:
        note(f"patient {key}")
        raise Sold(key)

    @memolocked_job(queue, **COMMON)
    def returning(key: str, failures: int) -> Any:
        count = note(f"returning {key}")
        return count if count > failures else rq.Retry(max=2)

    @memolocked_job(queue, max_overlap=1, **COMMON)
    def alone(key: str) -> Any:
        count = note(f"alone {key}")
        if count == 1:
            stand_at_gate(key)
        return rq.Retry(max=1) if count == 2 else count

    @memolocked_job(queue, **{**COMMON, "lease": 300})
    def leaving(key: str) -> str:
        note(f"leaving {key}")
        raise Silent if key.startswith("silent") else asyncio.CancelledError("by a library")

    @memolocked_job(queue, **COMMON)
    def replaced(key: str) -> str:
        return key

    if "worker" in sys.argv:  # it imports a version in which this is no job of ours

        def replaced(key: str) -> str:  # type: ignore[no-redef]
            return key

    @memolocked_job(queue, **COMMON)
    async def later(key: str) -> str:
        await asyncio.sleep(0.01)
        return f"{key} later"

    @memolocked_job(queue, **COMMON)
    def slow(key: str, seconds: float) -> str:
        note(f"slow {key}")
        time.sleep(seconds)
        return key

    @memolocked_job(queue, on_stopped=on_stopped, **COMMON)
    def gated(key: str) -> str:
        note(f"gated {key}")
        stand_at_gate(key)
        return key

    @memolocked_job(queue, stale_ttl=60, **COMMON)
    def stale(key: str) -> int:
        return note(f"stale {key}")

    def plain_stock(key: str) -> list[str]:
        """Do without a cache."""
        return [key, "stock"]

    @memolocked_job(queue, **COMMON)
    def handing(key: str, to: str) -> str:
        """Hand the job's meta and callbacks on to another job, as who passes on what a tracer put there."""
        note(f"handing {key}")
        job: Any = rq.get_current_job()
        callbacks: Any = {
            name: rq.Callback(getattr(job, f"{name.removeprefix('on_')}_callback")) for name in _CALLBACKS
        }
        args = (f"{key} child", *["stock"] * (to == "handing"))
        child = queue.enqueue(f"{__name__}.{to}", *args, meta=job.meta, **callbacks)
        records.rpush(f"child:{QUEUE}:{key}", child.id)
        job.save_meta()
        stand_at_gate(key)
        return child.id

    _CALLBACKS = ("on_failure", "on_stopped", "on_success")

    @memolocked_job(queue, retry=rq.Retry(max=2), **COMMON)
    def saving(key: str) -> int:
        rq.get_current_job().meta["seen"] = True
        rq.get_current_job().save_meta()
        count = note(f"saving {key}")
        if count <= 2:
            raise Sold(key)
        return count

    memo = MemoLock(os.environ["RQ_JOBS_URL"], prefix=QUEUE, ttl=60, stale_ttl=60)

    def asking(key: str) -> list[Any]:
        """Get stale values, and end before they are fresh."""
        return [stale.get_cached(key), memo.get(key, lambda: time.sleep(0.5) or "new")]

    async def aasking(key: str) -> list[Any]:
        """Do so from asyncio."""
        return [await stale.aget_cached(key), "old"]

    @memolocked_job(queue, timeout=3, **COMMON)
    def timed(key: str) -> str:
        stand_at_gate(key)
        return key

    @memolocked_job(queue, timeout=1, **{**COMMON, "lease": 30})
    def unsettled(key: str) -> int:
        count = note(f"unsettled {key}")
        if count == 1:
            records.client_pause(2500)  # so that RQ's time-out strikes while the value is on its way
        return count

    @memolocked_job(queue, on_success=on_success, on_failure=rq.Callback(on_failure, timeout=5), **COMMON)
    def called(key: str) -> str:
        if key.startswith("sold"):
            raise Sold(key)
        return key

    @memolocked_job(rq.Queue(QUEUE, connection=queue.connection, serializer=JSONSerializer), **COMMON)
    def plain(key: str) -> str:
        return key


class Sold(Exception):
    """An exception of the application's own."""


class Silent(BaseException):
    """What cannot be told of, and is no error."""

    def __str__(self) -> str:
        raise ValueError


def fresh() -> Any:
    """Return this module as the environment of now has it."""
    return importlib.reload(sys.modules[__name__])


def ran(jobs: Any, what: str) -> int:
    """How often a job ran."""
    return int(jobs.records.llen(f"ran:{jobs.QUEUE}:{what}"))


def await_start(jobs: Any, key: str) -> int:
    """Wait until a gated run of a key begins; return its process id."""
    found = jobs.records.blpop([f"started:{jobs.QUEUE}:{key}"], 30)
    assert found is not None, f"no run of {key!r} began"
    return int(found[1])


def child_of(jobs: Any, key: str) -> Any:
    """Wait for the job that `handing` sends, and return it."""
    found = jobs.records.blpop([f"child:{jobs.QUEUE}:{key}"], 30)
    assert found is not None, f"no job was sent for {key!r}"
    return jobs.queue.fetch_job(found[1].decode())


def open_gate(jobs: Any, key: str) -> None:
    """Let a gated run go on."""
    jobs.records.rpush(f"gate:{jobs.QUEUE}:{key}", "open")
