"""The Celery engine: a flight is a message of an ordinary Celery task, with a ticket in its headers."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import fields
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Literal, TypeVar, overload

import celery
import redis
from celery import signals
from celery.exceptions import Ignore, Reject, Retry
from celery.local import Proxy
from celery.utils.functional import head_from_fun
from kombu import serialization
from kombu.exceptions import EncodeError as KombuEncodeError
from typing_extensions import ParamSpec

from ..codec import Codec, pack_error
from ..errors import (
    ArgumentError,
    ConfigurationError,
    DispatchError,
    FlightFailed,
    MemoLockError,
    OptionError,
    StoreUnavailable,
)
from ..keys import KeyMaker, Keys
from ..memo import CallerMethods, Memo, computing
from ..options import CALL_OPTIONS, Options
from ..protocol import (
    Call,
    Defer,
    Disown,
    GoesOn,
    Raised,
    Requeue,
    Returned,
    Run,
    Skip,
    Ticket,
    compute,
    drive,
)
from ..store import Store
from ..sync import Driver

__all__ = ["MemoLockTask", "memolocked_task"]

logger = logging.getLogger("celery_memolock")
P = ParamSpec("P")
R = TypeVar("R")

#: Which apps there are, and which task runs: the stubs know half of it.
_state: Any = importlib.import_module("celery._state")

_HEADER = "memolock"
_OPTION_NAMES = frozenset(f.name for f in fields(Options))
_MOST_STUCK = 64

#: Seconds until a message comes again that a worker could not claim, having no way to the server. Another may have one.
_PUT_BACK = 1.0

if TYPE_CHECKING:

    class _Task(celery.Task[P, R]):
        pass
else:

    class _Task(celery.Task):
        def __class_getitem__(cls, _: Any) -> type:
            return cls


class MemoLockTask(_Task[P, R], CallerMethods[P, R]):
    """A Celery task whose value can be cached and whose callers coalesce.

    It stays an ordinary task: `delay`, canvas, retries and links work as always and touch no cache. The methods of
    `CallerMethods` are what is new. Use it with `memolocked_task`, with
    ``@app.task(base=MemoLockTask, memolock={"ttl": 5})``, or as the base of a class with `memolock` and `run`.

    Attributes:
        memolock: the options of this task; see `Options`.
    """

    abstract = True
    Request = "celery_memolock.engines.celery_worker:FlightRequest"
    memolock: ClassVar[Mapping[str, Any] | None] = None

    _memo: Memo[P, R] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("memolock") is not None:
            Options.build(cls.__dict__["memolock"])

    @property
    def memo(self) -> Memo[P, R]:
        """What the caller methods work on, made at the first use.

        Raises:
            OptionError: an option is missing or makes no sense.
        """
        if self._memo is None:
            task: Any = self
            if self.memolock is None:
                raise OptionError(f"task {self.name!r} has no memolock options; give it memolock={{'ttl': seconds}}")
            options = Options.build(self.memolock, _defaults(task.app))
            run: Any = self.run
            bound = inspect.ismethod(run)
            check = head_from_fun(run.__func__ if bound else run, bound=bound)  # fails as the call itself would
            maker = KeyMaker(self.name, inspect.signature(run), options, check)
            self._memo = Memo(self.name, _CeleryEngine(self), options, maker, Codec(self.name, options))
        return self._memo

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task: as a flight if its message carries a ticket, else as any Celery task."""
        request: Any = self.request
        if request.called_directly or getattr(request, "memolock_entered", False):
            return super().__call__(*args, **kwargs)
        # A plain call of this task from inside its own run comes by here too, and must not be the flight again.
        request.memolock_entered = True
        ticket = ticket_in(request.headers)
        if ticket is None:
            return self.run(*args, **kwargs)
        return _Flight(self, ticket).fly(args, kwargs)

    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: Any = None,
        throw: bool = True,
        eta: Any = None,
        countdown: Any = None,
        max_retries: Any = None,
        **options: Any,
    ) -> Any:
        """Retry the task as Celery does; a flight goes on through all its retries, and its waiters keep waiting."""
        flight: _Flight | None = getattr(self.request, "memolock_flight", None)
        limit = self.max_retries if max_retries is None else max_retries
        if flight is not None and (limit is None or self.request.retries < limit):
            delay = self.default_retry_delay if countdown is None else countdown
            flight.requeue(self.request.retries + 1, _until(eta) if eta else float(delay or 0))
        return super().retry(args, kwargs, exc, throw, eta, countdown, max_retries, **options)


