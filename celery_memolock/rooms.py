"""Who in this process waits for which key, and whose turn it is to look. Pure: no sockets, clocks or waiting.

To *look* is to ask the server for a key's outcome or for the flight to wait for. Callers of one key first meet in its
*lobby*. One of them looks for everybody whose call had begun when the look was sent, whether they are there by then or
not; whoever calls later needs a later look, because this one could show a value older than an invalidation that they
know of. So at most one look of a lobby is under way and one is due.

A look that says "wait" moves the callers it counted for into the *room* of that flight. There they sleep until the
listener rings: a notice came, a timer passed, or the link was lost. Then one of them looks again, for all. Whoever
leaves while it is its turn passes the turn on.

Whoever leaves as its time is over wants to say what it waited for. The first asks the server, and those who leave in
that moment, or in the next, share its answer.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from .codec import Entry

__all__ = ["Broken", "Look", "Place", "Progressed", "Question", "Rooms", "Seat", "Settled", "Told", "Turn", "Woken"]

_MOST_EARLY_NOTICES = 1024
_MODES = ("miss", "force")

#: Seconds after which the turn to look goes on to another caller: from one that does not begin, as its loop is blocked
#: or has stopped, and from one that does not end. A look is one script.
_LONGEST_TURN = 1.0
_LONGEST_LOOK = 10.0

#: Seconds for which what was asked about a flight counts for others whose time is over.
_SAME_MOMENT = 0.25

#: Seconds for which a process asks for one refresh of a key.
_REFRESH_PAUSE = 1.0
_MOST_ASKED = 10_000


class Turn(Enum):
    """What a caller wakes up for, beside an outcome."""

    LOOK = "look for everybody in your room"


@dataclass(slots=True, unsafe_hash=True)  # it does not change but to remember what it is
class Settled:
    """The outcome is here: a stored value or error, still encoded."""

    raw: bytes
    _entry: Entry | None = field(default=None, compare=False, repr=False)

    @property
    def entry(self) -> Entry:
        """It, taken apart: once for all who wait.

        Raises:
            DecodeError: it is no entry.
        """
        if self._entry is None:
            self._entry = Entry.parse(self.raw)
        return self._entry


@dataclass(frozen=True, slots=True)
class Broken:
    """The look failed. Each caller raises an error of its own from it: they would share its traceback."""

    error: type[Exception]
    args: tuple[Any, ...]

    @classmethod
    def by(cls, error: Exception) -> Broken:
        """Note an error."""
        return cls(type(error), error.args)

    def another(self) -> Exception:
        """Return a new error like that one."""
        return self.error(*self.args)


@dataclass(frozen=True, slots=True)
class Progressed:
    """The flight's run told how far it is, still encoded."""

    raw: bytes


@dataclass(frozen=True, slots=True)
class Told:
    """What a caller whose time is over hears of its flight.

    Attributes:
        state: as `Waiting` has it; "" if it is not known.
        since: when that began, by this process's clock.
        workers: what is known of those who could run it, in words.
    """

    state: str = ""
    since: float = 0.0
    workers: str = ""


Woken = Turn | Settled | Broken | Progressed | Told


class Seat:
    """One waiting caller. Drivers know how to wake theirs.

    Attributes:
        follows: whether it wants to hear of progress.
        told: the attempt of its flight and the number in it of the report that it heard last.
        away: whether it computes, and cannot look.
    """

    __slots__ = ("away", "follows", "room", "told", "turn")

    def __init__(self) -> None:
        self.room: _Room | None = None
        self.turn: Woken | None = None
        self.follows = False
        self.away = False
        self.told: tuple[int, int] = (0, 0)

    def wake(self) -> None:
        """Learn that its turn has come; called from any thread, with the lock of `Rooms` held."""

    def ready(self) -> bool | None:
        """Whether it would notice that now; None if it never will."""
        return True


class _Room:
    """A lobby (`fence` is empty) or the callers that wait for one flight. Guarded by the lock of `Rooms`.

    Attributes:
        look: that which its looker has under way.
        question: that of those who left last as their time was over.
        mode: of the looks. An answer to those who want a newer value is none to those who want any.
        passes: when the turn to look goes to another caller, if its looker neither begins nor ends.
    """

    __slots__ = (
        *("due", "fence", "interval", "key", "look", "looker", "mode", "passes"),
        *("question", "rung", "seats", "sequence"),
    )

    def __init__(self, key: str, fence: str, mode: str) -> None:
        self.key = key
        self.fence = fence
        self.mode = mode
        self.passes = 0.0
        self.seats: dict[Seat, None] = {}  # in order of arrival, but for those who held the turn for too long
        self.looker: Seat | None = None
        self.look: Look | None = None
        self.question: Question | None = None
        self.sequence = 0
        self.rung = False
        self.due: float | None = None
        self.interval = 0.0

    @property
    def entry(self) -> str:
        """The key; a lobby of those who want a newer value has a name of its own."""
        return self.key if self.mode == "miss" else self.key.rpartition(" ")[0]


