"""The Celery engine: a flight is a message of an ordinary Celery task, with a ticket in its headers."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Literal, TypeVar, overload

import celery
from celery import signals
from celery.exceptions import Ignore, Reject, Retry
from celery.local import Proxy
from celery.utils.functional import head_from_fun
from kombu import serialization
from kombu.exceptions import EncodeError as KombuEncodeError
from typing_extensions import ParamSpec

from ..aio import InThreads
from ..bounded import TooSlow, within
from ..codec import Codec, pack_error
from ..effects import Defer, Disown, Finished, GoesOn, Raised, Returned, Ticket
from ..errors import (
    ArgumentError,
    ConfigurationError,
    DispatchError,
    FlightFailed,
    MemoLockError,
    OptionError,
    StoreUnavailable,
)
from ..flight import Flight, grounded
from ..keys import KeyMaker
from ..memo import CallerMethods, Memo
from ..options import OF_A_TASK, Options
from ..shape import Shape
from ..store import Store, Stores, client_of
from ..work import Outcome, Work, holder_of, read_ticket, unsendable, write_ticket

__all__ = ["MemoLockTask", "memolocked_task"]

logger = logging.getLogger("celery_memolock")
P = ParamSpec("P")
R = TypeVar("R")
Ttl = float | timedelta | Callable[[Any], float]

#: Which apps there are, and which task runs: the stubs know half of it.
_state: Any = importlib.import_module("celery._state")

_HEADER = "memolock"
_REFRESH = {"refresh": True}
_REFRESHING: dict[str, Any] = {_HEADER: _REFRESH}
_OPTION_NAMES = frozenset(f.name for f in fields(Options))

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
            checked = Options.build(cls.__dict__["memolock"])
            run: Any = cls.run
            if run is not celery.Task.run:
                static = isinstance(inspect.getattr_static(cls, "run"), staticmethod)
                _check(str(cls.name or cls.__name__), run, checked, bound=not static)

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
            shape = Shape.of(self.name, run) if options.typed else None
            self._memo = Memo(self.name, _CeleryEngine(self), options, maker, Codec(self.name, options, shape))
        return self._memo

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task: as a flight if its message carries a ticket, else as any Celery task."""
        request: Any = self.request
        if request.called_directly or getattr(request, "memolock_entered", False):
            with grounded():
                return super().__call__(*args, **kwargs)
        # A plain call of this task from inside its own run comes by here too, and must not be the flight again.
        request.memolock_entered = True
        if (request.headers or {}).get(_HEADER) == _REFRESH:
            memo = self.memo.override({"nested": "inline"})  # what this message does is the run itself
            memo.run(memo.refresh(args, kwargs))
            return None
        ticket = ticket_in(request.headers)
        if ticket is None:
            with grounded():
                return self.run(*args, **kwargs)
        return _Flight(self, ticket).fly(args, kwargs)

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Tell Celery beat of the values that must never be missing."""
        super().on_bound(app)
        if cls.memolock is None or not cls.memolock.get("refresh_every"):
            return
        options = Options.build(cls.memolock, _defaults(app))
        for args in options.refresh_calls:
            signature = app.signature(cls.name, args=args, headers=_REFRESHING, ignore_result=True)
            app.add_periodic_task(options.refresh_every, signature, name=f"memolock {cls.name}{args!r}")

    def refresher(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Return a Celery signature that does what `refresh` does, to be scheduled, delayed or put into a canvas.

        The worker that runs it computes the value itself, unless a flight of the key is under way.
        """
        return self.signature(args, kwargs, headers=_REFRESHING, ignore_result=True)

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
        self._work: Work | None = None
        self._goes_on = False
        self._left_by: BaseException | None = None

    def fly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Claim, run and settle. Raises what the run raised, or `Ignore` where there is nothing to run."""
        request: Any = self._task.request
        holder = holder_of(request.hostname, os.getppid(), os.getpid())
        redelivered = bool((request.delivery_info or {}).get("redelivered"))
        engine = _CeleryEngine(self._task)
        work = Work(engine, self._task.memo, self._ticket, args, kwargs, holder, request.retries, redelivered)
        self._work = work

        def body(flight: Flight) -> Outcome:
            request.memolock_flight = self
            try:
                return self._outcome(flight, args, kwargs)
            finally:
                request.memolock_flight = None

        try:
            done = work.do(body)
        except StoreUnavailable as error:  # before the run: what comes after it is in what `do` returns
            logger.warning("memolock puts the message of key %s back: %s", self._ticket.keys.tag, error)
            self._send_again(args, kwargs, _PUT_BACK)
            raise Ignore from None
        if isinstance(done, Defer):
            self._send_again(args, kwargs, done.delay)
        if not isinstance(done, Finished):
            raise Ignore
        if self._left_by is not None:
            raise self._left_by
        if done.answer is not None and done.refused is not None:
            raise done.refused
        assert isinstance(work.outcome, Returned)
        return work.outcome.value

    def requeue(self, retries: int, delay: float) -> None:
        """Put the flight back into the queue, before its message is sent again.

        Raises:
            Ignore: an invalidation or a take-over made this flight worthless, and a retry would be in vain.
        """
        assert self._work is not None
        self._goes_on = True
        if not self._work.requeue(retries, delay):
            raise Ignore("memolock does not retry a flight that an invalidation or another flight made worthless")

    def _outcome(self, flight: Flight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        try:
            return flight.outcome(self._task.run(*args, **kwargs))
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


class _CeleryEngine(InThreads):
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

    @property
    def ends_with_job(self) -> bool:
        """A process of Celery's lives on."""
        return False

    @property
    def travels(self) -> bool:
        """Flights are messages."""
        return True

    @property
    def holder(self) -> str:
        """None: an inline run is a Celery task as well, which claims for itself."""
        return ""

    def send(self, ticket: Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float) -> None:
        """Publish the flight's message; see `Engine.send`."""
        task = self._task

        def publish() -> None:
            # Nobody asks for this result by its task id, so it needs no place in a result backend.
            task.apply_async(args, dict(kwargs), headers={_HEADER: write_ticket(ticket)}, ignore_result=True)

        try:
            within(timeout, publish)
        except (KombuEncodeError, TypeError) as error:
            raise self._unsendable(args, kwargs, error) from error
        except TooSlow as error:
            raise DispatchError(f"the broker at {self._broker()} {error}") from None
        except Exception as error:
            raise DispatchError(
                f"the message of task {task.name!r} could not be sent to {self._broker()}: {error}"
            ) from error

    def run_here(self, ticket: Ticket | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a flight, or without a ticket the bare task, in this thread; see `Engine.run_here`."""
        if ticket is None:
            return self._task.apply(args, dict(kwargs)).get(disable_sync_subtasks=False)
        self._task.apply(args, dict(kwargs), headers={_HEADER: write_ticket(ticket)}, throw=False)
        return None

    def _broker(self) -> str:
        return str(self._task.app.connection_for_write().as_uri())

    def _unsendable(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> ArgumentError:
        name = self._task.serializer or self._task.app.conf.task_serializer
        whose, call = f"task {self._task.name!r}", (self._task.run, args, kwargs)
        found = unsendable(
            whose, call, f"Celery's serializer {name!r}", lambda value: serialization.dumps(value, serializer=name)
        )
        return found or ArgumentError(f"the arguments of {whose} cannot be sent: {error}")


# ---- the ticket in the message's headers -----------------------------------------------------------------------


def ticket_in(headers: Mapping[str, Any] | None) -> Ticket | None:
    """Return the ticket in a message's headers; None if it is no flight's."""
    header = (headers or {}).get(_HEADER)
    if header is None or header == _REFRESH:
        return None
    return read_ticket(header)


def _until(eta: datetime) -> float:
    now = datetime.now(eta.tzinfo) if eta.tzinfo else datetime.now(timezone.utc).replace(tzinfo=None)
    return max(0.0, (eta - now).total_seconds())


# ---- apps and their servers ------------------------------------------------------------------------------------

_stores = Stores()


def store_of(app: Any) -> Store:
    """Return the server of an app, made at the first use.

    Raises:
        ConfigurationError: none is named, or its URL cannot be used.
    """
    return _stores.of(app, _make_store)


def _make_store(app: Any) -> Store:
    conf = app.conf
    prefix = conf.get("memolock_prefix") or "memolock"
    for name, given in (
        ("memolock_redis_url", conf.get("memolock_redis_url")),
        ("MEMOLOCK_REDIS_URL", os.environ.get("MEMOLOCK_REDIS_URL")),
    ):
        if given:
            return Store(client_of(_first(given), name), prefix)
    for name in ("broker_url", "result_backend"):
        url = _first(conf.get(name))
        if isinstance(url, str) and url.startswith(("redis://", "rediss://", "redis+socket://")):
            return Store(client_of(url, name), prefix)
    raise ConfigurationError(
        f"memolock has no Redis for {app!r}: set app.conf.memolock_redis_url (a URL or a redis.Redis) or the "
        f"environment variable MEMOLOCK_REDIS_URL, or use Redis as broker or result backend"
    )


def _first(url: Any) -> Any:
    return url[0] if isinstance(url, list | tuple) and url else url


def _defaults(app: Any) -> dict[str, Any]:
    """The app's own defaults: whatever its configuration names ``memolock_<option>``."""
    found: dict[str, Any] = {}
    conf = app.conf
    start = f"{conf.prefix or ''}memolock_".lower()
    for key in conf:
        name = str(key).lower().removeprefix(start)
        if not str(key).lower().startswith(start) or name == "redis_url":
            continue
        if name not in _OPTION_NAMES or name in OF_A_TASK:
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
    *, ttl: Ttl, bind: Literal[True], app: Any = None, **options: Any
) -> Callable[[Callable[Concatenate[Any, P], R]], MemoLockTask[P, R]]: ...