class _Flight:
    """One message of one flight in a worker."""

    def __init__(self, task: MemoLockTask[Any, Any], ticket: Ticket) -> None:
        self._task = task
        self._ticket = ticket
        self._engine = _CeleryEngine(task)
        memo = task.memo
        # A web process of another version may know other options.
        overrides = {name: value for name, value in ticket.overrides.items() if name in CALL_OPTIONS}
        self._call = Call(task.name, ticket.keys, memo.options.override(overrides), memo.codec)
        self.run: Run | None = None
        self._goes_on = False
        self._left_by: BaseException | None = None

    def fly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Claim, run and settle. Raises what the run raised, or `Ignore` where there is nothing to run."""
        request: Any = self._task.request
        outcome: Returned | Raised | GoesOn | None = None

        def body(run: Run) -> Returned | Raised | GoesOn:
            nonlocal outcome
            self.run = run
            request.memolock_flight = self
            token = computing.set((*self._ticket.chain, self._ticket.keys.entry))
            try:
                outcome = self._outcome(args, kwargs)
            finally:
                computing.reset(token)
                request.memolock_flight = None
            return outcome

        holder = holder_of(request.hostname, os.getppid(), os.getpid())
        redelivered = bool((request.delivery_info or {}).get("redelivered"))
        work = compute(self._call, self._ticket, holder, request.retries, redelivered, time.monotonic)
        try:
            done = drive(work, Driver(self._engine, body=body))
        except StoreUnavailable as error:  # before the run: what comes after it is in what `compute` returns
            logger.warning("memolock puts the message of key %s back: %s", self._call.keys.tag, error)
            self._send_again(args, kwargs, _PUT_BACK)
            raise Ignore from None
        if isinstance(done, Skip):
            logger.info("memolock skips a message of key %s: %s", self._call.keys.tag, done.reason)
            raise Ignore
        if isinstance(done, Defer):
            logger.info("memolock defers a message of key %s for %.1f s", self._call.keys.tag, done.delay)
            self._send_again(args, kwargs, done.delay)
            raise Ignore
        if done.answer == "AGAIN":
            self._refresh(args, kwargs)
        if self._left_by is not None:
            raise self._left_by
        if done.answer is None:
            logger.warning("memolock lost the value of key %s: %s", self._call.keys.tag, done.refused)
        elif done.refused is not None:
            raise done.refused
        assert isinstance(outcome, Returned)
        return outcome.value

    def requeue(self, retries: int, delay: float) -> None:
        """Put the flight back into the queue, before its message is sent again.

        Raises:
            Ignore: an invalidation or a take-over made this flight worthless, and a retry would be in vain.
        """
        assert self.run is not None
        self._goes_on = True
        lease = delay + self._call.options.queue_timeout
        try:
            answer = self._engine.store.run(Requeue(self._ticket.keys, self.run, retries, lease))
        except StoreUnavailable as error:
            # The message's higher count of retries shows the server that the earlier attempt is over.
            logger.warning("memolock could not requeue key %s: %s", self._call.keys.tag, error)
        else:
            if answer != "OK":
                raise Ignore(f"memolock does not retry a flight that is {answer.lower()}")

    def _outcome(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Returned | Raised | GoesOn:
        try:
            return Returned(self._task.run(*args, **kwargs))
        except (Retry, Ignore, Reject) as left:
            self._left_by = left
            comes_back = isinstance(left, Reject) and vars(left)["requeue"] and self._task.acks_late
            if comes_back and not self._goes_on:
                self.requeue(self._task.request.retries, 0.0)
            elif isinstance(left, Reject) or not self._goes_on:
                return Raised(FlightFailed(self._without_value(left)))
            return GoesOn()
        except Exception as error:
            self._left_by = error
            return Raised(error)

    def _without_value(self, left: BaseException) -> str:
        text = f"task {self._task.name!r} ended without a value: {type(left).__name__}: {left}"
        if isinstance(left, Reject) and vars(left)["requeue"] and not self._task.acks_late:
            text += " (a message that was acknowledged early cannot be requeued: set acks_late=True)"
        return text

    def _send_again(self, args: tuple[Any, ...], kwargs: dict[str, Any], delay: float) -> None:
        request: Any = self._task.request
        if not request.is_eager:  # else there is no message: a waiting caller takes over when the lease has passed
            task: Any = self._task
            task.signature_from_request(request, args, kwargs, countdown=delay, retries=request.retries).apply_async()

    def _refresh(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            memo = self._task.memo.override({"nested": "dispatch"})
            memo.run(memo.refresh(args, kwargs))
        except MemoLockError as error:
            logger.warning("memolock could not start the refresh that was asked for: %s", error)


class _CeleryEngine:
    """Sends flights as messages of one task, and runs them here where there is no worker to wait for."""

    def __init__(self, task: MemoLockTask[Any, Any]) -> None:
        self._task: Any = task

    @property
    def store(self) -> Store:
        """The server that the task's app is configured with."""
        return store_of(self._task.app)

    @property
    def eager(self) -> bool:
        """Celery's `task_always_eager`."""
        return bool(self._task.app.conf.task_always_eager)

    @property
    def in_worker(self) -> bool:
        """Whether a Celery task is running in this thread."""
        return _state.get_current_worker_task() is not None

    def send(self, ticket: Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float) -> None:
        """Publish the flight's message; see `Engine.send`."""
        task = self._task

        def publish() -> None:
            # Nobody asks for this result by its task id, so it needs no place in a result backend.
            task.apply_async(args, dict(kwargs), headers=_write_ticket(ticket), ignore_result=True)

        try:
            _within(timeout, publish)
        except (KombuEncodeError, TypeError) as error:
            raise self._unsendable(args, kwargs, error) from error
        except _TooSlow as error:
            raise DispatchError(f"the broker at {self._broker()} {error}") from None
        except Exception as error:
            raise DispatchError(
                f"the message of task {task.name!r} could not be sent to {self._broker()}: {error}"
            ) from error

    def run_here(self, ticket: Ticket | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a flight, or without a ticket the bare task, in this thread; see `Engine.run_here`."""
        if ticket is None:
            return self._task.apply(args, dict(kwargs)).get(disable_sync_subtasks=False)
        return self._task.apply(args, dict(kwargs), headers=_write_ticket(ticket), throw=False)

    def _broker(self) -> str:
        return str(self._task.app.connection_for_write().as_uri())

    def _unsendable(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> ArgumentError:
        serializer = self._task.serializer or self._task.app.conf.task_serializer
        bound = inspect.signature(self._task.run).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            try:
                serialization.dumps(value, serializer=serializer)
            except Exception as why:
                return ArgumentError(
                    f"argument {name!r} of task {self._task.name!r}, a {type(value).__qualname__}, cannot be sent "
                    f"with Celery's serializer {serializer!r}: {why}"
                )
        return ArgumentError(f"the arguments of task {self._task.name!r} cannot be sent: {error}")


# ---- the ticket in the message's headers -----------------------------------------------------------------------


def _write_ticket(ticket: Ticket) -> dict[str, Any]:
    return {
        _HEADER: {
            "entry": ticket.keys.entry,
            "fence": ticket.fence,
            "chain": list(ticket.chain),
            "options": {
                name: value.total_seconds() if isinstance(value, timedelta) else value
                for name, value in ticket.overrides.items()
            },
        }
    }


def ticket_in(headers: Mapping[str, Any] | None) -> Ticket | None:
    """Return the ticket in a message's headers; None if it is no flight's."""
    header = (headers or {}).get(_HEADER)
    if header is None:
        return None
    return Ticket(Keys(header["entry"]), header["fence"], tuple(header["chain"]), header["options"])


def holder_of(hostname: str, main: int, child: int) -> str:
    """Name the process that runs a flight: worker, main process, pool process."""
    return f"{hostname}/{main}/{child}"


def _until(eta: datetime) -> float:
    now = datetime.now(eta.tzinfo) if eta.tzinfo else datetime.now(timezone.utc).replace(tzinfo=None)
    return max(0.0, (eta - now).total_seconds())


# ---- sending within a time limit -------------------------------------------------------------------------------


class _TooSlow(Exception):
    pass


_stuck: set[threading.Thread] = set()


def _within(timeout: float, action: Callable[[], None]) -> None:
    """Run an action in a thread of its own, and give it up after a time: a frozen broker blocks for over 40 s.

    Threads that are given up end with their socket's time-out; there are never more than a few.
    """
    _stuck.difference_update([thread for thread in _stuck if not thread.is_alive()])
    if len(_stuck) >= _MOST_STUCK:
        raise _TooSlow(f"still blocks {len(_stuck)} earlier messages")
    failure: list[BaseException] = []
    done = threading.Event()
    context = copy_context()

    def act() -> None:
        try:
            context.run(action)
        except BaseException as error:  # it is raised in the thread that waits
            failure.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=act, name="memolock-send", daemon=True)
    thread.start()
    if not done.wait(timeout):
        _stuck.add(thread)
        raise _TooSlow(f"did not take a message within {timeout:g} s")
    if failure:
        raise failure[0]


# ---- apps and their servers ------------------------------------------------------------------------------------

_stores: weakref.WeakKeyDictionary[Any, Store] = weakref.WeakKeyDictionary()
_stores_lock = threading.Lock()


def _renew_lock() -> None:
    global _stores_lock
    _stores_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def store_of(app: Any) -> Store:
    """Return the server of an app, made at the first use.

    Raises:
        ConfigurationError: none is named, or its URL cannot be used.
    """
    store = _stores.get(app)
    if store is None:
        with _stores_lock:
            store = _stores.get(app)
            if store is None:
                store = _stores[app] = _make_store(app)
                # Not at exit: there the threads are daemons, and nothing is worth waiting for.
                weakref.finalize(app, store.close).atexit = False
    return store


def _make_store(app: Any) -> Store:
    conf = app.conf
    prefix = conf.get("memolock_prefix") or "memolock"
    given = conf.get("memolock_redis_url") or os.environ.get("MEMOLOCK_REDIS_URL")
    if isinstance(given, redis.Redis):
        return Store(given, prefix)
    for url in (given, conf.broker_url, conf.result_backend):
        first = url[0] if isinstance(url, list | tuple) and url else url
        if isinstance(first, str) and (given or first.startswith(("redis://", "rediss://", "redis+socket://"))):
            return Store.from_url(first, prefix)
    raise ConfigurationError(
        f"memolock has no Redis for {app!r}: set app.conf.memolock_redis_url (a URL or a redis.Redis) or the "
        f"environment variable MEMOLOCK_REDIS_URL, or use Redis as broker or result backend"
    )


def _defaults(app: Any) -> dict[str, Any]:
    """The app's own defaults: whatever its configuration names ``memolock_<option>``."""
    found: dict[str, Any] = {}
    conf = app.conf
    start = f"{conf.prefix or ''}memolock_".lower()
    for key in conf:
        name = str(key).lower().removeprefix(start)
        if not str(key).lower().startswith(start) or name == "redis_url":
            continue
        if name not in _OPTION_NAMES or name in ("ttl", "key", "ignore"):
            raise OptionError(f"{key} in the Celery configuration is no default that memolock knows")
        found[name] = conf.get(f"memolock_{name}")
    return found


def _the_app() -> Any:
    """Return the one app of this process, from whatever thread.

    Celery's own `current_app` is kept per thread; a thread that made no app gets a nameless one without a broker.
    """
    default = _state.default_app
    if isinstance(default, celery.Celery) and not is_fallback(default):
        return default
    apps = [app for app in list(_state._get_active_apps()) if not is_fallback(app)]
    if len(apps) == 1:
        return apps[0]
    if not apps:
        raise ConfigurationError("memolock found no Celery app: create one, as in app = Celery('shop', broker=...)")
    raise ConfigurationError(
        f"this process has {len(apps)} Celery apps, and memolock cannot tell which to use: name it, as in "
        f"@memolocked_task(app=app, ...), or call app.set_default() on the one that is meant"
    )


class _Finder:
    """Finds a shared task in the one app of this process, anew only when there are other apps than before."""

    def __init__(self, name: str | None, function: Callable[..., Any]) -> None:
        self._name = name
        self._function = function
        self._found: tuple[Any, int, weakref.ref[Any]] | None = None

    def __call__(self) -> Any:
        apps = _state._get_active_apps()
        if self._found is not None:
            default, count, task = self._found
            known = task()
            if known is not None and default is _state.default_app and count == len(apps):
                return known
        app = _the_app()
        found = app.tasks[self._name or app.gen_task_name(self._function.__name__, self._function.__module__)]
        self._found = (_state.default_app, len(apps), weakref.ref(found))
        return found


def is_fallback(app: Any) -> bool:
    """Whether this is the nameless app that Celery makes when nobody named one."""
    return app.main == "default" and not app.set_as_current


# ---- the decorator ---------------------------------------------------------------------------------------------

#: What Celery takes beside the attributes of its Task class.
_CELERY_OPTIONS = frozenset(
    [
        "name",
        "base",
        "bind",
        "shared",
        "filter",
        "pydantic",
        "pydantic_strict",
        "pydantic_context",
        "pydantic_dump_kwargs",
        "autoretry_for",
        "dont_autoretry_for",
        "retry_kwargs",
        "retry_backoff",
        "retry_backoff_max",
        "retry_jitter",
        "queue",
        "routing_key",
        "exchange",
        "delivery_mode",
        "immediate",
        "mandatory",
    ]
)


@overload
def memolocked_task(
    *, ttl: float | timedelta, bind: Literal[True], app: Any = None, **options: Any
) -> Callable[[Callable[Concatenate[Any, P], R]], MemoLockTask[P, R]]: ...


@overload
def memolocked_task(
    *, ttl: float | timedelta, bind: Literal[False] = False, app: Any = None, **options: Any
) -> Callable[[Callable[P, R]], MemoLockTask[P, R]]: ...


def memolocked_task(*, ttl: float | timedelta, app: Any = None, **options: Any) -> Any:
    """Make a Celery task whose callers share one cached value, and one run when it is missing.

    It binds to the app as Celery's `shared_task` does, but from every thread: with one app in the process that is the
    app; with several, name it.

    Args:
        ttl: seconds that a value is served.
        app: the app, where a process has several. Default: the only one, or the one made the default.
        options: all other fields of `Options`, and all options of Celery's ``app.task``. Where both have one of
            that name (`serializer`, `compression`), it is the value's; for the message's own, use
            ``@app.task(base=MemoLockTask, memolock={...})``.

    Raises:
        OptionError: an option is unknown, or has a value that makes no sense; or the function is async.
    """
    ours = {"ttl": ttl, **{name: options.pop(name) for name in list(options) if name in _OPTION_NAMES}}
    base = options.setdefault("base", MemoLockTask)
    for name in options:
        if name not in _CELERY_OPTIONS and not hasattr(base, name):
            raise OptionError(
                f"unknown option {name!r}: neither memolock nor Celery's tasks have it (an attribute of your own "
                f"goes on a base class). memolock's are: {', '.join(sorted(_OPTION_NAMES))}"
            )
    checked = Options.build(ours)

    def decorate(function: Callable[..., Any]) -> Any:
        if inspect.iscoroutinefunction(function):
            raise OptionError(f"{function.__qualname__} is an async function, which Celery's workers do not run")
        signature = inspect.signature(function)
        if options.get("bind"):
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        KeyMaker(function.__name__, signature, checked)
        if app is not None:
            # Celery would register the task with all other apps of the process as well.
            return app.task(memolock=ours, **{"shared": False, **options})(function)
        share: Any = celery.shared_task
        share(memolock=ours, **options)(function)

        find = _Finder(options.get("name"), function)
        return Proxy(find, name=function.__name__, __doc__=function.__doc__)

    return decorate


# ---- what only the worker's main process learns ----------------------------------------------------------------


def _on_unknown(sender: Any, message: Any, name: str, **_: Any) -> None:
    """A worker does not know the task: all who wait for the flight hear so at once."""
    ticket = ticket_in(message.headers)
    if ticket is None:
        return
    error = FlightFailed(f"task {name!r} is not registered on worker {sender.hostname}: does it import the module?")
    try:
        store_of(sender.app).run(Disown(ticket.keys, ticket.fence, "", pack_error(error), 30.0))
    except MemoLockError as failed:
        logger.warning("memolock could not tell that task %s is unknown: %s", name, failed)


signals.task_unknown.connect(_on_unknown, weak=False, dispatch_uid="celery_memolock.unknown")
