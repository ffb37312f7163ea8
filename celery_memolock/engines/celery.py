"""The Celery engine: a task whose flights are messages of its own, with a ticket in their headers."""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Final, Literal, TypeVar, overload

import celery
from celery.app.autoretry import add_autoretry_behaviour
from celery.local import Proxy
from celery.utils.functional import head_from_fun
from typing_extensions import ParamSpec, Self

from ..codec import Codec
from ..errors import ConfigurationError, OptionError
from ..keys import KeyMaker, check_named
from ..memo import CallerMethods, Memo
from ..options import Options, guess
from ..shape import Shape
from .celery_beat import REFRESHING, schedule
from .celery_flight import CeleryEngine, FlightMessage, is_run_here, message_of, until, with_flights
from .celery_settings import defaults_of

__all__ = ["MemoLockTask", "memolocked_task"]

P = ParamSpec("P")
R = TypeVar("R")
Ttl = float | timedelta | Callable[[Any], float]

#: Which apps there are: the stubs know half of it.
_state: Any = importlib.import_module("celery._state")

_OPTION_NAMES = frozenset(f.name for f in fields(Options))

#: What Celery makes of a message in the worker's main process, by name, as only workers import it; and its own.
_REQUEST: Final = "celery_memolock.engines.celery_worker:FlightRequest"
_CELERYS_REQUEST: Final = celery.Task.Request

_RETRY: Final = inspect.signature(celery.Task.retry)

if TYPE_CHECKING:

    class _Task(celery.Task[P, R]):
        pass
else:

    class _Task(celery.Task):
        def __class_getitem__(cls, _: Any) -> type:
            return cls


