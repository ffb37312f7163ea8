"""The same tasks for every engine: a worker makes them from its environment, a test from its fixtures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import redis

from celery_memolock import MISS, MemoLock, current_flight, memolocked_task
from tests.odd_errors import Askew, Coded

#: What all tasks have in common, so that faults heal while a test waits.
COMMON: dict[str, Any] = {"ttl": 60, "lease": 1.0, "poll_interval": 0.5}

Define = Callable[..., Callable[[Any], Any]]


class Sold(Exception):
    """An exception of the application's own."""


class Silent(Exception):
    """One that has no text."""

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


@dataclass(frozen=True)
class Frozen(Exception):
    """One to which nothing can be written, be it a traceback."""

    code: str


@dataclass
class Stock:
    """A value of a type of its own."""

    key: str
    seen: datetime


#: What the runs of `odd` raise.
ODD: dict[str, type[Exception]] = {"arguments": Coded, "text": Silent, "line": Askew, "frozen": Frozen}


@dataclass
class Records:
    """What the tasks' runs leave behind, and wait for."""

    server: redis.Redis

    def ran(self, key: str) -> int:
        """How often the tasks ran for a key."""
        return int(self.server.llen(f"ran:{key}"))  # type: ignore[arg-type]

    def note(self, key: str) -> int:
        """Note a run; return how many there were."""
        return int(self.server.rpush(f"ran:{key}", os.getpid()))  # type: ignore[arg-type]

    def await_start(self, key: str) -> int:
        """Wait until a gated run of a key begins; return its process id."""
        found: Any = self.server.blpop([f"started:{key}"], 30)
        assert found is not None, f"no run of {key!r} began"
        return int(found[1])

    def open_gate(self, key: str, value: str = "open") -> None:
        """Let a gated run of a key end with a value."""
        self.server.rpush(f"gate:{key}", value)

    def stand_at_gate(self, key: str) -> str:
        """Say that a run began, and wait until it may go on: in one step, so that who began first goes first."""
        with self.server.pipeline(transaction=False) as both:
            both.rpush(f"started:{key}", os.getpid()).blpop([f"gate:{key}"], 50)
            return str(both.execute()[1][1].decode())


@dataclass
class Place:
    """One engine with its tasks, asked by one driver."""

    engine: str
    records: Records
    prefix: str
    tasks: dict[str, Any] = field(default_factory=dict)
    home: Any = None  # the Celery app, the RQ queue or the MemoLock


def connect(url: str) -> Records:
    """Return the records on a server."""
    return Records(redis.Redis.from_url(url, socket_timeout=60, max_connections=1000))


def make(engine: str, url: str, prefix: str) -> Place:
    """Make the tasks of an engine."""
    place = Place(engine, connect(os.environ.get("PLACE_RECORDS", url)), prefix)
    define = _DEFINERS[engine](place, url)
    place.tasks = goods(define, place.records)
    return place


def _celery(place: Place, url: str) -> Define:
    from celery import Celery

    app = Celery("tests.engines.tasks", broker=url)
    app.conf.update(memolock_redis_url=url, memolock_prefix=place.prefix, task_default_queue=place.prefix)
    app.conf.update(worker_prefetch_multiplier=1, broker_connection_retry_on_startup=True)
    place.home = app
    return lambda name, **options: memolocked_task(app=app, name=f"goods.{name}", **options)


def _rq(place: Place, url: str) -> Define:
    from rq import Queue

    from celery_memolock.rq import memolocked_job

    place.home = Queue(place.prefix, connection=redis.Redis.from_url(url))

    def define(name: str, **options: Any) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            function.__module__, function.__qualname__ = __name__, name  # where a worker finds it, see the end
            return memolocked_job(place.home, prefix=place.prefix, failure_ttl=60, **options)(function)

        return decorate

    return define


def _inline(place: Place, url: str) -> Define:
    place.home = MemoLock(url, prefix=place.prefix)
    return lambda name, **options: place.home.memoize(name=f"goods.{name}", **options)


_DEFINERS = {"celery": _celery, "rq": _rq, "inline": _inline}


def _raised(error: Exception) -> float:
    raise error


