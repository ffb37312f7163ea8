"""Values kept in this process, so that a hit costs no trip, and what may be trusted of them. Pure but for its clock.

The server tells of each entry that changes (see `tracker.py`). Two rules keep what it cannot tell in time from being
served:

- A *placeholder* is put before an entry is read, and the value only in its place: a change that is heard of while the
  reply travels takes the placeholder away, and the older value finds no place.
- A value counts while the link on which changes are told was *proved alive* at most `local_lease` ago. With the link
  all values go, and all placeholders: what was missed while it was broken is not known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from cachetools import LRUCache

from .codec import Entry

__all__ = ["MISSING", "Local", "Ticket"]

MISSING: Final[Any] = object()

#: Of these one object may be handed to all: nobody can change it.
_IMMUTABLE: Final = frozenset([str, int, float, bool, type(None), bytes])

#: Bytes that an entry takes beside its payload.
_OVERHEAD: Final = 300


class Ticket:
    """The place of one read that is under way.

    Attributes:
        newest: the time in the latest fence that other reads found meanwhile.
    """

    __slots__ = ("newest",)

    def __init__(self) -> None:
        self.newest = 0


class _Kept:
    __slots__ = ("size", "stamp", "until", "value")

    def __init__(self, value: Any, entry: Entry, stamp: int, until: float) -> None:
        # What could be changed by one caller is decoded anew for each.
        self.value = value if type(value) in _IMMUTABLE else entry
        self.size = len(entry.body)
        self.stamp = stamp
        self.until = until


class Local:
    """The values of one task. Safe to use from several threads.

    Args:
        ttl: seconds after which a value is read anew, whatever the server tells.
        entries, size: at most so many values and bytes; the least recently used go first.
        lease: seconds for which a proof that the link lives counts.
        clock: the monotonic clock.
    """

    def __init__(self, ttl: float, entries: int, size: int, lease: float, clock: Callable[[], float]) -> None:
        self._ttl = ttl
        self._lease = lease
        self._clock = clock
        self._lock = threading.Lock()
        least = size / entries
        self._kept: LRUCache[str, _Kept] = LRUCache(size, lambda kept: max(least, kept.size + _OVERHEAD))
        self._reading: dict[str, Ticket] = {}
        self._proved = -lease

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Any:
        """Return a value, or the `Entry` that each caller has to decode for itself, or `MISSING`."""
        with self._lock:
            kept = self._kept.get(key)
            now = self._clock()
            if kept is None or now >= kept.until or now >= self._proved + self._lease:
                return MISSING
            return kept.value

    def begin(self, key: str) -> Ticket:
        """Put a placeholder before an entry is read; without a proof that the link lives it is none."""
        ticket = Ticket()
        with self._lock:
            if self._clock() < self._proved + self._lease:
                self._reading[key] = ticket
        return ticket

    def end(self, key: str, ticket: Ticket, value: Any = MISSING, entry: Entry | None = None) -> None:
        """Put a value in its placeholder's place, if that is still there; without a value just take it away.

        Of several reads at once the last to begin has the placeholder. What another one found shows at least that
        nothing older must be served here from now on.
        """
        stamp = int(entry.fence.partition("-")[0]) if entry is not None else 0
        with self._lock:
            reading = self._reading.get(key)
            if reading is not ticket:
                if reading is not None:
                    reading.newest = max(reading.newest, stamp)
                kept = self._kept.get(key)
                if kept is not None and kept.stamp < stamp:
                    del self._kept[key]
                return
            del self._reading[key]
            if entry is None or stamp < ticket.newest:
                return
            try:
                self._kept[key] = _Kept(value, entry, stamp, self._clock() + self._ttl)
            except ValueError:
                pass  # larger than all that may be kept

    def drop(self, key: str) -> None:
        """Something changed: forget the value, and let no read that is under way keep the old one."""
        with self._lock:
            self._kept.pop(key, None)
            self._reading.pop(key, None)

    def drop_all(self) -> None:
        """Everything may have changed."""
        with self._lock:
            self._kept.clear()
            self._reading.clear()

    # ---- what the tracker tells

    def proved(self, at: float) -> None:
        """The link lived at that time: all changes until then were told."""
        with self._lock:
            self._proved = max(self._proved, at)

    def cut(self) -> None:
        """The link is lost: what was kept over it counts no more."""
        with self._lock:
            self._proved = self._clock() - self._lease
            self._kept.clear()
            self._reading.clear()
