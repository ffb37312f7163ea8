"""The queue page: a Flask site and a Celery app, set up by the environment that `run` gives its processes."""

from __future__ import annotations

import os
from pathlib import Path

import redis
from celery import Celery
from flask import Flask, Response, jsonify, request

from .. import memolocked_task
from .database import Database
from .witness import witnessed

__all__ = ["TTL", "app", "celery_app"]

TTL = 1.0

REDIS_URL = os.environ.get("MEMOLOCK_DEMO_REDIS", "redis://localhost:6379/0")
MODE = os.environ.get("MEMOLOCK_DEMO_MODE", "memolock")
PREFIX = os.environ.get("MEMOLOCK_DEMO_PREFIX", "memolock-demo")
RECORDS = Path(os.environ.get("MEMOLOCK_DEMO_RECORDS", "."))

database = Database(os.environ.get("MEMOLOCK_DEMO_DATABASE", "sqlite:///memolock-demo.sqlite"))
cache = redis.Redis.from_url(REDIS_URL, max_connections=1000, socket_timeout=10)
app = Flask(__name__)
celery_app = Celery("memolock_demo", broker=REDIS_URL)
celery_app.conf.update(
    memolock_redis_url=REDIS_URL,
    memolock_prefix=PREFIX,
    task_default_queue=PREFIX,
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
)


def count(page: str) -> int:
    """The slow query."""
    with witnessed(RECORDS, page):
        return database.count_waiting(page)


@memolocked_task(app=celery_app, ttl=TTL, name="memolock_demo.count_waiting")
def count_in_worker(page: str) -> int:
    """The slow query, as a task."""
    return count(page)


def without_cache(page: str) -> int:
    """Each request counts for itself."""
    return count(page)


def with_plain_cache(page: str) -> int:
    """The usual cache: whoever finds nothing counts, and so does everybody until the first is done."""
    key = f"{PREFIX}:plain:{page}"
    cached: bytes | None = cache.get(key)  # type: ignore[assignment]
    if cached is not None:
        return int(cached)
    value = count(page)
    cache.set(key, value, px=int(TTL * 1000))
    return value


waiting = {"none": without_cache, "ttl": with_plain_cache, "memolock": count_in_worker.get_cached}[MODE]


@app.get("/queue/<page>")
def queue(page: str) -> Response:
    """Tell a visitor how many wait, and whether it is their turn."""
    user = request.args.get("user", 0, int)
    if database.is_in(user):
        return jsonify({"in": True})
    return jsonify({"in": False, "waiting": waiting(page)})


@app.get("/health")
def health() -> str:
    """Answer when the site is up."""
    return "ok"
