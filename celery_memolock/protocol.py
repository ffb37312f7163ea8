"""The core: what a caller does to get a value, and what a worker does to make one.

Both are generators that yield *effects* and are sent *replies*. They own every decision and touch nothing: no
socket, clock, thread or queue. A driver performs the effects (see `drive`); threads, asyncio, Celery and tests
differ only in how.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar

from .codec import Codec, Entry, Packed, fence_of, pack_error, unpack_error
from .errors import (
    DecodeError,
    EncodeError,
    FlightFailed,
    MemoLockError,
    ReentrantFlight,
    StoreUnavailable,
    ValueTooLarge,
    WaitTimeout,
)
from .keys import Keys
from .local import Local
from .options import Options
from .rooms import Broken, Place, Rooms, Seat, Settled

__all__ = [
    "MISS",
    "Acquire",
    "Body",
    "Call",
    "Claim",
    "Confirm",
    "Defer",
    "Disown",
    "Dispatch",
    "Done",
    "Finished",
    "Get",
    "GetAll",
    "GoesOn",
    "Hold",
    "Invalidate",
    "Leave",
    "Listen",
    "Missing",
    "Pause",
    "Put",
    "Raised",
    "Release",
    "Renew",
    "Requeue",
    "Returned",
    "Run",
    "RunAll",
    "Script",
    "Settle",
    "Skip",
    "TakeSeat",
    "TakeSeats",
    "Ticket",
    "Uncached",
    "Unreadable",
    "Wait",
    "WaitForAny",
    "Waiting",
    "Won",
    "compute",
    "drive",
    "fetch",
    "invalidate",
    "new_nonce",
    "peek",
    "put",
    "refresh",
]

T = TypeVar("T")
Core = Generator[Any, Any, T]
Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


class Missing(Enum):
    """The type of `MISS`."""

    MISS = "no value"

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return self.name

    __str__ = __repr__


#: What `peek` returns when nothing is stored; false in a condition, unlike any stored value it `is` nothing else.
MISS: Final = Missing.MISS

UNCLAIMED: Final = ("P", "Q")

#: Seconds that the broker is given at least, however soon the caller that won the flight gives up.
LEAST_DISPATCH: Final = 1.0


def new_nonce() -> str:
    """Return 64 random bits as text. A repeat of a call with the same nonce gets the same answer."""
    return secrets.token_hex(8)


# ---- records ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one task, as the core sees it.

    Attributes:
        inline: asked on a miss: is the value to be computed in this very caller if nobody has begun to?
        chain: the entries that are being computed where the call was made, outermost first.
        overrides: the options that this call set, which its flight takes along.
        arguments: positional and by name; the core only hands them on.
        local: where values are kept in this process, if they are.
    """

    task: str
    keys: Keys
    options: Options
    codec: Codec
    inline: Callable[[], bool] = bool
    chain: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    arguments: Arguments = ((), {})
    local: Local | None = None

    @property
    def park(self) -> float:
        """How long, in seconds, an outcome is kept for waiters that cannot read it from the entry."""
        return max(30.0, 3 * self.options.max_poll_interval)

    @property
    def fleeting(self) -> bool:
        """Whether a value may be gone before a waiter whose notice got lost looks by itself."""
        return self.options.ttl < self.options.max_poll_interval


@dataclass(frozen=True, slots=True)
class Ticket:
    """What travels with a flight's message: which flight it is for, and how the winner wants it run."""

    keys: Keys
    fence: str
    chain: tuple[str, ...]
    overrides: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Done:
    """Reply of `Acquire`: the outcome is there."""

    raw: bytes


@dataclass(frozen=True, slots=True)
class Waiting:
    """Reply of `Acquire`: somebody computes it. Times in seconds."""

    fence: str
    lease_left: float
    state: str
    since: float


@dataclass(frozen=True, slots=True)
class Won:
    """Reply of `Acquire`: the caller has to dispatch this flight."""

    fence: str
    lease: float


@dataclass(frozen=True, slots=True)
class Run:
    """Reply of `Claim`: run it. The same attempt of the same fence never runs twice."""

    fence: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Defer:
    """Reply of `Claim`: not now; ask again in so many seconds."""

    delay: float


