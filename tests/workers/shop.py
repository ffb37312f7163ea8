"""The app of these tests: made once by each worker from its environment, and by each test from its fixtures."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, ClassVar

import redis
from celery import Celery, Task
from celery.exceptions import Ignore, Reject
from kombu import serialization

from celery_memolock import MISS, MemoLockTask, current_flight, memolocked_task


class Sold(Exception):
    """An exception of the application's own."""


#: A serializer of the application's own, as kombu lets it have.
serialization.register("lines", "\n".join, lambda body: body.decode().splitlines(), "text/x-lines", "utf-8")


def _tags_of(key: str) -> list[Any]:
    if key.startswith("wrong in the worker"):
        return ["a tag", "" if "SHOP_BROKER" in os.environ else "of the caller's"]
    if key.startswith("failing"):
        raise Sold(key)
    return [key, 7]


@dataclass
class Stock:
    """A value of a type of its own."""

    key: str
    seen: datetime


class Left(BaseException):
    """What ends a run and is no error, as a library may have its own."""


#: What a run may leave by that no `except Exception` sees.
WAYS_OUT: dict[str, BaseException] = {
    "KeyboardInterrupt": KeyboardInterrupt("by the task"),
    "SystemExit": SystemExit(3),
    "CancelledError": asyncio.CancelledError("by a library"),
    "Left": Left("by a library"),
}


class Loop:
    """An event loop in a thread of its own, for those who ask from asyncio."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="loop", daemon=True).start()

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine there, and return its result here."""
        work = asyncio.run_coroutine_threadsafe(self._noting_its_end(coroutine, over := threading.Event()), self.loop)
        try:
            return work.result()
        except KeyboardInterrupt:
            work.cancel()
            over.wait(10)
            raise

    @staticmethod
    async def _noting_its_end(coroutine: Any, over: threading.Event) -> Any:
        try:
            return await coroutine
        finally:
            over.set()


class FromAsyncio:
    """A task, or `with_options` of it, whose caller methods are asked from asyncio."""

    loop: ClassVar[Loop | None] = None

    def __init__(self, methods: Any) -> None:
        self._methods = methods

    def __getattr__(self, name: str) -> Any:
        if name == "with_options":
            return lambda **options: FromAsyncio(self._methods.with_options(**options))
        found = getattr(self._methods, name)
        if not hasattr(self._methods, f"a{name}"):
            return found
        if FromAsyncio.loop is None:
            FromAsyncio.loop = Loop()
        loop = FromAsyncio.loop
        return lambda *args, **kwargs: loop.run(getattr(self._methods, f"a{name}")(*args, **kwargs))


@dataclass
class Shop:
    """An app, its tasks, and the records of their runs. Its callers are threads, or run in an event loop."""

    app: Celery
    records: redis.Redis
    driver: str = os.environ.get("MEMOLOCK_DRIVER", "threads")
    tasks: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        task = self.tasks[name]
        return FromAsyncio(task) if self.driver == "asyncio" else task

    def ran(self, key: str) -> int:
        """How often the tasks ran for a key."""
        return int(self.records.llen(f"ran:{key}"))  # type: ignore[arg-type]

    def await_start(self, key: str) -> int:
        """Wait until a gated run of a key begins; return its process id."""
        found: Any = self.records.blpop([f"started:{key}"], 30)
        assert found is not None, f"no run of {key!r} began"
        return int(found[1])

    def open_gate(self, key: str, value: str = "open") -> None:
        """Let a gated run of a key end with a value."""
        self.records.rpush(f"gate:{key}", value)