class MemoLockTask(CallerMethods[P, R], _Task[P, R]):
    """A Celery task whose value can be cached and whose callers coalesce.

    It stays an ordinary task: `delay`, canvas, retries and links work as always and touch no cache. The methods of
    `CallerMethods` are what is new. Use it with `memolocked_task`, with
    ``@app.task(base=MemoLockTask, memolock={"ttl": 5})``, or as the base of a class with `memolock` and `run`.

    What Celery makes of a function derives from the app's own task class, too. A class of yours may stand before this
    one or behind it: its `__call__`, `before_start` and the other hooks run as for any task.

    Attributes:
        memolock: the options of this task; see `Options`.
    """

    abstract = True
    Request = _REQUEST
    memolock: ClassVar[Mapping[str, Any] | None] = None

    # Named so that no attribute of a task's own meets them.
    __memo: Memo[P, R] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = str(cls.name or cls.__name__)
        if cls.__dict__.get("_decorated"):
            _derive_from_apps_class(name, cls)
        _refuse_names(name, cls)
        theirs = [request for base in cls.__mro__ if (request := vars(base).get("Request")) is not None]
        if own := [request for request in theirs if request not in (_REQUEST, _CELERYS_REQUEST)]:
            from .celery_worker import request_class  # late, as only a class with a Request of its own needs it here

            cls.Request = request_class(own[0])
        if cls.memolock is not None and not vars(cls).keys().isdisjoint(("memolock", "run")):
            checked = Options.build(cls.memolock)
            run, bound = _run_of(cls)
            if run is not celery.Task.run:
                _check(name, run, checked, bound=bound)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Put the flight around what Celery calls of the task, as Celery does for what it adds."""
        task: Any = super().__new__(cls)
        # A retry is the end of one run of a flight, so the flight goes around it. Celery itself would add it later.
        add_autoretry_behaviour(task)
        with_flights(task)
        return task  # type: ignore[no-any-return]

    @property
    def memo(self) -> Memo[P, R]:
        """What the caller methods work on, made at the first use.

        Raises:
            OptionError: an option is missing or makes no sense.
        """
        if self.__memo is None:
            if self.memolock is None:
                raise OptionError(f"task {self.name!r} has no memolock options; give it memolock={{'ttl': seconds}}")
            options = Options.build(self.memolock, defaults_of(self.app))
            run, bound = _run_of(type(self))
            check = head_from_fun(run, bound=bound)  # fails as the call itself would
            maker = KeyMaker(self.name, run, options, check, bound=bound)
            shape = Shape.of(self.name, run) if options.typed else None
            self.__memo = Memo(self.name, CeleryEngine(self), options, maker, Codec(self.name, options, shape))
        return self.__memo

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Tell Celery beat of the values that must never be missing."""
        super().on_bound(app)
        if cls.memolock is None or not cls.memolock.get("refresh_every"):
            return
        options = Options.build(cls.memolock, defaults_of(app))
        schedule(app, str(cls.name), options)

    def refresher(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Return a Celery signature that does what `refresh` does, to be scheduled, delayed or put into a canvas.

        The worker that runs it computes the value itself, unless a flight of the key is under way.
        """
        return self.signature(args, kwargs, headers=REFRESHING, ignore_result=True)

    def retry(self, *args: Any, **options: Any) -> Any:
        """Retry the task as Celery does; a flight goes on through all its retries, and its waiters keep waiting."""
        flight: FlightMessage | None = getattr(message_of(self), "memolock_flight", None)
        if flight is not None and flight.running:
            given: dict[str, Any] = _RETRY.bind(self, *args, **options).arguments
            limit = self.max_retries if given.get("max_retries") is None else given["max_retries"]
            if limit is None or self.request.retries < limit:
                countdown, eta = given.get("countdown"), given.get("eta")
                delay = self.default_retry_delay if countdown is None else countdown
                flight.requeue(self.request.retries + 1, until(eta) if eta else float(delay or 0))
        return super().retry(*args, **options)

    def signature_from_request(self, request: Any = None, *args: Any, **options: Any) -> Any:
        """Return what Celery sends for a retry; in a caller's own run it raises as little as the first attempt."""
        signature = super().signature_from_request(request, *args, **options)
        if is_run_here(request):
            signature.options["throw"] = False
        return signature


def _derive_from_apps_class(name: str, cls: type[Any]) -> None:
    """Give what Celery makes of a function the app's own task class, which Celery leaves out where a base is named.

    Raises:
        OptionError: the classes do not go together.
    """
    theirs = cls.__dict__["app"].Task
    if issubclass(cls, theirs):
        return
    try:
        cls.__bases__ = (*(base for base in cls.__bases__ if not issubclass(theirs, base)), theirs)
    except TypeError as error:
        raise OptionError(f"task {name!r}: its base does not go with the task class of its app: {error}") from error


# ---- which app ---------------------------------------------------------------------------------------------------


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


def _refuse_names(name: str, cls: type[Any]) -> None:
    """Raise `OptionError` where another class of tasks has an attribute of our name: one would hide the other.

    A class that is no task's means to add to ours.
    """
    for base in cls.__mro__:
        if issubclass(base, celery.Task) and not issubclass(base, MemoLockTask) and base not in MemoLockTask.__mro__:
            for both in sorted(_OUR_NAMES & vars(base).keys()):
                raise OptionError(
                    f"task {name!r}: its base {base.__qualname__} has an attribute {both!r}, as memolock's tasks have: "
                    f"give it another name"
                )


#: The public names of a `MemoLockTask` that Celery's tasks do not have.
_OUR_NAMES: Final = {name for name in dir(MemoLockTask) if not name.startswith("_")} - {*dir(celery.Task)}

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


def memolocked_task(*misplaced: Any, ttl: Any = None, app: Any = None, **options: Any) -> Any:
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
        OptionError: an option is unknown or has a value that makes no sense; the function is async, or a task already.
    """
    how = "write @memolocked_task(ttl=5), with all options by name: for how long may a value be served?"
    if misplaced:
        raise OptionError(how)
    ours = {"ttl": ttl, **{name: options.pop(name) for name in list(options) if name in _OPTION_NAMES}}
    base = options["base"] = _base(options.get("base"))
    for name in options:
        if name not in _CELERY_OPTIONS and (name in _OUR_NAMES or not hasattr(base, name)):
            meant = f" ({near})" if (near := guess(name, _OPTION_NAMES | _CELERY_OPTIONS)) else ""
            raise OptionError(
                f"unknown option {name!r}{meant}: neither memolock nor Celery's tasks take it (an attribute of your "
                f"own goes on a base class). memolock's are: {', '.join(sorted(_OPTION_NAMES))}"
            )
    if ttl is None:
        raise OptionError(how)
    checked = Options.build(ours)

    def decorate(function: Callable[..., Any]) -> Any:
        if issubclass(type(function), Proxy) or isinstance(function, celery.Task):
            raise OptionError(
                "what stands below @memolocked_task is a Celery task already: use @memolocked_task alone, or "
                "@app.task(base=MemoLockTask, memolock={...})"
            )
        check_named(function, "memolocked_task")
        _check(function.__name__, function, checked, bound=bool(options.get("bind")))
        if app is not None:
            # Celery would register the task with all other apps of the process as well.
            return app.task(memolock=ours, **{"shared": False, **options})(function)
        share: Any = celery.shared_task
        share(memolock=ours, **options)(function)

        find = _Finder(options.get("name"), function)
        return Proxy(find, name=function.__name__, __doc__=function.__doc__)

    return decorate


def _base(given: Any) -> type[Any]:
    if given is None:
        return MemoLockTask
    if not isinstance(given, type):
        raise OptionError(f"base={given!r} of @memolocked_task is no class")
    if issubclass(given, MemoLockTask):
        return given
    return type(given.__name__, (MemoLockTask, given), {"abstract": True, "__module__": given.__module__})


def _run_of(task: type[celery.Task[Any, Any]]) -> tuple[Callable[..., Any], bool]:
    """Return a task's own function, and whether it takes the task first.

    That of the class: each process may have wrapped the one of the task itself in its own way, as Sentry does in
    workers, and all are to make the same keys.
    """
    run: Any = task.run
    return run, not isinstance(inspect.getattr_static(task, "run"), staticmethod | classmethod)


def _check(name: str, run: Callable[..., Any], options: Options, *, bound: bool) -> None:
    """Raise `OptionError` where a task is defined for what its options and its function do not agree on."""
    if inspect.iscoroutinefunction(run):
        raise OptionError(f"{run.__qualname__} is an async function, which Celery's workers do not run")
    KeyMaker(name, run, options, bound=bound)
    if options.typed:
        Shape.check(name, run)
