"""The flight that a task is running for, as the task itself sees it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Final, cast

from .codec import Entry
from .effects import MISS, Call, Missing, Returned, Run
from .errors import DecodeError, NothingStale, OptionError, ValueTooLarge
from .external import token_of
from .options import Progress, seconds_of

__all__ = ["Flight", "current_flight", "flying", "grounded"]


_LONGEST_MESSAGE: Final = 1_000
_REPORT_PAUSE: Final = 0.05  # seconds


class NotModified:
    """What a task returns whose stale value still holds."""

    def __init__(self, entry: Entry, value: Any) -> None:
        self.entry = entry
        self.value = value


class Flight:
    """What a task may learn of its flight, and say to it.

    Args:
        call: whose value is computed; None outside of a flight.
        run: this attempt.
        read: reads the stored entry.
        lost: whether the flight was taken over.
        report: tells those who wait how far the run is.
    """

    # What is misspelt is an error.
    __slots__ = ("_call", "_etag", "_found", "_looked", "_lost", "_read", "_report", "_reported", "_run", "_ttl")

    def __init__(
        self,
        call: Call | None = None,
        run: Run | None = None,
        read: Callable[[], bytes | None] = lambda: None,
        lost: Callable[[], bool] = lambda: False,
        report: Callable[[Progress], object] = lambda _: None,
    ) -> None:
        self._call = call
        self._run = run
        self._read = read
        self._lost = lost
        self._report = report
        self._reported: tuple[float, str] = (-math.inf, "")
        self._found: tuple[Entry, Any] | None = None
        self._looked = False
        self._ttl: float | None = None
        self._etag = ""

    def __bool__(self) -> bool:
        """Whether a flight is what the task runs for; False in a plain `.delay()` or a call."""
        return self._run is not None

    @property
    def key(self) -> str:
        """Of the value: task, version and fingerprint of the arguments; "" outside of a flight."""
        return self._call.keys.tag if self._call is not None else ""

    @property
    def fence(self) -> str:
        """What names this flight among all of its key; "" outside of a flight."""
        return self._run.fence if self._run is not None else ""

    @property
    def attempt(self) -> int:
        """1 for the first run of this flight, more after retries; 0 outside of a flight."""
        return self._run.attempt if self._run is not None else 0

    @property
    def ttl(self) -> float | None:
        """For how many seconds the value will be fresh, if the task said so: it may set this, 0 not to store it.

        Raises:
            OptionError: it is set to something that is no time; or in a task that hands its flights out, where who
                settles says it.
        """
        return self._ttl

    @ttl.setter
    def ttl(self, value: float | timedelta) -> None:
        self._refuse_outside("ttl", "external.settle(..., ttl=...)")
        self._ttl = seconds_of("ttl", value, zero=True)

    @property
    def etag(self) -> str:
        """The task's own name for this version of the value; the next run finds it as `stale_etag`.

        Raises:
            TypeError: it is set to something else than a text of at most 200 characters.
            OptionError: it is set in a task that hands its flights out, where who settles says it.
        """
        return self._etag

    @etag.setter
    def etag(self, value: str) -> None:
        self._refuse_outside("etag", "external.settle(..., etag=...)")
        if not isinstance(value, str) or len(value) > 200:
            raise TypeError(f"current_flight.etag must be a text of at most 200 characters, not {value!r}")
        self._etag = value

    @property
    def stale(self) -> Any | Missing:
        """The value that is stored now and is being refreshed, or `MISS`."""
        found = self._stored()
        return MISS if found is None else found[1]

    @property
    def stale_etag(self) -> str:
        """The etag that the stored value was given, or ""."""
        found = self._stored()
        return "" if found is None else found[0].etag

    def not_modified(self) -> Any:
        """Return what the task is to return if the stored value still holds: it is fresh again, and is not sent anew.

        Raises:
            NothingStale: no value is stored.
            OptionError: the task hands its flights out, and what it returns is not the value.
        """
        self._refuse_outside("not_modified()", "external.settle(..., current_flight.stale)")
        found = self._stored()
        if found is None:
            raise NothingStale(f"no value of key {self.key!r} is stored that could still hold; look at stale first")
        return NotModified(*found)

    @property
    def cancelled(self) -> bool:
        """Whether the value will be refused, as another flight took over: the task may as well stop.

        Known by the renewal of the lease, after each third of it. Nobody renews it after `max_run`, nor that of what is
        handed out (`external=True`): then this stays as it was.
        """
        return self._lost()

    @property
    def token(self) -> str:
        """What another process needs to settle this flight, as text: see `celery_memolock.external`.

        "" outside of a flight, and where the task does not hand its flights out (`external=True`).
        """
        if self._call is None or self._run is None or not self._call.options.external:
            return ""
        return token_of(self._call, self._run)

    def progress(self, fraction: float, message: str = "") -> None:
        """Tell those who wait how far the run is; see `on_progress`.

        A report with the message of the last one, less than 0.05 s after it, is left out unless its fraction is 1.

        Args:
            fraction: of the whole, from 0 to 1.
            message: up to 1,000 characters.

        Raises:
            ValueError: the fraction is none, or the message is too long.
        """
        if not 0 <= fraction <= 1 or len(message) > _LONGEST_MESSAGE:
            raise ValueError(f"progress({fraction!r}, ...) takes a number from 0 to 1 and at most 1,000 characters")
        now = time.monotonic()
        at, last = self._reported
        if fraction == 1 or message != last or now - at >= _REPORT_PAUSE:
            self._reported = now, message
            self._report(Progress(fraction, message))

    def outcome(self, value: Any) -> Returned:
        """Return what a worker settles when the task returned this."""
        if isinstance(value, NotModified):
            etag = self._etag or value.entry.etag
            return Returned(value.value, self._ttl, etag, value.entry)
        return Returned(value, self._ttl, self._etag)

    def _refuse_outside(self, name: str, instead: str) -> None:
        if self._call is not None and self._call.options.external:
            raise OptionError(
                f"current_flight.{name} has no meaning in task {self._call.task!r}, which hands its flights out "
                f"(external=True); who settles says it: {instead}"
            )

    def _stored(self) -> tuple[Entry, Any] | None:
        if not self._looked and self._call is not None:
            raw = self._read()
            self._looked = True
            if raw is not None:
                try:
                    entry = Entry.parse(raw)
                    self._found = entry, self._call.codec.unpack(entry)
                except (DecodeError, ValueTooLarge):
                    pass  # unreadable, as it is for callers
        return self._found


_NOWHERE = Flight()
flying: ContextVar[Flight] = ContextVar("celery_memolock_flight", default=_NOWHERE)


class grounded:  # contextlib's would write to an error that passes, and a frozen dataclass refuses
    """Let `current_flight` be false within: what runs there is no flight, though a flight may have called it."""

    def __enter__(self) -> None:
        self._here = flying.set(_NOWHERE)

    def __exit__(self, *_: object) -> None:
        flying.reset(self._here)


class _Current:
    def __getattr__(self, name: str) -> Any:
        return getattr(flying.get(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        flight = flying.get()
        # Outside of a flight there is nobody to tell, and one object for all.
        setattr(flight if flight else Flight(), name, value)

    def __bool__(self) -> bool:
        return bool(flying.get())

    def __repr__(self) -> str:
        flight = flying.get()
        return f"<current_flight {flight.key} {flight.fence}>" if flight else "<current_flight: none>"


#: The flight of the task that runs here. Outside of a flight it is false, knows nothing, and ignores what it is told.
current_flight: Flight = cast(Flight, _Current())