@dataclass(frozen=True, slots=True)
class Skip:
    """Reply of `Claim`: the message is not needed."""

    reason: str


# ---- effects: the server ---------------------------------------------------------------------------------------


class Script:
    """An effect that is one atomic script on the server. Raises `StoreUnavailable` when it cannot run."""

    __slots__ = ()
    keys: Keys


@dataclass(frozen=True, slots=True)
class Get:
    """Read the entry → bytes or None. All that a hit costs.

    Attributes:
        patience: seconds that the caller has.
    """

    keys: Keys
    patience: float


@dataclass(frozen=True, slots=True)
class GetAll:
    """Read several entries in one trip → a list of bytes or None."""

    keys: tuple[Keys, ...]
    patience: float


@dataclass(frozen=True, slots=True)
class RunAll:
    """Run several scripts in one trip → a list of their replies, with `StoreUnavailable` for each that failed."""

    scripts: tuple[Script, ...]


@dataclass(frozen=True, slots=True)
class Acquire(Script):
    """Look: → `Done`, `Waiting` or `Won`.

    Attributes:
        register: sequence of the registration that is made; None if the caller will not wait.
        wanted: for how many more seconds the caller is ready to wait.
    """

    keys: Keys
    options: Options
    nonce: str
    mode: Literal["miss", "force"]
    seen: str
    following: str
    register: int | None
    wanted: float
    park: float
    crashed: Packed


@dataclass(frozen=True, slots=True)
class Confirm(Script):
    """The message was sent: PENDING → QUEUED."""

    keys: Keys
    fence: str
    lease: float


@dataclass(frozen=True, slots=True)
class Claim(Script):
    """A worker asks whether to run a message → `Run`, `Defer` or `Skip`."""

    keys: Keys
    options: Options
    fence: str
    nonce: str
    holder: str
    retries: int
    redelivered: bool
    park: float
    crashed: Packed


@dataclass(frozen=True, slots=True)
class Renew(Script):
    """A sign of life of a run → "CONTINUE", "DETACHED" or "LOST"."""

    keys: Keys
    run: Run
    lease: float


@dataclass(frozen=True, slots=True)
class Requeue(Script):
    """A run goes back to the queue → "OK", "DETACHED" or "LOST"."""

    keys: Keys
    run: Run
    retries: int
    lease: float


@dataclass(frozen=True, slots=True)
class Settle(Script):
    """A run, or with attempt 0 a failed dispatch, ends → "OK", "AGAIN", "DETACHED" or "REFUSED"."""

    keys: Keys
    run: Run
    kind: Literal["V", "E"]
    outcome: Packed
    ttl: float
    park: float
    fleeting: bool = False


@dataclass(frozen=True, slots=True)
class Disown(Script):
    """The worker's main process knows that a run, or with no holder a message, came to nothing → whether it mattered.

    With an outcome the flight fails for all; without one, those who wait may take over at once.
    """

    keys: Keys
    fence: str
    holder: str
    outcome: Packed | None
    park: float


@dataclass(frozen=True, slots=True)
class Put(Script):
    """Set a value from outside → its fence."""

    keys: Keys
    nonce: str
    outcome: Packed
    ttl: float
    park: float
    fleeting: bool


@dataclass(frozen=True, slots=True)
class Invalidate(Script):
    """Drop the value, and whatever is being computed from older data → whether there was a value."""

    keys: Keys
    nonce: str
    park: float


@dataclass(frozen=True, slots=True)
class Leave(Script):
    """Give up a registration → (state, seconds in it) of the flight, or None if it is over."""

    keys: Keys
    place: Place


# ---- effects: this process -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Listen:
    """Return when the inbox of this process is subscribed, and the server has acknowledged that."""

    timeout: float


@dataclass(frozen=True, slots=True)
class TakeSeat:
    """Make a seat that this driver can wait on → `Seat`."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until the seat has a turn, at most so many seconds → the turn, or None."""

    seat: Seat
    timeout: float