@dataclass(frozen=True, slots=True)
class Look:
    """One look under way: for whom it counts, and what it tells the server.

    Attributes:
        following: the flight whose outcome is wanted, "" for newcomers: what was parked for those who came
            before an invalidation is not for them.
        sequence: of the registration that the look makes; a newer one is never removed in its stead.
        sent: when.
    """

    room: _Room
    seat: Seat
    counts_for: list[Seat]
    following: str
    sequence: int
    sent: float


@dataclass(frozen=True, slots=True)
class Place:
    """A registration at the server that nobody in this process needs any more, or with sequence 0 none."""

    fence: str
    sequence: int


class Question:
    """What becomes of a flight: asked by one whose time is over, for all to whom that happens at the same moment.

    Attributes:
        told: what is known by now.
        asked: when.
        answered: whether that is all.
    """

    __slots__ = ("answered", "asked", "seats", "told")

    def __init__(self, asked: float) -> None:
        self.told = Told()
        self.asked = asked
        self.answered = False
        self.seats: list[Seat] = []


class Rooms:
    """All rooms of this process.

    Args:
        jitter: returns a number from 0 to 1, to spread the polls of many processes.
        alarm: is told, when a time to look is set, which.
        clock: the monotonic clock.
    """

    def __init__(self, jitter: Callable[[], float], alarm: Callable[[float], None], clock: Callable[[], float]) -> None:
        self._lock = threading.Lock()
        self._jitter = jitter
        self._alarm = alarm
        self._clock = clock
        self._lobbies: dict[str, _Room] = {}
        self._flights: dict[tuple[str, str], _Room] = {}
        self._sequence = 0
        self._looks = 0
        self._early: dict[str, tuple[int, bytes]] = {}
        self._asked: dict[str, tuple[str, float]] = {}
        self._resting: dict[str, tuple[str, float, Broken]] = {}
        self._closed: Broken | None = None

    def __len__(self) -> int:
        return len(self._lobbies) + len(self._flights)

    def enter(self, key: str, seat: Seat, mode: str = "miss", began: float = math.inf) -> None:
        """Seat a newcomer, whose call began at that time; it looks at once unless somebody is looking."""
        with self._lock:
            if self._closed is not None:
                seat.turn = self._closed
                seat.wake()
                return
            lobby = self._lobbies.get(key)
            if lobby is None:
                lobby = self._lobbies[key] = _Room(key, "", mode)
            lobby.seats[seat] = None
            seat.room = lobby
            if lobby.looker is None:
                self._give_turn(lobby, newcomer=True)
            elif not lobby.looker.ready() or lobby.passes <= self._clock():
                self._pass_on(lobby)
            elif (look := lobby.look) is not None and look.seat is lobby.looker and began < look.sent:
                look.counts_for.append(seat)

    def may_refresh(self, key: str, fence: str, now: float) -> bool:
        """Whether somebody is to ask for a refresh of this very value; if so, nobody else is for a moment."""
        with self._lock:
            asked, until = self._asked.get(key, ("", now))
            if asked == fence and until > now:
                return False
            if len(self._asked) >= _MOST_ASKED:
                self._asked = {key: asked for key, asked in self._asked.items() if asked[1] > now}
            self._asked[key] = fence, now + _REFRESH_PAUSE
            return True

    def rest(self, key: str, fence: str, until: float, why: Broken) -> None:
        """Nobody answered who asked for a fresh value in place of this one: let nobody wait for that until then."""
        with self._lock:
            if len(self._resting) >= _MOST_ASKED:
                self._resting.clear()
            self._resting[key] = fence, until, why

    def resting(self, key: str, fence: str, now: float) -> Broken | None:
        """Return why a caller with this value is not to wait for a fresh one now, if it is not."""
        resting = self._resting.get(key)
        if resting is None:
            return None
        rests, until, why = resting
        if rests == fence and now < until:
            return why
        with self._lock:
            if self._resting.get(key) is resting:
                del self._resting[key]
        return None

    def begin_look(self, seat: Seat) -> Look | None:
        """Take the turn. The look counts for everybody who is in the room now.

        None if the outcome came since the caller was told to look: that is its turn now. Or the turn went to another.
        """
        with self._lock:
            room = seat.room
            if room is None or room.looker is not seat:
                if seat.turn is Turn.LOOK:
                    seat.turn = None
                return None
            seat.turn = None
            now = self._clock()
            room.passes = now + _LONGEST_LOOK
            self._sequence += 1
            self._looks += 1
            room.sequence = self._sequence
            room.rung = False
            room.look = Look(room, seat, list(room.seats), room.fence, room.sequence, now)
            return room.look

    def settled(self, look: Look, raw: bytes) -> None:
        """The look brought an outcome."""
        with self._lock:
            self._finish(look.counts_for, Settled(raw))
            self._end(look)

    def broken(self, look: Look, error: Exception) -> None:
        """The look failed for all whom it counted for."""
        with self._lock:
            self._finish(look.counts_for, Broken.by(error))
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
            mode = look.room.mode
            room = self._flights.get((fence, mode))
            if room is None:
                room = self._flights[fence, mode] = _Room(look.room.key, fence, mode)
            for seat in look.counts_for:
                if seat.room is look.room and (seat.turn is None or isinstance(seat.turn, Progressed)):
                    del look.room.seats[seat]
                    room.seats[seat] = None
                    seat.room = room
                    if room is not look.room:
                        seat.told = (0, 0)
            room.sequence = max(room.sequence, look.sequence)
            first, longest = polls
            room.interval = min(room.interval * 1.5, longest) if room is look.room else room.interval or first
            # A look just before the lease ends would come for nothing, so it comes just after.
            polling = room.interval * (0.75 + 0.25 * self._jitter())
            due = now + min(polling, lease_left + 0.001 + 0.02 * self._jitter())
            room.due = due if room.due is None or room is look.room else min(room.due, due)
            self._alarm(room.due)
            came, early = self._early.get(fence, (0, b""))
            self._end(look)
            if came < look.sequence:  # before this look began
                self._next(room)
            elif early:
                self._finish(tuple(room.seats), Settled(early))
                self._next(room)
            elif room.looker is None and room.seats:
                self._give_turn(room)
            elif not room.seats:
                self._next(room)

    def away(self, seat: Seat) -> None:
        """A caller computes, and cannot look for anybody until it is back."""
        with self._lock:
            seat.away = True
            room = seat.room
            if room is not None and room.looker is seat:
                seat.turn = None
                room.looker = None
                room.rung = True
                self._next(room)

    def back(self, seat: Seat) -> None:
        """It has computed."""
        with self._lock:
            seat.away = False
            if seat.room is not None:
                self._next(seat.room)

    def leave(self, seat: Seat) -> Place | None:
        """Unseat a caller. Returns the registration to give up, if it was the last that needed it."""
        with self._lock:
            return None if seat.room is None else self._leave(seat, seat.room)

    def part(self, seat: Seat) -> tuple[Question, Place | None]:
        """Unseat a caller whose time is over → its question, and if it is the one to ask that what it gives up by that.

        All others have their turn when it is answered.
        """
        with self._lock:
            room, now = seat.room, self._clock()
            if room is None:  # its turn has just become an outcome
                return Question(now), None
            place = self._leave(seat, room)
            seat.turn = None
            question = room.question
            if place is not None or question is None or now >= question.asked + _SAME_MOMENT:
                room.question = Question(now)
                return room.question, place or Place(room.fence, 0)
            if question.answered:
                seat.turn = question.told
            else:
                question.seats.append(seat)
            return question, None

    def answered(self, question: Question) -> None:
        """Who asked knows all that it can know."""
        with self._lock:
            question.answered = True
            for seat in question.seats:
                seat.turn = question.told
                seat.wake()
            question.seats.clear()

    def notice(self, fence: str, raw: bytes) -> None:
        """A notice came for a flight, with its outcome or (empty) to say: look again."""
        with self._lock:
            if self._looks:  # it may be faster than the reply that tells whom to wait for
                self._early[fence] = self._sequence, raw
                if len(self._early) > _MOST_EARLY_NOTICES:
                    del self._early[next(iter(self._early))]
            for room in self._of(fence):
                if raw:
                    self._finish(tuple(room.seats), Settled(raw))
                else:
                    room.rung = True
                self._next(room)

    def progressed(self, fence: str, raw: bytes) -> None:
        """A report of the flight's run: let those know who want to.

        Of several the latest counts: what comes by a look may be older or newer than what comes by notices.
        """
        attempt, number, progress = raw.split(b" ", 2)
        report = int(attempt), int(number)
        with self._lock:
            for seat in (seat for room in self._of(fence) for seat in room.seats):
                if seat.follows and seat.told < report and (seat.turn is None or isinstance(seat.turn, Progressed)):
                    seat.told = report
                    seat.turn = Progressed(progress)
                    seat.wake()

    def heard(self, seat: Seat, turn: Progressed) -> None:
        """A caller has taken note, and waits on."""
        with self._lock:
            if seat.turn is turn:
                seat.turn = None

    def ring_all(self) -> None:
        """Notices may have been lost: everybody looks again."""
        with self._lock:
            for room in list(self._flights.values()):
                room.rung = True
                self._next(room)

    def close(self, why: Broken) -> None:
        """Nobody listens any more: those who wait, and whoever may still come, have to be told."""
        with self._lock:
            self._closed = why
            for room in [*self._lobbies.values(), *self._flights.values()]:
                self._finish(tuple(room.seats), why)
                self._next(room)

    def tick(self, now: float) -> float | None:
        """Ring the rooms whose time has come. Returns when the next one is due, None if there is none."""
        with self._lock:
            soonest: float | None = None
            for rooms in (self._lobbies, self._flights):
                for room in list(rooms.values()):
                    due = room.due if room.looker is None else room.passes
                    if due is not None and due <= now:
                        self._pass_on(room)
                        due = room.due if room.looker is None else room.passes
                    if due is not None and (soonest is None or due < soonest):
                        soonest = due
            return soonest

    # The lock is held in all that follow.

    def _leave(self, seat: Seat, room: _Room) -> Place | None:
        seat.room = None
        del room.seats[seat]
        if room.looker is seat:
            room.looker = None
            room.rung = True
        self._next(room)
        if room.seats or not room.sequence:
            return None
        for other in self._flights.values():
            same = other.fence == room.fence if room.fence else other.entry == room.entry
            if same and other is not room:  # the registration is for both
                other.sequence = max(other.sequence, room.sequence)
                return None
        return Place(room.fence, room.sequence)

    def _of(self, fence: str) -> list[_Room]:
        rooms = (self._flights.get((fence, mode)) for mode in _MODES)
        return [room for room in rooms if room is not None]

    def _pass_on(self, room: _Room) -> None:
        """Give the turn to look to somebody else than who has it, if somebody has."""
        late = room.looker
        if late is not None:
            room.looker = None
            room.seats[late] = room.seats.pop(late)  # behind all others
            if late.turn is Turn.LOOK:
                late.turn = None
        self._give_turn(room)

    def _give_turn(self, room: _Room, *, newcomer: bool = False) -> None:
        room.due = None
        gone = []
        for seat in room.seats:
            ready = None if seat.away else seat.ready()
            if ready:
                room.looker = seat
                room.passes = self._clock() + _LONGEST_TURN
                seat.turn = Turn.LOOK
                seat.wake()
                if not newcomer:  # who takes its turn itself, and at once
                    self._alarm(room.passes)
                break
            if ready is None and not seat.away:
                gone.append(seat)
        else:
            room.rung = True  # the first who is back looks, or
            room.due = self._clock() + _LONGEST_TURN  # who is reached then
        for seat in gone:
            del room.seats[seat]
            seat.room = None
        if not room.seats:
            self._next(room)

    def _next(self, room: _Room) -> None:
        """Close an empty room; let somebody look where a look is due."""
        if not room.seats:
            if room.fence:
                if self._flights.get((room.fence, room.mode)) is room:
                    del self._flights[room.fence, room.mode]
            elif self._lobbies.get(room.key) is room and room.looker is None:
                del self._lobbies[room.key]
        elif room.looker is None and (room.rung or not room.fence):
            self._give_turn(room)

    def _end(self, look: Look, *, place_kept: bool = False) -> None:
        self._looks -= 1
        if not self._looks:
            self._early.clear()
        room = look.room
        if room.look is look:
            room.look = None
        if room.looker is look.seat:
            room.looker = None
        if room.due is None and room.looker is None:
            room.rung = True  # nothing else would wake those who came while it looked
        if not room.fence and not place_kept:
            room.sequence = 0  # the registration went with those who moved to the flight's room
        self._next(room)

    def _finish(self, seats: Iterable[Seat], turn: Settled | Broken) -> None:
        for seat in seats:
            if seat.room is not None:
                del seat.room.seats[seat]
                if seat.room.looker is seat and seat.turn is Turn.LOOK:
                    seat.room.looker = None  # it was told to look, and need not any more
                seat.room = None
                seat.turn = turn
                seat.wake()