def goods(define: Define, records: Records) -> dict[str, Any]:
    """Define the tasks."""
    made: dict[str, Any] = {}

    def task(name: str | None = None, **options: Any) -> Callable[[Any], None]:
        def add(function: Any) -> None:
            made[name or function.__name__] = define(name or function.__name__, **{**COMMON, **options})(function)

        return add

    @task()
    def stock(key: str, value: Any = "stock") -> Any:
        records.note(key)
        return [key, value]

    @task()
    def slow(key: str, seconds: float) -> str:
        records.note(key)
        time.sleep(seconds)
        return key

    @task()
    def gated(key: str) -> str:
        records.note(key)
        return records.stand_at_gate(key)

    @task()
    def failing(key: str) -> str:
        records.note(key)
        raise Sold(key, 7)

    @task(lease=120, wait_timeout=60, ttl=lambda value: _raised(Silent("x")) if value == "ttl" else 60)
    def odd(key: str) -> str:
        kind = key.partition(" ")[0]
        records.note(key)
        records.stand_at_gate(key)
        if kind == "etag":
            current_flight.etag = "\ud800"
        if kind in ODD:
            raise ODD[kind]("x")
        return kind

    @task(error_ttl=30)
    def remembered(key: str) -> str:
        records.note(key)
        if key.startswith("gated"):
            records.stand_at_gate(key)
        raise Sold(key, 7)

    @task(max_value_size=1000)
    def unencodable(key: str, kind: str) -> Any:
        records.note(key)
        return {1, 2} if kind == "set" else "x" * 2000

    @task()
    def every_other(key: str) -> int:
        count = records.note(key)
        if count % 2:
            raise Sold(key)
        return count

    @task(stale_ttl=60)
    def stale(key: str) -> int:
        return records.note(key)

    @task(stale_if_error=60)
    def fallback(key: str) -> int:
        count = records.note(key)
        if count > 1:
            raise Sold(key)
        return count

    @task(
        ttl=lambda value: value["ttl"] if isinstance(value, dict) else 60,
        none_ttl=0,
        cache_if=lambda value: value != "no",
    )
    def chosen(key: str, value: Any) -> Any:
        records.note(key)
        return value

    @task(cache_if=lambda value: value != "no")
    def gated_chosen(key: str) -> str:
        records.note(key)
        return records.stand_at_gate(key)

    @task(stale_ttl=60)
    def told(key: str, then: str = "") -> Any:
        records.note(key)
        if then == "not modified" and current_flight.stale is not MISS:
            return current_flight.not_modified()
        current_flight.etag = "v 1"
        return [current_flight.stale is MISS, current_flight.stale_etag, current_flight.attempt, bool(current_flight)]

    @task(tags=lambda key, tag: [tag])
    def tagged(key: str, tag: str) -> int:
        return records.note(key)

    @task(typed=True, compression="zstd", compress_over=10)
    def typed(key: str) -> list[Stock]:
        records.note(key)
        return [Stock(key, datetime(2026, 1, 2, tzinfo=timezone.utc))]

    @task()
    def reporting(key: str) -> str:
        records.note(key)
        for step in range(3):
            current_flight.progress(step / 2, f"step {step}")
            records.stand_at_gate(key)
        return key

    @task(external=True, external_timeout=5)
    def outside(key: str) -> None:
        records.note(key)
        records.server.rpush(f"token:{key}", current_flight.token)

    @task(local_ttl=60)
    def near(key: str) -> int:
        return records.note(key)

    @task()
    def outer(key: str) -> Any:
        return [made["stock"].get_cached(f"inner of {key}"), made["stock"].get_cached(f"inner of {key}")]

    @task()
    def circle(key: str) -> Any:
        return made["circle"].get_cached(key)

    @task()
    def crowded(key: str, seconds: float) -> str:
        records.note(key)
        records.server.rpush(f"alive:{key}", records.server.incr(f"now:{key}"))  # type: ignore[arg-type]
        time.sleep(seconds)
        records.server.decr(f"now:{key}")
        return key

    return made


if "PLACE_ENGINE" in os.environ:
    place = make(os.environ["PLACE_ENGINE"], os.environ["PLACE_STORE"], os.environ["PLACE_PREFIX"])
    app = place.home
    globals().update(place.tasks)  # where RQ's workers look for them