@dataclass(frozen=True, slots=True)
class TakeSeats:
    """Make several seats that this driver can wait on together → a list of `Seat`."""

    count: int


@dataclass(frozen=True, slots=True)
class WaitForAny:
    """Wait until one of the seats has a turn, at most so many seconds."""

    seats: tuple[Seat, ...]
    timeout: float


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Hand the flight's message to the queue, or run it here and now if the call is `inline`."""

    ticket: Ticket
    arguments: Arguments
    inline: bool
    timeout: float


@dataclass(frozen=True, slots=True)
class Uncached:
    """Run the bare task here and now, without cache or flight → its result."""

    arguments: Arguments


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Tell the log, once, that a stored entry cannot be read and counts as a miss."""

    error: MemoLockError


@dataclass(frozen=True, slots=True)
class Hold:
    """Begin to renew the lease of a run."""

    keys: Keys
    run: Run
    lease: float
    max_run: float


@dataclass(frozen=True, slots=True)
class Body:
    """Run the task's own code → `Returned`, `Raised` or `GoesOn`."""

    run: Run


@dataclass(frozen=True, slots=True)
class Release:
    """End what `Hold` began."""

    run: Run


@dataclass(frozen=True, slots=True)
class Pause:
    """Do nothing for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Returned:
    """Outcome of `Body`: a value."""

    value: Any


@dataclass(frozen=True, slots=True)
class Raised:
    """Outcome of `Body`: an error for all who wait."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class GoesOn:
    """Outcome of `Body`: the flight went back to the queue (a retry), and its waiters keep waiting."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What `compute` did.

    Attributes:
        answer: of the settling; None if the flight goes on, or the outcome could not be brought to the server.
        refused: why a returned value could not be stored, or an outcome not be brought to the server.
    """

    answer: str | None
    refused: MemoLockError | None = None


# ---- the caller ------------------------------------------------------------------------------------------------


def fetch(call: Call, rooms: Rooms, clock: Callable[[], float]) -> Core[Any]:
    """Return the value of a call: a hit, or the outcome of the one flight that computes it.

    Raises:
        WaitTimeout: no outcome within `wait_timeout`.
        StoreUnavailable, DispatchError, DecodeError, ValueTooLarge: as their docstrings say.
        Exception: whatever the task raised.
    """
    if call.keys.entry in call.chain:
        raise ReentrantFlight(
            f"task {call.task!r} asked for key {call.keys.tag!r} while computing it; the chain is: "
            + " -> ".join(Keys(entry).tag for entry in (*call.chain, call.keys.entry))
        )
    began = clock()
    deadline = began + call.options.wait_timeout
    seen = ""
    local = call.local
    ticket = local.begin(call.keys.entry) if local is not None else None
    try:
        raw = yield Get(call.keys, call.options.wait_timeout)
        if raw is not None:
            try:
                entry = Entry.parse(raw)
                value = _value_of(call, entry)
            except (DecodeError, ValueTooLarge) as error:
                yield Unreadable(error)
                seen = fence_of(raw)
            else:
                if local is not None and ticket is not None:
                    local.end(call.keys.entry, ticket, value, entry)
                return value
    finally:
        if local is not None and ticket is not None:
            local.end(call.keys.entry, ticket)

    yield Listen(max(0.0, deadline - clock()))
    seat: Seat = yield TakeSeat()
    rooms.enter(call.keys.entry, seat)
    place: Place | None = None
    flight: tuple[str, float] | None = None
    trouble: StoreUnavailable | None = None
    try:
        while True:
            turn = yield Wait(seat, deadline - clock())
            if isinstance(turn, Settled):
                return _value(call, turn.raw)
            if isinstance(turn, Broken):
                raise turn.error(turn.message)
            if turn is None or clock() >= deadline:
                break
            trouble = yield from _look(call, rooms, seat, seen, deadline, clock)
    except GeneratorExit:
        rooms.leave(seat)  # the driver is gone: nobody would perform what follows
        raise
    finally:
        place = rooms.leave(seat)
        if place is not None:
            try:
                flight = yield Leave(call.keys, place)
            except StoreUnavailable:
                pass  # the registration goes with its flight, at the latest with the flight's lease
    raise WaitTimeout(_too_late(call, clock() - began, flight)) from trouble


