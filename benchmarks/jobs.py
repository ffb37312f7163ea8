"""What RQ's workers run in `herd` and `miss`: in a module of its own, as a job is found by its module's name."""

from __future__ import annotations

import os
import time

import redis
import rq

from celery_memolock.rq import memolocked_job

__all__ = ["QUEUE", "SECONDS", "Forking", "Simple", "empty", "memo_empty", "memo_slow", "queue", "slow"]

QUEUE = "benchmark"
SECONDS = 0.5
LONG = 600


def url() -> str:
    return os.environ["BENCHMARK_URL"]


def queue() -> rq.Queue:
    return rq.Queue(QUEUE, connection=redis.Redis.from_url(url(), socket_timeout=60))


def count_run(key: str) -> None:
    with redis.Redis.from_url(url()) as client:
        client.incr(f"runs:{key}")


def slow(key: str) -> float:
    """Take half a second, and return when it was over: time.monotonic is one clock for all processes of a machine."""
    count_run(key)
    time.sleep(SECONDS)
    return time.monotonic()


def empty(key: str) -> str:
    return key


@memolocked_job(queue, ttl=LONG)
def memo_slow(key: str) -> float:
    return slow(key)


@memolocked_job(queue, ttl=LONG)
def memo_empty(key: str) -> str:
    return empty(key)


class Simple(rq.SimpleWorker):
    """RQ's worker that runs jobs in its own process. To name it is to import the jobs."""


class Forking(rq.Worker):
    """RQ's worker that forks for each job, from a process that has imported the jobs: no fork has to do that."""
