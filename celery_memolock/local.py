"""Values kept in this process, so that a hit costs no trip, and what may be trusted of them. Pure but for its clock.

The server tells of each entry that changes (see `tracker.py`). Two rules keep what it cannot tell in time from being
served:

- A *placeholder* is put before an entry is read, and the value only in its place: a change that is heard of while the
  reply travels takes the placeholder away, and the older value finds no place. Reads at once share one: any of them may
  fill it, as it was there before each of them, and replace an older value that another one filled it with.
- A value counts while the link on which changes are told was *proved alive* at most `local_lease` ago. With the link
  all values go, and all placeholders: what was missed while it was broken is not known.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, Final

from cachetools import LRUCache

from .codec import Entry, since

__all__ = ["MISSING", "Local", "Ticket"]

MISSING: Final[Any] = object()

#: Of these one object may be handed to all: nobody can change it.
_IMMUTABLE: Final = frozenset([str, int, float, bool, type(None), bytes])

#: Bytes that an entry takes beside its payload.
_OVERHEAD: Final = 300


class _Place:
    """The placeholder of an entry, for all reads of it that are under way.

    Attributes:
        reads: how many these are.
        newest: the time in the latest fence that was found meanwhile.
    """

    __slots__ = ("newest", "reads")

    def __init__(self) -> None:
        self.reads = 0
        self.newest = 0


class Ticket:
    """The part that one read has in a placeholder, until its end."""

    __slots__ = ("place",)

    def __init__(self, place: _Place | None) -> None:
        self.place = place


class _Kept:
    """A value, until when it is served, and until when it is known to be fresh."""

    __slots__ = ("entry", "fresh_until", "size", "stamp", "until", "value")

    def __init__(self, value: Any, entry: Entry, stamp: int, until: float, fresh_until: float) -> None:
        # What could be changed by one caller is decoded anew for each.
        self.value = value if type(value) in _IMMUTABLE else entry
        self.size = len(entry.body)
        self.entry = entry
        self.stamp = stamp
        self.until = until
        self.fresh_until = fresh_until


class Local:
    """The values of one task. Safe to use from several threads.

    Args:
        ttl: seconds after which a value is read anew, whatever the server tells.
        entries, size: at most so many values and bytes; the least recently used go first.
        lease: seconds for which a proof that the link lives counts.
        clock: the monotonic clock.

    Attributes:
        over: whether its server was closed, or its process forked: there is another one, if any.
    """

    def __init__(self, ttl: float, entries: int, size: int, lease: float, clock: Callable[[], float]) -> None:
        self._ttl = ttl
        self._lease = lease
        self._clock = clock
        self._lock = threading.Lock()
        least = size / entries
        self._kept: LRUCache[str, _Kept] = LRUCache(size, lambda kept: max(least, kept.size + _OVERHEAD))
        self._quarantine: dict[str, _Kept] = {}
        self._reading: dict[str, _Place] = {}
        self._proved = -lease
        self.over = False

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Any:
        """Return a value, or the `Entry` that each caller has to decode for itself, or `MISSING`."""
        with self._lock:  # what `_alive` does, without a call
            try:
                kept = self._kept[key]
            except KeyError:
                return MISSING
            now = self._clock()
            return kept.value if now < kept.until and now < self._proved + self._lease else MISSING

    def entry(self, key: str) -> Entry | None:
        """Return a value as it was read, if it is kept."""
        with self._lock:
            kept = self._alive(key)
            return None if kept is None else kept.entry

    def _alive(self, key: str) -> _Kept | None:
        kept = self._kept.get(key)
        now = self._clock()
        return None if kept is None or now >= kept.until or now >= self._proved + self._lease else kept

    def quarantined(self, key: str, stale_for: float) -> Entry | None:
        """Return what was kept when the link was lost, if it is past its freshness by less than so many seconds.

        It may have been invalidated since. So it is for those alone who cannot reach the server, and want even that.
        """
        with self._lock:
            kept = self._quarantine.get(key)
            if kept is None or self._clock() >= kept.fresh_until + stale_for:
                return None
            return kept.entry

    def begin(self, key: str) -> Ticket:
        """Put a placeholder before an entry is read, or take part in that of other reads.

        Without a proof that the link lives it is none.
        """
        with self._lock:
            if self._clock() >= self._proved + self._lease:
                return Ticket(None)
            place = self._reading.get(key)
            if place is None:
                place = self._reading[key] = _Place()
            place.reads += 1
            return Ticket(place)

    def end(
        self,
        key: str,
        ticket: Ticket,
        value: Any = MISSING,
        entry: Entry | None = None,
        fresh_for: float = math.inf,
        keep_for: float = math.inf,
    ) -> None:
        """Put a value in its placeholder's place, if that is still there; without a value just take it away.

        It is fresh for so many seconds, and served from here for no longer than that and `keep_for`.

        The placeholder stays until the last of several reads at once has ended. Whatever one of them found, nothing
        older is put there by another, and that there is nothing to keep, nobody knows how old that is: it ends for all.
        A second end of the same read does nothing.
        """
        stamp = since(entry.fence) if entry is not None else 0
        with self._lock:
            place, ticket.place = ticket.place, None
            reading = self._reading.get(key)
            self._outdate(key, stamp)
            if place is not None and place is reading:
                place.reads -= 1
                if entry is None or not place.reads:
                    del self._reading[key]
            if entry is None or place is None or place is not reading or stamp < place.newest:
                return
            try:
                now = self._clock()
                fresh_until = now + fresh_for if fresh_for < math.inf else -math.inf
                until = now + min(self._ttl, fresh_for, keep_for)
                self._kept[key] = _Kept(value, entry, stamp, until, fresh_until)
            except ValueError:
                pass  # larger than all that may be kept

    def supersede(self, key: str, entry: Entry) -> None:
        """Somebody here has seen this: nothing older must be served from now on."""
        with self._lock:
            self._outdate(key, since(entry.fence))

    def _outdate(self, key: str, stamp: int) -> None:
        kept = self._kept.get(key)
        if kept is not None and kept.stamp < stamp:
            del self._kept[key]
        reading = self._reading.get(key)
        if reading is not None:
            reading.newest = max(reading.newest, stamp)

    def drop(self, key: str) -> None:
        """Something changed: forget the value, and let no read that is under way keep the old one."""
        with self._lock:
            self._kept.pop(key, None)
            self._quarantine.pop(key, None)
            self._reading.pop(key, None)

    def drop_all(self) -> None:
        """Everything may have changed."""
        with self._lock:
            self._kept.clear()
            self._quarantine.clear()
            self._reading.clear()

    # ---- what the tracker tells

    def proved(self, at: float) -> None:
        """The link lived at that time: all changes until then were told."""
        with self._lock:
            self._quarantine = {}
            self._proved = max(self._proved, at)

    def cut(self) -> None:
        """The link is lost: what was kept over it counts no more."""
        with self._lock:
            self._proved = self._clock() - self._lease
            if self._kept:
                self._quarantine = dict(self._kept)
            self._kept.clear()
            self._reading.clear()