def refresh(call: Call) -> Core[bool]:
    """Have the value computed anew, without waiting; the old one is served until then.

    Returns True if this call started the flight. A flight that waits for a worker is joined; after one that runs
    already (it may have read older data) the worker starts the next.
    """
    reply = yield _acquire(call, "force")
    if isinstance(reply, Won):
        yield from _dispatch(call, reply.fence)
        return True
    return False


def peek(call: Call) -> Core[Any]:
    """Return the stored value, or `MISS`."""
    raw = yield Get(call.keys, call.options.wait_timeout)
    if raw is not None:
        try:
            return _value(call, raw)
        except (DecodeError, ValueTooLarge) as error:
            yield Unreadable(error)
    return Missing.MISS


def invalidate(call: Call) -> Core[bool]:
    """Drop the value and whatever is being computed from older data → whether there was a value."""
    _forget(call)
    try:
        return (yield Invalidate(call.keys, new_nonce(), call.park))  # type: ignore[no-any-return]
    finally:
        _forget(call)


def put(call: Call, value: Any) -> Core[None]:
    """Store a value from outside; a running flight's waiters get it, and its late outcome is refused."""
    packed = call.codec.pack(value)
    _forget(call)
    try:
        yield Put(call.keys, new_nonce(), packed, call.options.ttl, call.park, call.fleeting)
    finally:
        _forget(call)


def _forget(call: Call) -> None:
    """Before a change nobody else shall be served the old value here, and after it no read from before it kept."""
    if call.local is not None:
        call.local.drop(call.keys.entry)


def _look(
    call: Call, rooms: Rooms, seat: Seat, seen: str, deadline: float, clock: Callable[[], float]
) -> Core[StoreUnavailable | None]:
    """Look for everybody in the room → what kept this caller, and only this one, from getting a reply in its time."""
    look = rooms.begin_look(seat)
    try:
        wanted = max(0.0, deadline - clock())
        reply = yield _acquire(call, "miss", seen, look.following, look.sequence, wanted)
    except StoreUnavailable as error:
        if clock() >= deadline:
            rooms.interrupted(look)  # the others may have more time
            return error
        rooms.broken(look, StoreUnavailable, str(error))
        return None
    except BaseException:
        rooms.interrupted(look)
        raise
    if isinstance(reply, Done):
        rooms.settled(look, reply.raw)
        return None
    polls = (call.options.poll_interval, call.options.max_poll_interval)
    left = reply.lease if isinstance(reply, Won) else reply.lease_left
    rooms.wait(look, reply.fence, left, clock(), polls)
    # An inline caller does not wait for a worker to begin: it may well occupy the only one.
    if isinstance(reply, Won) or (call.inline() and reply.state in UNCLAIMED):
        yield from _dispatch(call, reply.fence, wanted)
    return None


def _dispatch(call: Call, fence: str, patience: float = math.inf) -> Core[None]:
    # Others may have more time than the winner has, so it is not the winner's last moment that fails the flight.
    timeout = min(call.options.dispatch_lease, max(patience, LEAST_DISPATCH))
    ticket = Ticket(call.keys, fence, call.chain, call.overrides)
    inline = call.inline()
    try:
        yield Dispatch(ticket, call.arguments, inline, timeout)
    except Exception as error:
        # The flight fails for all its waiters; were they to try in turn, each would wait for the broker.
        yield Settle(call.keys, Run(fence, 0), "E", pack_error(error), call.options.error_ttl, call.park)
        raise
    if not inline:
        try:
            yield Confirm(call.keys, fence, call.options.queue_timeout)
        except StoreUnavailable:
            pass  # the message is out, and the worker's claim does without


def _acquire(
    call: Call,
    mode: Literal["miss", "force"],
    seen: str = "",
    following: str = "",
    register: int | None = None,
    wanted: float = 0.0,
) -> Acquire:
    return Acquire(
        call.keys,
        call.options,
        new_nonce(),
        mode,
        seen,
        following,
        register,
        wanted,
        call.park,
        _crashed(call.task, call.options.max_crashes),
    )


