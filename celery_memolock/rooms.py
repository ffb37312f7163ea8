"""Who in this process waits for which key, and whose turn it is to look. Pure: no sockets, clocks or waiting.

To *look* is to ask the server for a key's outcome or for the flight to wait for. Callers of one key first meet in its
*lobby*. One of them looks for everybody who was there when it began; whoever comes later needs a later look, because
one that was sent before their call could show a value older than an invalidation that they know of. So at most one
look of a lobby is under way and one is due.

A look that says "wait" moves the callers it counted for into the *room* of that flight. There they sleep until the
listener rings: a notice came, a timer passed, or the link was lost. Then one of them looks again, for all. Whoever
leaves while it is its turn passes the turn on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

__all__ = ["Broken", "Look", "Place", "Rooms", "Seat", "Settled", "Turn"]

_MOST_EARLY_NOTICES = 1024


class Turn(Enum):
    """What a caller wakes up for, beside an outcome."""

    LOOK = "look for everybody in your room"


@dataclass(frozen=True, slots=True)
class Settled:
    """The outcome is here: a stored value or error, still encoded."""

    raw: bytes


@dataclass(frozen=True, slots=True)
class Broken:
    """The look failed. Each caller raises an error of its own from it."""

    error: type[Exception]
    message: str


class Seat:
    """One waiting caller. `wake` is called, from any thread, when its turn has come."""

    __slots__ = ("room", "turn", "wake")

    def __init__(self, wake: Callable[[], None]) -> None:
        self.room: _Room | None = None
        self.turn: Turn | Settled | Broken | None = None
        self.wake = wake


class _Room:
    """A lobby (`fence` is empty) or the callers that wait for one flight. Guarded by the lock of `Rooms`."""

    __slots__ = ("due", "fence", "interval", "key", "looker", "rung", "seats", "sequence")

    def __init__(self, key: str, fence: str) -> None:
        self.key = key
        self.fence = fence
        self.seats: dict[Seat, None] = {}  # in order of arrival
        self.looker: Seat | None = None
        self.sequence = 0
        self.rung = False
        self.due: float | None = None
        self.interval = 0.0


@dataclass(frozen=True, slots=True)
class Look:
    """One look under way: for whom it counts, and what it tells the server.

    Attributes:
        following: the flight whose outcome is wanted, "" for newcomers: what was parked for those who came
            before an invalidation is not for them.
        sequence: of the registration that the look makes; a newer one is never removed in its stead.
    """

    room: _Room
    seat: Seat
    counts_for: tuple[Seat, ...]
    following: str
    sequence: int


@dataclass(frozen=True, slots=True)
class Place:
    """A registration at the server that nobody in this process needs any more."""

    fence: str
    sequence: int


class Rooms:
    """All rooms of this process.

    Args:
        jitter: returns a number from 0 to 1, to spread the polls of many processes.
        alarm: is told, when a time to look is set, which.
    """

    def __init__(self, jitter: Callable[[], float], alarm: Callable[[float], None]) -> None:
        self._lock = threading.Lock()
        self._jitter = jitter
        self._alarm = alarm
        self._lobbies: dict[str, _Room] = {}
        self._flights: dict[str, _Room] = {}
        self._sequence = 0
        self._looks = 0
        self._early: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._lobbies) + len(self._flights)

    def enter(self, key: str, seat: Seat) -> None:
        """Seat a newcomer; it looks at once unless somebody is looking."""
        with self._lock:
            lobby = self._lobbies.get(key)
            if lobby is None:
                lobby = self._lobbies[key] = _Room(key, "")
            lobby.seats[seat] = None
            seat.room = lobby
            if lobby.looker is None:
                self._give_turn(lobby)

    def begin_look(self, seat: Seat) -> Look:
        """Take the turn. The look counts for everybody who is in the room now."""
        with self._lock:
            room = seat.room
            assert room is not None
            assert room.looker is seat
            seat.turn = None
            self._sequence += 1
            self._looks += 1
            room.sequence = self._sequence
            room.rung = False
            return Look(room, seat, tuple(room.seats), room.fence, room.sequence)

    def settled(self, look: Look, raw: bytes) -> None:
        """The look brought an outcome."""
        with self._lock:
            self._finish(look.counts_for, Settled(raw))
            self._end(look)

    def broken(self, look: Look, error: type[Exception], message: str) -> None:
        """The look failed for all whom it counted for."""
        with self._lock:
            self._finish(look.counts_for, Broken(error, message))
            self._end(look)

    def interrupted(self, look: Look) -> None:
        """The looker was interrupted, which concerns nobody else: another one looks."""
        with self._lock:
            look.room.rung = True
            self._end(look, place_kept=True)

    def wait(self, look: Look, fence: str, lease_left: float, now: float, polls: tuple[float, float]) -> None:
        """The look said: wait for flight `fence`, whose lease has so many seconds left.

        `polls` are the first and the longest time, in seconds, until the next look.
        """
        with self._lock:
            room = self._flights.get(fence)
            if room is None:
                room = self._flights[fence] = _Room(look.room.key, fence)
            for seat in look.counts_for:
                if seat.room is look.room and seat.turn is None:
                    del look.room.seats[seat]
                    room.seats[seat] = None
                    seat.room = room
            room.sequence = max(room.sequence, look.sequence)
            first, longest = polls
            room.interval = min(room.interval * 1.5, longest) if room is look.room else room.interval or first
            # A look just before the lease ends would come for nothing, so it comes just after.
            polling = room.interval * (0.75 + 0.25 * self._jitter())
            due = now + min(polling, lease_left + 0.001 + 0.02 * self._jitter())
            room.due = due if room.due is None or room is look.room else min(room.due, due)
            self._alarm(room.due)
            early = self._early.get(fence)
            self._end(look)
            if early:
                self._finish(tuple(room.seats), Settled(early))
                self._next(room)
            elif early is not None and room.looker is None and room.seats:
                self._give_turn(room)
            elif not room.seats:
                self._next(room)

    def leave(self, seat: Seat) -> Place | None:
        """Unseat a caller. Returns the registration to give up, if it was the last that needed it."""
        with self._lock:
            room = seat.room
            if room is None:
                return None
            seat.room = None
            del room.seats[seat]
            looked = room.looker is seat
            if looked:
                room.looker = None
                room.rung = True
            self._next(room)
            return Place(room.fence, room.sequence) if not room.seats and room.sequence else None

    def notice(self, fence: str, raw: bytes) -> None:
        """A notice came for a flight, with its outcome or (empty) to say: look again."""
        with self._lock:
            room = self._flights.get(fence)
            if room is None:
                # It may be faster than the reply that tells whom to wait for.
                if self._looks:
                    self._early[fence] = raw
                    if len(self._early) > _MOST_EARLY_NOTICES:
                        del self._early[next(iter(self._early))]
            elif raw:
                self._finish(tuple(room.seats), Settled(raw))
                self._next(room)
            else:
                room.rung = True
                self._next(room)

    def ring_all(self) -> None:
        """Notices may have been lost: everybody looks again."""
        with self._lock:
            for room in list(self._flights.values()):
                room.rung = True
                self._next(room)

    def tick(self, now: float) -> float | None:
        """Ring the rooms whose time has come. Returns when the next one is due, None if there is none."""
        with self._lock:
            soonest: float | None = None
            for room in self._flights.values():
                if room.looker is not None or room.due is None:
                    continue
                if room.due <= now:
                    self._give_turn(room)
                elif soonest is None or room.due < soonest:
                    soonest = room.due
            return soonest

    # The lock is held in all that follow.

    def _give_turn(self, room: _Room) -> None:
        seat = next(iter(room.seats))
        room.looker = seat
        room.due = None
        seat.turn = Turn.LOOK
        seat.wake()

    def _next(self, room: _Room) -> None:
        """Close an empty room; let somebody look where a look is due."""
        if not room.seats:
            if room.fence:
                if self._flights.get(room.fence) is room:
                    del self._flights[room.fence]
            elif self._lobbies.get(room.key) is room and room.looker is None:
                del self._lobbies[room.key]
        elif room.looker is None and (room.rung or not room.fence):
            self._give_turn(room)

    def _end(self, look: Look, *, place_kept: bool = False) -> None:
        self._looks -= 1
        if not self._looks:
            self._early.clear()
        room = look.room
        if room.looker is look.seat:
            room.looker = None
        if room.due is None:
            room.rung = True  # nothing else would wake those who came while it looked
        if not room.fence and not place_kept:
            room.sequence = 0  # the registration went with those who moved to the flight's room
        self._next(room)

    def _finish(self, seats: tuple[Seat, ...], turn: Settled | Broken) -> None:
        for seat in seats:
            if seat.room is not None:
                del seat.room.seats[seat]
                if seat.room.looker is seat and seat.turn is Turn.LOOK:
                    seat.room.looker = None  # it was told to look, and need not any more
                seat.room = None
                seat.turn = turn
                seat.wake()
