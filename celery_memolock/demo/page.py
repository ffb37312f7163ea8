"""The queue page: a Flask site and a Celery app, set up by the environment that `run` gives its processes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import redis
from celery import Celery
from flask import Flask, Response, jsonify, request

from .. import current_flight, memolocked_task
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


def count(page: str, told: Callable[[float], object] = lambda _: None) -> int:
    """The slow query; it says in between how far it is."""
    with witnessed(RECORDS, page):
        return database.count_waiting(page, told)


@memolocked_task(app=celery_app, ttl=TTL, name="memolock_demo.count_waiting")
def count_in_worker(page: str) -> int:
    """The slow query, as a task. What it reports costs little: at most twenty notices a second are sent."""
    return count(page, lambda fraction: current_flight.progress(fraction, "visitors read"))


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


@app.get("/queue/<page>/events")
def events(page: str) -> Response:
    """Send how far the count is as server-sent events, and the count itself as the last."""
    return Response(_events(page), mimetype="text/event-stream", headers={"Cache-Control": "no-store"})


def _events(page: str) -> Iterator[str]:
    # The thread that waits for the value hears of progress; this one sends it on, and ends with the value.
    heard: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    get = waiting
    if MODE == "memolock":
        get = count_in_worker.with_options(on_progress=lambda done: heard.put(("progress", done.fraction))).get_cached

    def ask() -> None:
        try:
            heard.put(("waiting", get(page)))
        except Exception as error:
            heard.put(("failed", str(error)))

    threading.Thread(target=ask, daemon=True).start()
    event = "progress"
    while event == "progress":
        event, data = heard.get()
        yield f"event: {event}\ndata: {json.dumps(data)}\n\n"


@app.get("/queue/<page>/watch")
def watch(page: str) -> str:
    """Show it: a bar that fills while the worker counts, and then the number."""
    return WATCH


WATCH = """<!doctype html>
<title>The queue page</title>
<p><output>counting</output> <progress value="0"></progress>
<script>
  const shown = document.querySelector("output"), bar = document.querySelector("progress");
  const events = new EventSource("events");
  events.addEventListener("progress", (event) => { bar.value = event.data; });
  events.addEventListener("waiting", (event) => { shown.value = event.data + " wait before you"; bar.value = 1; });
  events.addEventListener("failed", (event) => { shown.value = JSON.parse(event.data); });
  // The browser asks again some seconds after the end of each answer.
</script>
"""


@app.get("/health")
def health() -> str:
    """Answer when the site is up."""
    return "ok"
