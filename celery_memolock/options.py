"""The options of a memolocked task: one frozen record, checked when it is made."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import random
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import timedelta
from typing import Any, Literal

from .errors import OptionError, described

__all__ = [
    "CALLER_OPTIONS",
    "OF_A_TASK",
    "Options",
    "Progress",
    "call_options",
    "guess",
    "is_async",
    "refuse_async",
    "seconds_of",
]

Seconds = float | timedelta


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        fraction: of the whole, from 0 to 1.
        message: what the task says to it, or "".
    """

    fraction: float
    message: str = ""

    def encode(self) -> bytes:
        """Return it as it travels."""
        return json.dumps([self.fraction, self.message]).encode()

    @classmethod
    def parse(cls, raw: bytes) -> Progress:
        """Read what travelled."""
        fraction, message = json.loads(raw)
        return cls(float(fraction), str(message))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How one task is cached and how its callers wait.

    Every time is in seconds, as a number or a `timedelta`, and is kept as a float. One of more than 100 years, such as
    `timedelta.max`, is taken for 100 years.

    Attributes:
        ttl: how long a value is fresh after it was stored; a function is given the value and returns that, 0 for one
            that is not to be stored. The only option without a default.
        ttl_jitter: up to which part of itself a ttl is shortened, at random, so that values that were stored
            together do not expire together: 0.1 makes 60 seconds 54 to 60. Default 0.
        none_ttl: the ttl of the value None; 0: it is not stored. Default None: as for any other.
        cache_if: a function that is given the value and says whether it is stored; those who wait get it anyhow, and
            an older value that it replaces goes. Default None: each is.
        stale_ttl: for how long after its ttl a value is still returned at once, while one task refreshes it.
            Default 0.
        soft_timeout: how long a caller waits for the fresh value before it takes the stale one. Default None: not at
            all.
        stale_if_error: for how long after its ttl a value is returned when a fresh one cannot be had: the task fails,
            no worker takes it, broker or Redis are away. The refresh is tried again after `error_ttl`, at the least
            after a second. Default 0.
        early_refresh: refresh a value before it expires: a number is the part of its ttl after which the next call has
            it refreshed; "xfetch" draws that moment at random, the earlier the longer its computing took (Vattani,
            Chierichetti, Lowenstein: Optimal Probabilistic Cache Stampede Prevention, 2015). Default None: not.
        beta: of "xfetch": more than 1 refreshes earlier. Default 1.
        tags: names under which `invalidate_tag` finds the task's values: a list, or a function that is given the
            task's arguments and returns them. Default none.
        external: whether the task only hands the work out: what it returns is not the value, and another process, in
            any language, settles the flight by `current_flight.token`. Default False.
        external_timeout: how long that may take, the task's own run included, before another caller may start it anew.
            Default 60.
        refresh_every: for Celery beat: the task's values for `refresh_calls` are computed anew that often, so that they
            are never missing: less than `ttl` and `stale_ttl` together. Default None: not.
        refresh_calls: the arguments of those calls, as tuples: ``[("q1",), ("q2",)]``. Default: one call without any.
        on_progress: for one call: a function that is called, in the waiting caller's thread or loop, with a `Progress`
            whenever the task reports one; what it raises, the call raises. Default None.
        force_refresh: for one call (`with_options`): get a value whose computing starts after the call. Default False.
        wait_timeout: how long a caller waits for the value before `WaitTimeout`. Default 30.
        lease: how long a running task may go without a sign of life before another caller may start it
            anew. It is renewed each third of itself, so a task may run for far longer. Default 10.
        dispatch_lease: how long the winner may take to hand the message to the broker. Default 5.
        queue_timeout: how long a message may wait for a worker before it is taken for lost. Default 300.
        max_run: after this long the lease is renewed no more, so that a task that hangs for ever does not
            keep its key for ever. Default 3600.
        poll_interval: how long a waiting process sleeps at first before it looks by itself, in case a
            notice was lost. Default 1.
        max_poll_interval: what `poll_interval` rises to. Default 5.
        error_ttl: how long new callers of a failed key get the error at once instead of a new run. Callers
            that already wait always get the error. Default 0: the next call runs the task again.
        cache_errors: exceptions of the task that new callers get for so many seconds instead of a new run, as in
            ``{NotFound: 30}``; of several that fit, the first. Default none: `error_ttl` holds for all.
        on_redis_error: what a call does when Redis cannot be reached: "raise" `StoreUnavailable`, or "compute"
            the value in the caller, uncached. Default "raise".
        skip_abandoned: a worker drops a flight that nobody waits for any more and that has not begun to run.
            Default False: it is computed for whoever comes next.
        max_crashes: after this many workers died over one flight it fails for all its callers. Default 2.
        max_overlap: at most so many runs of a key are alive at once, among them those that an
            invalidation made worthless. Default 2.
        local_ttl: how long, at the most, a value is kept in the caller's process, where a hit costs no trip. A
            value that is invalidated or replaced elsewhere is dropped as soon as the server's word of it
            arrives. Default 0: not kept.
        local_max_entries, local_max_bytes: at most so many of the task's values are kept in a process. Default 10,000
            and 64 MiB.
        local_lease: how long kept values are served after the last proof that such word would arrive. Default 1.
        nested: where a miss inside a worker's task is computed: "inline", in that task (no deadlock when
            the pool is full), or "dispatch", by another worker. Default "inline".
        serializer: kombu serializer of the value. Default "json".
        accept: serializers (or content types) that may be decoded. Default: only `serializer`.
        typed: whether values are of the type that the task's function says it returns, such as a pydantic model, a
            dataclass or an attrs class, and come back as such. Default False: plain data.
        compression: "gzip" (for kombu also "zlib"), "bzip2", "lzma", "zstd" (with the extra of that name) or None.
            Default None.
        compress_over: bytes; an encoded value that is shorter is not compressed. Default 0.
        max_value_size: bytes; the cap of an encoded value, before and after compression. Default 16 MiB.
        prefix: the first part of every Redis key. Default "memolock".
        version: part of the key; raise it to abandon the values of older code. Default 1.
        key: None: the key is made of all arguments; a callable takes the task's arguments and returns
            the key as text; a format string such as ``"{user_id}"`` is filled from them. Default None.
        ignore: names of arguments that are no part of the key. Default none.

    Raises:
        OptionError: an option is missing, unknown or has a value that makes no sense.
    """

    ttl: float | Callable[[Any], float] = field()
    wait_timeout: float = 30.0
    lease: float = 10.0
    dispatch_lease: float = 5.0
    queue_timeout: float = 300.0
    max_run: float = 3600.0
    poll_interval: float = 1.0
    max_poll_interval: float = 5.0
    ttl_jitter: float = 0.0
    none_ttl: float | None = None
    cache_if: Callable[[Any], object] | None = None
    stale_ttl: float = 0.0
    soft_timeout: float | None = None
    stale_if_error: float = 0.0
    early_refresh: float | Literal["xfetch"] | None = None
    beta: float = 1.0
    tags: tuple[str, ...] | Callable[..., Iterable[str]] = ()
    external: bool = False
    external_timeout: float = 60.0
    refresh_every: float | None = None
    refresh_calls: tuple[tuple[Any, ...], ...] = ((),)
    on_progress: Callable[[Progress], object] | None = None
    force_refresh: bool = False
    error_ttl: float = 0.0
    cache_errors: Mapping[type[Exception], float] = field(default_factory=dict)
    on_redis_error: Literal["raise", "compute"] = "raise"
    skip_abandoned: bool = False
    max_crashes: int = 2
    max_overlap: int = 2
    local_ttl: float = 0.0
    local_max_entries: int = 10_000
    local_max_bytes: int = 64 * 1024 * 1024
    local_lease: float = 1.0
    nested: Literal["inline", "dispatch"] = "inline"
    serializer: str = "json"
    accept: tuple[str, ...] = ()
    typed: bool = False
    compression: str | None = None
    compress_over: int = 0
    max_value_size: int = 16 * 1024 * 1024
    prefix: str = "memolock"
    version: int = 1
    key: Callable[..., str] | str | None = None
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in _TIMES:
            object.__setattr__(self, name, seconds_of(name, getattr(self, name), zero=name in _MAY_BE_ZERO))
        if not callable(self.ttl):
            object.__setattr__(self, "ttl", seconds_of("ttl", self.ttl, zero=False))
        for name in ("none_ttl", "refresh_every", "soft_timeout"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, seconds_of(name, getattr(self, name), zero=name == "none_ttl"))
        for name in ("accept", "ignore"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in ("cache_if", "key", "on_progress", "tags", "ttl"):
            refuse_async(name, getattr(self, name))
        self._check_freshness()
        for name in ("local_max_bytes", "local_max_entries", "max_crashes", "max_overlap", "max_value_size", "version"):
            _whole(name, getattr(self, name))
        if self.max_poll_interval < self.poll_interval:
            object.__setattr__(self, "max_poll_interval", self.poll_interval)
        for name, choices in (("nested", ("inline", "dispatch")), ("on_redis_error", ("raise", "compute"))):
            if getattr(self, name) not in choices:
                raise OptionError(
                    f"memolock option {name}={getattr(self, name)!r}: must be {' or '.join(map(repr, choices))}"
                )
        for name in ("external", "force_refresh", "skip_abandoned", "typed"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"memolock option {name}={getattr(self, name)!r}: must be True or False")
        if self.compress_over:
            _whole("compress_over", self.compress_over)
        object.__setattr__(self, "cache_errors", _errors(self.cache_errors))
        if not isinstance(self.prefix, str) or not self.prefix or set(self.prefix) & set("{} \n"):
            raise OptionError(f"memolock option prefix={self.prefix!r}: must be text without braces or white space")
        if self.key is not None and not callable(self.key) and not isinstance(self.key, str):
            raise OptionError(f"memolock option key={self.key!r}: must be a callable, a format string or None")
        from .codec import check_formats  # imported here: the codec reads these options

        check_formats(self)

    def _check_freshness(self) -> None:
        if not _is_number(self.ttl_jitter) or not 0 <= self.ttl_jitter < 1:
            raise OptionError(f"memolock option ttl_jitter={self.ttl_jitter!r}: must be a number from 0 to less than 1")
        early = self.early_refresh
        if early is not None and early != "xfetch" and not (_is_number(early) and 0 < float(early) < 1):
            raise OptionError(
                f"memolock option early_refresh={early!r}: must be a number between 0 and 1, 'xfetch' or None"
            )
        if not _is_number(self.beta) or self.beta <= 0:
            raise OptionError(f"memolock option beta={self.beta!r}: must be a number of more than 0")
        for name in ("cache_if", "on_progress"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise OptionError(f"memolock option {name}={getattr(self, name)!r}: must be a function or None")
        if not isinstance(self.refresh_calls, list | tuple) or not all(
            isinstance(call, list | tuple) for call in self.refresh_calls
        ):
            raise OptionError(
                f"memolock option refresh_calls={self.refresh_calls!r}: must be a list of tuples of arguments"
            )
        object.__setattr__(self, "refresh_calls", tuple(map(tuple, self.refresh_calls)))
        if not callable(self.tags):
            object.__setattr__(self, "tags", _names("tags", self.tags))
            if not all(self.tags):
                raise OptionError(f"memolock option tags={self.tags!r}: a tag must be a text that is not empty")

    def _check_together(self, given: Container[str], unknown: Container[str] = ()) -> None:
        """Check that what one layer gives means something in the whole. What other layers gave may lie idle there.

        Args:
            given: the names of what the layer gives.
            unknown: the names of what a layer below may give, but is not known yet.
        """
        for name, (other, text) in _NEEDS.items():
            idle = self.early_refresh != "xfetch" if name == "beta" else not getattr(self, other)
            if idle and name in given and other not in unknown and getattr(self, name) != _DEFAULTS[name]:
                raise OptionError(f"memolock option {name}={getattr(self, name)!r} {text}")
        if "refresh_every" in given and "stale_ttl" not in unknown and self.refresh_every and not callable(self.ttl):
            servable = self.ttl * (1 - self.ttl_jitter) + self.stale_ttl
            if self.refresh_every >= servable:
                raise OptionError(
                    f"memolock option refresh_every={self.refresh_every!r} comes too late for ttl={self.ttl!r}: after "
                    f"{servable:g} s a value is missing until the next; refresh more often, raise ttl, or keep stale "
                    f"values with stale_ttl"
                )
        # What the stored form hangs on lies never idle: who reads takes the plain JSON of the other process for it.
        odd = [
            name
            for name in (*_OF_WHO_HAS_THE_VALUE, *_STORED_FORM)
            if getattr(self, name) != _DEFAULTS[name] and (name in given or name in _STORED_FORM)
        ]
        odd += ["ttl"] * callable(self.ttl)
        if self.external and odd:
            raise OptionError(
                f"memolock option external=True does not go with {', '.join(odd)}: another process settles the flight, "
                f"with plain JSON and a ttl that is a number, and only that process has the value"
            )

    @property
    def keep_stale(self) -> float:
        """How long, in seconds, a value is kept beyond its freshness."""
        return max(self.stale_ttl, self.stale_if_error)

    def ttl_of(self, value: Any, own: float | None = None) -> float:
        """How long, in seconds, a value is fresh; 0: it is not stored.

        Args:
            value: as the task returned it.
            own: what the task itself said. It is for how long, and `cache_if` goes on to say whether at all.

        Raises:
            OptionError: the function `ttl` or `cache_if` failed, or gave something that is no time.
        """
        if self.cache_if is not None and not _asked("cache_if", self.cache_if, value):
            return 0.0
        if own is not None:
            ttl = own
        elif value is None and self.none_ttl is not None:
            ttl = self.none_ttl
        elif callable(self.ttl):
            ttl = seconds_of("ttl", _asked("ttl", self.ttl, value), zero=True)
        else:
            ttl = self.ttl
        return self.jittered(ttl)

    def jittered(self, ttl: float) -> float:
        """Shorten a ttl at random, as `ttl_jitter` says."""
        return ttl * (1 - self.ttl_jitter * random.random()) if self.ttl_jitter else ttl

    def error_ttl_of(self, error: BaseException) -> float:
        """How long, in seconds, new callers get this error instead of a new run."""
        kinds = type(error).__mro__  # as an except clause does: no class of the user's has a say
        ttl = next((ttl for kind, ttl in self.cache_errors.items() if kind in kinds), self.error_ttl)
        return max(ttl, _LEAST_BACKOFF) if self.stale_if_error else ttl

    @classmethod
    def build(cls, given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Options:
        """Make the record from a task's own options over an app's defaults.

        Args:
            given: the task's own.
            defaults: its app's; None: they are not known yet. One that means nothing beside what the task says lies
                idle: it is for the app's other tasks, and for calls that say more.

        Raises:
            OptionError: a name is unknown, `ttl` is in neither, or a value makes no sense.
        """
        _known(given, _FIELDS)
        _known(defaults or (), _FIELDS)
        merged = {**(defaults or {}), **given}
        if "ttl" not in merged:
            raise OptionError("memolock option ttl is missing: say how many seconds a value may be served")
        if merged.get("external"):
            merged = {name: value for name, value in merged.items() if name in given or name not in _STORED_FORM}
        made = cls(**merged)
        made._check_together(given, () if defaults is not None else set(_FIELDS) - set(OF_A_TASK) - set(given))
        for name in ("force_refresh", "on_progress"):
            if getattr(made, name):
                raise OptionError(f"memolock option {name} is for one call: task.with_options({name}=...)")
        return made

    def override(self, overrides: Mapping[str, Any], *, travels: bool = True) -> Options:
        """Return a copy for one call.

        Args:
            overrides: what is other for it.
            travels: whether the call's flight travels in a message to another process.

        Raises:
            OptionError: a name is unknown or belongs to the task as a whole, or a value makes no sense.
        """
        _known(overrides, _FIELDS)
        for name in overrides:
            if name not in call_options(travels=travels):
                raise OptionError(
                    f"memolock option {name!r} belongs to the task, as all processes must agree on it; "
                    f"it cannot be set for one call"
                )
        if travels and callable(overrides.get("ttl")):
            raise OptionError("memolock option ttl: a function cannot be sent to the worker; set it on the task")
        if not overrides:
            return self  # a copy is checked anew, which every run would pay
        made = replace(self, **overrides)
        made._check_together(overrides)
        return made


_FIELDS = tuple(f.name for f in fields(Options))
_DEFAULTS = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(Options)}


def checked(name: str, value: Any, where: str) -> Any:
    """Return a default that a value makes sense for, by itself.

    Raises:
        OptionError: it makes none; the error says where it stands.
    """
    try:
        Options(ttl=1.0, **{name: value})
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None
    return value


#: What makes no sense for all tasks of an app: it has no defaults of these.
OF_A_TASK = (
    *("ttl", "key", "ignore", "tags", "cache_if", "external"),
    *("force_refresh", "on_progress", "refresh_calls", "refresh_every"),
)

#: What means nothing without another option, and how to say so.
_NEEDS = {
    "beta": ("early_refresh", "goes with early_refresh='xfetch' only"),
    "compress_over": ("compression", "needs compression: nothing is compressed"),
    "external_timeout": ("external", "needs external: no other process settles its flights"),
    "refresh_calls": ("refresh_every", "needs refresh_every: nobody makes them"),
    "soft_timeout": ("stale_ttl", "needs stale_ttl: there is no stale value to take"),
}

#: What does not go with `external`: it is for the worker that has the value, or for a caller that could compute it.
_OF_WHO_HAS_THE_VALUE = ("cache_if", "none_ttl", "on_redis_error", "ttl_jitter")
_STORED_FORM = ("accept", "compression", "serializer", "typed")

_NUMBERS = ("beta", "ttl_jitter")
_TIMES = tuple(f.name for f in fields(Options) if f.type == "float" and f.name not in _NUMBERS)

_MAY_BE_ZERO = ("error_ttl", "local_ttl", "stale_if_error", "stale_ttl")

#: Seconds of what is as good as for ever: 100 years. The server reckons with instants of as many digits as today's.
_FOR_EVER = 100 * 365.25 * 86400

#: Seconds between two attempts to refresh what is served stale on errors.
_LEAST_BACKOFF = 1.0

#: What may differ from call to call. The others shape the key or its stored form, or belong to the whole process.
CALL_OPTIONS = frozenset(_TIMES) - {"local_ttl", "local_lease"} | frozenset(
    (
        *("max_crashes", "max_overlap", "nested", "on_redis_error", "skip_abandoned"),
        *("ttl", "ttl_jitter", "none_ttl", "soft_timeout", "early_refresh", "beta", "force_refresh"),
        "on_progress",
    )
)

#: What may differ as well where a call's flight never leaves its process: functions.
_FUNCTION_OPTIONS = frozenset(("cache_errors", "cache_if", "external", "tags"))


def call_options(*, travels: bool) -> frozenset[str]:
    """Return what may differ from call to call, if their flights travel in messages or if they do not."""
    return CALL_OPTIONS if travels else CALL_OPTIONS | _FUNCTION_OPTIONS


#: Those of them that a worker has no use for, and that do not travel with a flight's message.
CALLER_OPTIONS = frozenset(("force_refresh", "on_progress", "soft_timeout", "early_refresh", "beta"))


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def refuse_async(name: str, value: object) -> None:
    """Raise `OptionError` for a coroutine function as an option; a name for the error."""
    if callable(value) and is_async(value):
        raise OptionError(
            f"memolock option {name}={value!r}: must be a plain function, as nobody awaits what a coroutine function "
            f"gives; what there is to await belongs in what computes the value"
        )


def _asked(name: str, function: Callable[[Any], Any], value: Any) -> Any:
    try:
        return function(value)
    except Exception as error:
        kind = type(value).__qualname__
        raise OptionError(f"memolock option {name}: its function failed for a {kind}: {described(error)}") from error


def _known(given: Iterable[str], allowed: Iterable[str]) -> None:
    for name in given:
        if name not in allowed:
            meant = f" ({near})" if (near := guess(name, allowed)) else ""
            raise OptionError(f"unknown memolock option {name!r}{meant}; known are: {', '.join(sorted(allowed))}")


def guess(name: str, known: Iterable[str]) -> str:
    """Ask whether the nearest of some names was meant, or say where a server is named; "" if none is near."""
    if name in _SERVERS:
        return "a server is named by memolock_redis_url of a Celery app, or redis= of MemoLock and memolocked_job"
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]!r}?" if near else ""


_SERVERS = ("connection", "redis", "redis_url", "url")


def seconds_of(name: str, value: object, *, zero: bool) -> float:
    """Return a time in seconds, of at most 100 years; a name for the error, and whether 0 is one.

    Raises:
        OptionError: it is none.
    """
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        raise OptionError(f"memolock option {name}={value!r}: must be a number of seconds or a timedelta")
    if seconds < 0 or (seconds == 0 and not zero):
        raise OptionError(f"memolock option {name}={value!r}: must be {'0 or more' if zero else 'more than 0'}")
    if 0 < seconds < 0.001:
        raise OptionError(f"memolock option {name}={value!r}: the shortest time is 0.001 s")
    return min(float(seconds), _FOR_EVER)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"memolock option {name}={value!r}: must be a whole number of 1 or more")


def _errors(value: object) -> Mapping[type[Exception], float]:
    if not isinstance(value, Mapping):
        raise OptionError(f"memolock option cache_errors={value!r}: must map exception types to seconds")
    for error in value:
        if not (isinstance(error, type) and issubclass(error, Exception)):
            raise OptionError(f"memolock option cache_errors: {error!r} is no type of exception")
    return {error: seconds_of(f"cache_errors[{error.__name__}]", ttl, zero=True) for error, ttl in value.items()}


def _names(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise OptionError(f"memolock option {name}={value!r}: must be a list or tuple of names")
    names = tuple(value)
    if not all(isinstance(each, str) for each in names):
        raise OptionError(f"memolock option {name}={value!r}: every name must be text")
    return names
