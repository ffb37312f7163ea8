"""The options of a memolocked task: one frozen record, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import Any, Literal

from .errors import OptionError

__all__ = ["CALL_OPTIONS", "Options"]

Seconds = float | timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How one task is cached and how its callers wait.

    Every time is in seconds, as a number or a `timedelta`, and is kept as a float.

    Attributes:
        ttl: how long a value is served after it was stored. The only option without a default.
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
        compression: "gzip", "bzip2", "lzma" or None. Default None.
        max_value_size: bytes; the cap of an encoded value, before and after compression. Default 16 MiB.
        prefix: the first part of every Redis key. Default "memolock".
        version: part of the key; raise it to abandon the values of older code. Default 1.
        key: None: the key is made of all arguments; a callable takes the task's arguments and returns
            the key as text; a format string such as ``"{user_id}"`` is filled from them. Default None.
        ignore: names of arguments that are no part of the key. Default none.

    Raises:
        OptionError: an option is missing, unknown or has a value that makes no sense.
    """

    ttl: float = field()
    wait_timeout: float = 30.0
    lease: float = 10.0
    dispatch_lease: float = 5.0
    queue_timeout: float = 300.0
    max_run: float = 3600.0
    poll_interval: float = 1.0
    max_poll_interval: float = 5.0
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
    compression: str | None = None
    max_value_size: int = 16 * 1024 * 1024
    prefix: str = "memolock"
    version: int = 1
    key: Callable[..., str] | str | None = None
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in _TIMES:
            object.__setattr__(self, name, _seconds(name, getattr(self, name), zero=name in _MAY_BE_ZERO))
        for name in ("local_max_bytes", "local_max_entries", "max_crashes", "max_overlap", "max_value_size", "version"):
            _whole(name, getattr(self, name))
        if self.max_poll_interval < self.poll_interval:
            object.__setattr__(self, "max_poll_interval", self.poll_interval)
        for name, choices in (("nested", ("inline", "dispatch")), ("on_redis_error", ("raise", "compute"))):
            if getattr(self, name) not in choices:
                raise OptionError(
                    f"memolock option {name}={getattr(self, name)!r}: must be {' or '.join(map(repr, choices))}"
                )
        if not isinstance(self.skip_abandoned, bool):
            raise OptionError(f"memolock option skip_abandoned={self.skip_abandoned!r}: must be True or False")
        object.__setattr__(self, "cache_errors", _errors(self.cache_errors))
        if not isinstance(self.prefix, str) or not self.prefix or set(self.prefix) & set("{} \n"):
            raise OptionError(f"memolock option prefix={self.prefix!r}: must be text without braces or white space")
        if self.key is not None and not callable(self.key) and not isinstance(self.key, str):
            raise OptionError(f"memolock option key={self.key!r}: must be a callable, a format string or None")
        for name in ("accept", "ignore"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        from .codec import check_formats  # imported here: the codec reads these options

        check_formats(self)

    def error_ttl_of(self, error: BaseException) -> float:
        """How long, in seconds, new callers get this error instead of a new run."""
        return next((ttl for kind, ttl in self.cache_errors.items() if isinstance(error, kind)), self.error_ttl)

    @classmethod
    def build(cls, given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Options:
        """Make the record from a task's own options over an app's defaults.

        Raises:
            OptionError: a name is unknown, `ttl` is in neither, or a value makes no sense.
        """
        _known(given, _FIELDS)
        merged = {**(defaults or {}), **given}
        if "ttl" not in merged:
            raise OptionError("memolock option ttl is missing: say how many seconds a value may be served")
        return cls(**merged)

    def override(self, overrides: Mapping[str, Any]) -> Options:
        """Return a copy for one call.

        Raises:
            OptionError: a name is unknown or belongs to the task as a whole, or a value makes no sense.
        """
        _known(overrides, _FIELDS)
        for name in overrides:
            if name not in CALL_OPTIONS:
                raise OptionError(
                    f"memolock option {name!r} belongs to the task, as web and worker must agree on it; "
                    f"it cannot be set for one call"
                )
        return replace(self, **overrides)


_FIELDS = tuple(f.name for f in fields(Options))
_TIMES = tuple(f.name for f in fields(Options) if f.type == "float")

_MAY_BE_ZERO = ("error_ttl", "local_ttl")

#: What may differ from call to call. The others shape the key or its stored form, or belong to the whole process.
CALL_OPTIONS = frozenset(_TIMES) - {"local_ttl", "local_lease"} | frozenset(
    ("max_crashes", "max_overlap", "nested", "on_redis_error", "skip_abandoned")
)


def _known(given: Iterable[str], allowed: Iterable[str]) -> None:
    for name in given:
        if name not in allowed:
            raise OptionError(f"unknown memolock option {name!r}; known are: {', '.join(sorted(allowed))}")


def _seconds(name: str, value: object, *, zero: bool) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        raise OptionError(f"memolock option {name}={value!r}: must be a number of seconds or a timedelta")
    if seconds < 0 or (seconds == 0 and not zero):
        raise OptionError(f"memolock option {name}={value!r}: must be {'0 or more' if zero else 'more than 0'}")
    if 0 < seconds < 0.001:
        raise OptionError(f"memolock option {name}={value!r}: the shortest time is 0.001 s")
    return float(seconds)


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"memolock option {name}={value!r}: must be a whole number of 1 or more")


def _errors(value: object) -> Mapping[type[Exception], float]:
    if not isinstance(value, Mapping):
        raise OptionError(f"memolock option cache_errors={value!r}: must map exception types to seconds")
    for error in value:
        if not (isinstance(error, type) and issubclass(error, Exception)):
            raise OptionError(f"memolock option cache_errors: {error!r} is no type of exception")
    return {error: _seconds(f"cache_errors[{error.__name__}]", ttl, zero=True) for error, ttl in value.items()}


def _names(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise OptionError(f"memolock option {name}={value!r}: must be a list or tuple of names")
    names = tuple(value)
    if not all(isinstance(each, str) for each in names):
        raise OptionError(f"memolock option {name}={value!r}: every name must be text")
    return names