def make(broker: str, store: str, prefix: str, records_at: str | None = None, **conf: Any) -> Shop:
    """Make the app with all its tasks; the records are kept in the store's server unless there is another."""
    app = Celery("tests.workers.shop", broker=broker)
    app.conf.update(
        memolock_redis_url=store,
        memolock_prefix=prefix,
        memolock_lease=1.0,
        memolock_poll_interval=0.5,
        task_default_queue=prefix,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        **conf,
    )
    records: Any = redis.Redis.from_url(records_at or store, socket_timeout=60, max_connections=1000)

    def ran(key: str) -> None:
        records.rpush(f"ran:{key}", f"{os.getpid()} {time.monotonic()}")

    def stand_at_gate(key: str) -> str:
        """Say that a run began, and wait until it may go on: in one step, so that who began first goes first."""
        with records.pipeline(transaction=False) as both:
            both.rpush(f"started:{key}", os.getpid()).blpop([f"gate:{key}"], 55)
            return str(both.execute()[1][1].decode())

    @memolocked_task(app=app, ttl=60, name="shop.stock")
    def stock(key: str, value: Any = "stock") -> Any:
        ran(key)
        return [key, value]

    @memolocked_task(app=app, ttl=60, name="shop.plain")
    def plain(key: str, value: Any = None) -> Any:
        ran(key)
        return value

    @memolocked_task(app=app, ttl=60, name="shop.slow")
    def slow(key: str, seconds: float) -> str:
        ran(key)
        time.sleep(seconds)
        return key

    @memolocked_task(app=app, ttl=60, name="shop.gated")
    def gated(key: str) -> str:
        ran(key)
        return stand_at_gate(key)

    @memolocked_task(app=app, ttl=60, name="shop.failing", error_ttl=30)
    def failing(key: str) -> str:
        ran(key)
        raise Sold(key, 7)

    @memolocked_task(app=app, ttl=60, name="shop.unencodable", max_value_size=1000, error_ttl=30)
    def unencodable(key: str, kind: str) -> Any:
        ran(key)
        return {1, 2} if kind == "set" else "x" * 2000

    @memolocked_task(app=app, ttl=60, name="shop.bound", bind=True)
    def bound(self: Any, key: str) -> list[Any]:
        ran(key)
        return [key, self.name, bool(self.request.id)]

    @memolocked_task(
        app=app, ttl=60, name="shop.flaky", bind=True, autoretry_for=(KeyError,), default_retry_delay=0, max_retries=5
    )
    def flaky(self: Any, key: str, failures: int) -> int:
        ran(key)
        if self.request.retries < failures:
            raise KeyError(key)
        return int(self.request.retries)

    @memolocked_task(app=app, ttl=60, name="shop.retrying", bind=True, max_retries=1)
    def retrying(self: Any, key: str, failures: int) -> int:
        ran(key)
        if self.request.retries < failures:
            raise self.retry(exc=Sold(key), countdown=0.1)
        return int(self.request.retries)

    @memolocked_task(app=app, ttl=60, name="shop.outer")
    def outer(key: str) -> list[Any]:
        ran(key)
        return [stock.get_cached(f"inner of {key}"), stock.get_cached(f"inner of {key}")]

    @memolocked_task(app=app, ttl=60, name="shop.circle")
    def circle(key: str) -> Any:
        ran(key)
        return circle.get_cached(key)

    @memolocked_task(app=app, ttl=60, name="shop.ping")
    def ping(key: str, nested: str) -> Any:
        ran(key)
        return pong.with_options(nested=nested).get_cached(key, nested)

    @memolocked_task(app=app, ttl=60, name="shop.pong")
    def pong(key: str, nested: str) -> Any:
        ran(key)
        return ping.with_options(nested=nested).get_cached(key, nested)

    @app.task(base=MemoLockTask, shared=False, name="shop.with_base", memolock={"ttl": 60, "ignore": ("request",)})
    def with_base(key: str, request: str = "") -> str:
        ran(key)
        return key + request

    @app.task(base=MemoLockTask, shared=False, name="shop.pickled", serializer="pickle", memolock={"ttl": 60})
    def pickled(key: str) -> str:
        ran(key)
        return key

    class ByClass(MemoLockTask[[str], str]):
        name = "shop.by_class"
        memolock: ClassVar[dict[str, Any]] = {"ttl": 60, "key": "{key}"}

        def run(self, key: str) -> str:
            ran(key)
            return key.upper()

    @app.task(shared=False, name="shop.add")
    def add(left: int, right: int) -> int:
        return left + right

    @memolocked_task(app=app, ttl=60, name="shop.ending", bind=True, acks_late=True)
    def ending(self: Any, key: str, how: str) -> str:
        ran(key)
        if how == "ignore":
            raise Ignore("enough")
        if how == "reject":
            raise Reject("no", requeue=False)
        if how == "requeue" and records.llen(f"ran:{key}") == 1:
            raise Reject("later", requeue=True)
        if how == "replace":
            self.replace(add.s(1, 2))
        if how == "replace by itself":
            self.replace(ending.s(f"{key} anew", ""))
        if how == "go on" and not self.request.retries:
            self.retry(countdown=1, throw=False)
            return "of the run that went on"
        return "of the second run"

    @memolocked_task(app=app, ttl=60, name="shop.early", acks_late=False)
    def early(key: str) -> str:
        ran(key)
        raise Reject("later", requeue=True)

    @memolocked_task(app=app, ttl=60, name="shop.soft", soft_time_limit=0.5)
    def soft(key: str) -> str:
        ran(key)
        return str(records.blpop([f"gate:{key}"], 55))

    @memolocked_task(app=app, ttl=60, name="shop.hard", time_limit=1)
    def hard(key: str) -> str:
        ran(key)
        return str(records.blpop([f"gate:{key}"], 55))

    @memolocked_task(app=app, ttl=60, name="shop.expiring", expires=0.2)
    def expiring(key: str) -> str:
        ran(key)
        return key

    @memolocked_task(app=app, ttl=60, name="shop.sourced", bind=True, max_retries=1)
    def sourced(self: Any, key: str, then: str = "") -> int:
        ran(key)
        version = int(records.get(f"source:{key}") or 0)  # type: ignore[arg-type]
        records.rpush(f"started:{key}", os.getpid())
        if then.startswith("retry") and not self.request.retries:
            self.retry(countdown=5 if then == "retry late" else 1)
        if then == "gate":
            records.blpop([f"gate:{key}"], 55)
        return version

    @memolocked_task(app=app, ttl=60, name="shop.near", local_ttl=60)
    def near(key: str) -> int:
        return int(records.rpush(f"ran:{key}", "near"))

    @memolocked_task(app=app, ttl=60, name="shop.crowded")
    def crowded(key: str, seconds: float) -> str:
        ran(key)
        records.rpush(f"alive:{key}", records.incr(f"now:{key}"))
        time.sleep(seconds)
        records.decr(f"now:{key}")
        return key

    @memolocked_task(app=app, ttl=60, name="shop.missing", cache_errors={Sold: 60})
    def missing(key: str) -> str:
        ran(key)
        raise Sold(key) if "sold" in key else KeyError(key)

    @memolocked_task(app=app, ttl=60, name="shop.counted", bind=True)
    def counted(self: Any, key: str, then: str = "") -> int:
        count = int(records.rpush(f"ran:{key}", os.getpid()))
        if then == "gate" and count > 1:
            stand_at_gate(key)
        if records.exists(f"fail:{key}"):
            raise Sold(key)
        return count

    @memolocked_task(
        app=app,
        name="shop.chosen",
        ttl=lambda value: value["ttl"] if isinstance(value, dict) else 60,
        none_ttl=0,
        cache_if=lambda value: value != "no",
    )
    def chosen(key: str, value: Any) -> Any:
        ran(key)
        return value

    @memolocked_task(app=app, ttl=60, stale_ttl=60, name="shop.told")
    def told(key: str, then: str = "") -> Any:
        ran(key)
        found = [current_flight.stale is MISS, current_flight.stale_etag, current_flight.attempt, bool(current_flight)]
        if then == "not modified":
            return current_flight.not_modified()
        current_flight.etag = "v 1"
        if then == "unstored":
            current_flight.ttl = 0
        return found

    @memolocked_task(app=app, ttl=60, name="shop.tagged", tags=lambda key, tag, then="": [tag, "all of them"])
    def tagged(key: str, tag: str, then: str = "") -> int:
        count = int(records.rpush(f"ran:{key}", os.getpid()))
        if then == "gate":
            stand_at_gate(key)
        return count

    @memolocked_task(app=app, ttl=60, name="shop.labelled", tags=["a label", "another {label}"])
    def labelled(key: str) -> str:
        ran(key)
        return key

    @memolocked_task(app=app, ttl=60, name="shop.mistagged", tags=lambda key: _tags_of(key))
    def mistagged(key: str) -> str:
        ran(key)
        return key

    @memolocked_task(app=app, ttl=100, ttl_jitter=0.5, none_ttl=7, name="shop.jittered")
    def jittered(key: str, value: Any = 1) -> Any:
        ran(key)
        return value

    @memolocked_task(app=app, ttl=60, name="shop.lines", serializer="lines", compression="zlib")
    def lines(key: str) -> list[str]:
        ran(key)
        return [key, "ä"]

    @memolocked_task(app=app, ttl=60, name="shop.fallback", local_ttl=60, stale_if_error=60)
    def fallback(key: str) -> int:
        return int(records.rpush(f"ran:{key}", os.getpid()))

    @memolocked_task(app=app, ttl=60, name="shop.typed", typed=True, compression="zstd", compress_over=10)
    def typed(key: str) -> list[Stock]:
        ran(key)
        return [Stock(key, datetime(2026, 1, 2, tzinfo=timezone.utc))]

    @memolocked_task(app=app, ttl=60, name="shop.outside", external=True, external_timeout=30)
    def outside(key: str) -> None:
        ran(key)
        records.rpush(f"token:{key}", current_flight.token)
        if key.startswith("failing"):
            raise Sold(key)

    @memolocked_task(
        app=app,
        ttl=60,
        stale_ttl=60,
        name="shop.indexed",
        external=True,
        tags=lambda key, then="": [key],
        max_value_size=1000,
    )
    def indexed(key: str, then: str = "") -> Any:
        match then:
            case "ttl":
                current_flight.ttl = 5
            case "etag":
                current_flight.etag = "v1"
            case "not modified":
                return current_flight.not_modified()
        records.rpush(f"etag:{key}", current_flight.stale_etag)
        records.rpush(f"token:{key}", current_flight.token)
        return "not the value"

    @memolocked_task(app=app, ttl=60, name="shop.warm", refresh_every=0.2, refresh_calls=[("warm 1",), ("warm 2",)])
    def warm(key: str) -> int:
        return int(records.rpush(f"ran:{prefix}:{key}", os.getpid()))

    @memolocked_task(app=app, ttl=60, name="shop.reporting")
    def reporting(key: str) -> str:
        ran(key)
        for step in range(3):
            current_flight.progress(step / 2, f"step {step}")
            stand_at_gate(key)
        return key

    class Hooked(MemoLockTask[Any, Any]):
        """A class of the application's own, with hooks around the run."""

        abstract = True

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            if args[0].startswith("too early"):
                raise Sold(args[0])
            if args[0].startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            match args[0].split(":")[0]:
                case "instead":
                    return "without a run"
                case "ignored":
                    raise Ignore("by its class")
                case "around":
                    raise Sold(args[0])
                case "again" if not self.request.retries:
                    self.retry(countdown=0)
            return ["around", super().__call__(*args, **kwargs)]

    @memolocked_task(app=app, ttl=60, name="shop.hooked", base=Hooked)
    def hooked(key: str) -> str:
        ran(key)
        return key

    @memolocked_task(app=app, ttl=60, name="shop.leaving", lease=300)
    def leaving(key: str, way: str) -> Any:
        ran(key)
        raise WAYS_OUT[way]

    def with_session(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function("a session", *args, **kwargs)

        return wrapper

    @memolocked_task(app=app, ttl=60, name="shop.injected", bind=True, key="{key}", autoretry_for=(Sold,))
    @with_session
    def injected(session: str, self: Any, key: str) -> list[str]:
        ran(key)
        return [key, session, self.name]

    by_class: Task[Any, Any] = app.register_task(ByClass())
    tasks = [stock, plain, slow, gated, failing, unencodable, bound, flaky, retrying, outer, circle, with_base, add]
    tasks += [near, ping, pong, ending, early, soft, hard, expiring, sourced, crowded, missing]
    tasks += [counted, chosen, told, tagged, fallback, typed, reporting, warm, outside, indexed]
    tasks += [labelled, mistagged, jittered, lines, hooked, leaving, injected, pickled]
    named = {task.name.removeprefix("shop."): task for task in [*tasks, by_class]}
    return Shop(app, records, tasks=named)


if "SHOP_BROKER" in os.environ:
    shop = make(
        os.environ["SHOP_BROKER"],
        os.environ["SHOP_STORE"],
        os.environ["SHOP_PREFIX"],
        os.environ.get("SHOP_RECORDS"),
        task_acks_late=os.environ.get("SHOP_ACKS") == "late",
        result_backend=os.environ.get("SHOP_RESULTS"),
    )
    app = shop.app
    if "SHOP_MISSPELT" in os.environ:
        name, _, value = os.environ["SHOP_MISSPELT"].partition("=")
        app.conf[name] = value or 5