def _value(call: Call, raw: bytes) -> Any:
    return _value_of(call, Entry.parse(raw))


def _value_of(call: Call, entry: Entry) -> Any:
    if entry.failed:
        raise unpack_error(entry)
    return call.codec.unpack(entry)


def _too_late(call: Call, waited: float, flight: tuple[str, float] | None) -> str:
    text = f"no value of task {call.task!r}, key {call.keys.tag!r}, within {waited:.1f} s"
    if flight is None:
        return text
    state, seconds = flight
    return text + {
        "P": f": its flight has been PENDING for {seconds:.1f} s (its message is on the way to the broker)",
        "Q": f": its flight has been QUEUED for {seconds:.1f} s (no worker took it; does one consume its queue?)",
        "R": f": its flight has been RUNNING for {seconds:.1f} s (the task takes longer than wait_timeout)",
    }.get(state, "")


@lru_cache(maxsize=1024)
def _crashed(task: str, times: int) -> Packed:
    return pack_error(FlightFailed(f"task {task!r} lost its worker {times} times over one flight"))


# ---- the worker ------------------------------------------------------------------------------------------------


def compute(
    call: Call, ticket: Ticket, holder: str, retries: int, redelivered: bool, clock: Callable[[], float]
) -> Core[Finished | Defer | Skip]:
    """Run a flight's message: claim it, run the task under a renewed lease, and settle its outcome."""
    options = call.options
    claim = Claim(
        ticket.keys,
        options,
        ticket.fence,
        new_nonce(),
        holder,
        retries,
        redelivered,
        call.park,
        _crashed(call.task, options.max_crashes),
    )
    run = yield from _patiently(claim, options.lease, clock)
    if not isinstance(run, Run):
        return run  # type: ignore[no-any-return]
    yield Hold(ticket.keys, run, options.lease, options.max_run)
    try:
        outcome = yield Body(run)
    finally:
        yield Release(run)
    if isinstance(outcome, GoesOn):
        return Finished(None)
    settle, refused = _settlement(call, ticket, run, outcome)
    try:
        return Finished((yield from _patiently(settle, options.lease, clock)), refused)
    except StoreUnavailable as error:
        return Finished(None, error)


def _settlement(
    call: Call, ticket: Ticket, run: Run, outcome: Returned | Raised
) -> tuple[Settle, EncodeError | ValueTooLarge | None]:
    """Encode an outcome; a value that cannot be stored becomes an error for all who wait."""
    options = call.options
    error: BaseException
    refused = None
    if isinstance(outcome, Returned):
        try:
            packed = call.codec.pack(outcome.value)
            return Settle(ticket.keys, run, "V", packed, options.ttl, call.park, call.fleeting), None
        except (EncodeError, ValueTooLarge) as unstorable:
            error = refused = unstorable
    else:
        error = outcome.error
    return Settle(ticket.keys, run, "E", pack_error(error), options.error_ttl_of(error), call.park), refused


def _patiently(effect: Script, patience: float, clock: Callable[[], float]) -> Core[Any]:
    """Try again while the server is away: after `patience` seconds the lease is over and others take over."""
    deadline = clock() + patience
    delay = 0.1
    while True:
        try:
            return (yield effect)
        except StoreUnavailable:
            if clock() + delay >= deadline:
                raise
        yield Pause(delay)
        delay = min(2 * delay, 1.0)


# ---- drivers ---------------------------------------------------------------------------------------------------


def drive(core: Core[T], perform: Callable[[Any], Any]) -> T:
    """Perform a core's effects, one after the other, in the calling thread.

    An exception of an effect, KeyboardInterrupt too, is raised inside the core, which may then still ask for
    effects that clean up.
    """
    try:
        effect = next(core)
        while True:
            try:
                reply = perform(effect)
            except BaseException as error:
                effect = core.throw(error)
            else:
                effect = core.send(reply)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