@overload
def memolocked_task(
    *, ttl: Ttl, bind: Literal[False] = False, app: Any = None, **options: Any
) -> Callable[[Callable[P, R]], MemoLockTask[P, R]]: ...


def memolocked_task(*, ttl: Ttl, app: Any = None, **options: Any) -> Any:
    """Make a Celery task whose callers share one cached value, and one run when it is missing.

    It binds to the app as Celery's `shared_task` does, but from every thread: with one app in the process that is the
    app; with several, name it.

    Args:
        ttl: seconds that a value is fresh, or a function that is given the value and returns that.
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
        _check(function.__name__, function, checked, bound=bool(options.get("bind")))
        if app is not None:
            # Celery would register the task with all other apps of the process as well.
            return app.task(memolock=ours, **{"shared": False, **options})(function)
        share: Any = celery.shared_task
        share(memolock=ours, **options)(function)

        find = _Finder(options.get("name"), function)
        return Proxy(find, name=function.__name__, __doc__=function.__doc__)

    return decorate


def _check(name: str, run: Callable[..., Any], options: Options, *, bound: bool) -> None:
    """Raise `OptionError` where a task is defined for what its options and its function do not agree on."""
    signature = inspect.signature(run)
    if bound:
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    KeyMaker(name, signature, options)
    if options.typed:
        Shape.check(name, run)


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
