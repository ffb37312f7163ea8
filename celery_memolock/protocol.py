"""The core: what a caller does to get a value, and what a worker does to make one.

Both are generators over the effects of `effects.py`: they decide, and whoever drives them does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar

from .clock import Clock
from .codec import Entry, Packed, fence_of, pack_error, unpack_error
from .effects import (
    Acquire,
    Aside,
    Attempts,
    Attendance,
    Body,
    CachedEntry,
    Call,
    Claim,
    Confirm,
    Core,
    Defer,
    Dispatch,
    Done,
    Expire,
    Finished,
    Get,
    GoesOn,
    Hold,
    Index,
    Interrupted,
    Invalidate,
    Leave,
    Listen,
    Members,
    Missing,
    Onward,
    Own,
    Pause,
    Put,
    Raised,
    Release,
    Renew,
    Requeue,
    Returned,
    Run,
    RunAll,
    Scan,
    Script,
    ServerTime,
    Settle,
    Skip,
    TakeSeat,
    Ticket,
    Unreadable,
    Wait,
    Waiting,
    Withdraw,
    Won,
    new_nonce,
)
from .errors import (
    ArgumentError,
    DecodeError,
    DispatchError,
    EncodeError,
    FlightFailed,
    MemoLockError,
    OptionError,
    StoreUnavailable,
    ValueTooLarge,
    WaitTimeout,
    described,
)
from .keys import Keys, TagKeys, pattern
from .options import Options, Progress
from .rooms import Broken, Place, Progressed, Rooms, Seat, Settled, Told

__all__ = [
    "EARLY",
    "compute",
    "expire",
    "fetch",
    "invalidate",
    "invalidate_all",
    "invalidate_tag",
    "peek",
    "put",
    "refresh",
]

T = TypeVar("T")

UNCLAIMED: Final = ("P", "Q")

#: Seconds that the last look before a stale value is served on an error may take.
LAST_LOOK: Final = 0.25

#: Seconds that a caller whose time is over takes at the most to find out what it waited for.
LAST_QUESTION: Final = 0.5

#: Options with which a call neither takes what is kept in its process nor keeps it there: other calls of the task would
#: have it refreshed at another moment.
EARLY: Final = frozenset(("beta", "early_refresh"))

#: Seconds that an index names an entry for beyond the time that is reckoned with.
INDEX_GRACE: Final = 60.0

#: Seconds that the broker is given at least, however soon the caller that won the flight gives up.
LEAST_DISPATCH: Final = 1.0


# ---- the caller ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Wish:
    """What a waiting caller is content with: any fresh value, or one whose computing starts after its call.

    Attributes:
        own: what its own `on_progress` raised: an error of the caller, not of the flight.
        quiet: whether nobody hears of a time-out, as a stale value is returned then.
    """

    mode: Literal["miss", "force"] = "miss"
    seen: str = ""
    since: int = 0
    own: Exception | None = None
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class _Looked:
    """What a look came to for the looker alone.

    Attributes:
        trouble: what kept it, and only it, from getting a reply in its time.
        own: the outcome of the run that it did itself, where that is its answer.
        busy: seconds that it did so, and did not wait.
    """

    trouble: StoreUnavailable | None = None
    own: Returned | Raised | GoesOn | None = None
    busy: float = 0.0


@dataclass(frozen=True, slots=True)
class _Spare:
    """A stale value that may be returned if no better one comes.

    Attributes:
        softly: whether it is to be returned as a stale one after `soft_timeout`, which is no error.
    """

    value: Any
    entry: Entry
    softly: bool = False


def fetch(call: Call, rooms: Rooms, clock: Clock) -> Core[Any]:
    """Return the value of a call: a hit, or the outcome of the one flight that computes it.

    Raises:
        WaitTimeout: no outcome within `wait_timeout`.
        StoreUnavailable, DispatchError, DecodeError, ValueTooLarge: as their docstrings say.
        Exception: whatever the task raised.
    """
    options, key = call.options, call.keys.entry
    if call.chain:
        call.refuse_to_wait_for_itself()
    if options.force_refresh:
        lobby = f"{key} {new_nonce()}"  # nobody else's look is late enough for sure
        return Onward(_join(call, rooms, clock, _Wish("force"), lobby, options.wait_timeout))
    began = clock()
    deadline = began + options.wait_timeout
    seen = ""
    spare: _Spare | None = None
    local = call.local if EARLY.isdisjoint(call.overrides) else None
    if call.described and local is not None and (kept := local.entry(key)) is not None:
        return (yield from _describe(call, call.codec.unpack(kept), kept, clock, source="local"))
    ticket = local.begin(key) if local is not None else None
    try:
        raw = yield Get(call.keys, options.wait_timeout)
        if raw is not None:
            try:
                entry = Entry.parse(raw)
                value = _value_of(call, entry)
            except (DecodeError, ValueTooLarge) as error:
                yield Unreadable(error)
                seen = fence_of(raw)
            else:
                left = math.inf
                # To a key that nobody reads its server may come long after its time: what is kept here ends by itself.
                if entry.soft or options.early_refresh is not None or local is not None:
                    left = (entry.fresh_until - (yield from _server_time(clock))) / 1e6
                if left > 0:
                    early = math.inf if options.early_refresh is None else _early_in(options, entry, left)
                    if early <= 0:
                        yield from _revalidate(call, rooms, clock, entry)
                    elif local is not None and ticket is not None:
                        local.end(key, ticket, value, entry, left, early)
                    return (yield from _describe(call, value, entry, clock)) if call.described else value
                if -left < options.stale_ttl and options.soft_timeout is None:
                    if not call.described:
                        yield from _revalidate(call, rooms, clock, entry)
                        return value
                    why_stale = yield from _ask_anew(call, entry)
                    return (yield from _spared(call, _Spare(value, entry), clock, why_stale))
                if -left < options.keep_stale:
                    spare = _Spare(value, entry, -left < options.stale_ttl)
                    if spare.softly and options.soft_timeout is not None:
                        deadline = min(deadline, clock() + options.soft_timeout)
                        # Who computes it himself cannot stop waiting.
                        call = _unawaited(replace(call, inline=call.eager, holder=str))
                seen = entry.fence
    except StoreUnavailable as error:
        last = call.local.quarantined(key, options.stale_if_error) if call.local is not None else None
        if last is None:
            raise
        value = call.codec.unpack(last)
        return CachedEntry(value, "error", "local", None, last.fence, error) if call.described else value
    finally:
        if local is not None and ticket is not None:
            local.end(key, ticket)
    wish = _Wish(seen=seen, quiet=spare is not None and spare.softly)
    if spare is None:
        return Onward(_join(call, rooms, clock, wish, key, deadline - clock(), began))
    if not spare.softly and (why := rooms.resting(key, spare.entry.fence, clock())) is not None:
        yield from _revalidate(call, rooms, clock, spare.entry)  # the next who waits is not to do so in vain
        return (yield from _spared(call, spare, clock, why.another()))
    try:
        return (yield from _join(call, rooms, clock, wish, key, deadline - clock(), began))
    except Exception as error:
        if error is wish.own:
            raise
        found = yield from _still_there(call, spare, error)
        if found is not spare and found.entry.fresh_until > (yield from _server_time(clock)):
            return (yield from _describe(call, found.value, found.entry, clock)) if call.described else found.value
        if isinstance(error, WaitTimeout) and spare.softly:
            return (yield from _spared(call, found, clock))
        if isinstance(error, WaitTimeout | DispatchError):
            pause = options.error_ttl_of(error)
            rooms.rest(key, spare.entry.fence, clock() + pause, Broken.by(error))
        return (yield from _spared(call, found, clock, error))


def _spared(call: Call, spare: _Spare, clock: Clock, error: Exception | None = None) -> Core[Any]:
    """Return a stale value, as that or with the error for which there is no fresh one."""
    if not call.described:
        return spare.value
    state: Literal["stale", "error"] = "stale" if error is None else "error"
    return (yield from _describe(call, spare.value, spare.entry, clock, state, error=error))


def _join(
    call: Call, rooms: Rooms, clock: Clock, wish: _Wish, lobby: str, patience: float, began: float = math.inf
) -> Core[Any]:
    """Wait for the one flight that computes the value, or start it → the value.

    A look that was sent after the call `began` will do.
    """
    call.check()
    seat: Seat = yield TakeSeat()
    joined = clock()  # of several calls whose caller computes one after the other, each has its time for itself
    deadline = joined + patience
    waits_since = joined - (call.options.wait_timeout - patience)  # what went before was waiting, too
    try:
        yield Listen(max(0.0, patience))
    except StoreUnavailable:
        if clock() < deadline:
            raise  # else it is the caller's own time that is over, and not the server's
    seat.follows = call.options.on_progress is not None
    rooms.enter(lobby, seat, wish.mode, began)
    place: Place | None = None
    told = Told()
    trouble: StoreUnavailable | None = None
    own: Returned | Raised | GoesOn | None = None
    try:
        while True:
            turn = yield Wait(seat, deadline - clock())
            failed = isinstance(turn, Broken) or (isinstance(turn, Settled) and turn.entry.failed)
            if failed and isinstance(own, GoesOn):
                patience = LAST_LOOK if isinstance(turn, Settled) else deadline - clock()
                own = yield Own(own.run, patience)
                if isinstance(own, Returned | Raised):
                    return _answer(call, own)
            if isinstance(turn, Settled):
                entry = turn.entry
                if entry.started >= wish.since:
                    if call.local is not None:
                        call.local.supersede(call.keys.entry, entry)
                    value = _value_of(call, entry)
                    if not call.described:
                        return value
                    return (yield from _describe(call, value, entry, clock, source="flight"))
                seat.turn = None
                rooms.enter(lobby, seat, wish.mode)  # that run began before this call, and the next is on its way
                continue
            if isinstance(turn, Broken):
                raise turn.another()
            if isinstance(turn, Progressed):
                rooms.heard(seat, turn)
                if call.options.on_progress is not None:
                    try:
                        call.options.on_progress(Progress.parse(turn.raw))
                    except Exception as error:
                        wish.own = error
                        raise
                continue
            if turn is None or clock() >= deadline:
                ended = clock()
                if not wish.quiet:
                    told = yield from _last_word(call, rooms, seat, clock)
                break
            looked = yield from _look(call, rooms, seat, wish, deadline, clock)
            trouble = looked.trouble
            deadline += looked.busy
            own = looked.own or own
            if isinstance(own, Returned | Raised):
                return _answer(call, own)
    except GeneratorExit:
        rooms.leave(seat)  # the driver is gone: nobody would perform what follows
        raise
    finally:
        place = rooms.leave(seat)
        if place is not None:
            try:
                yield Leave(call.keys, place)
            except StoreUnavailable:
                pass  # the registration goes with its flight, at the latest with the flight's lease
    raise _too_late(call, ended - waits_since, ended, told) from trouble


def _last_word(call: Call, rooms: Rooms, seat: Seat, clock: Clock) -> Core[Told]:
    """Leave, and find out what this caller, and all whose time is over at the same moment, have waited for."""
    until = clock() + LAST_QUESTION
    question, place = rooms.part(seat)
    if place is None:
        yield Wait(seat, LAST_QUESTION)
        return question.told
    try:
        flight = yield Leave(call.keys, place)
        if flight is not None:
            state, seconds = flight
            question.told = Told(state, clock() - seconds)
            if state == "Q":
                if (yield Attempts(call.keys, place.fence)):
                    workers = _SENT_BACK
                else:
                    since = question.told.since
                    workers = yield Attendance(call.arguments, since, max(0.0, until - clock()))
                question.told = replace(question.told, workers=workers)
    except StoreUnavailable:
        pass  # a registration goes with its flight, at the latest with the flight's lease
    finally:
        rooms.answered(question)
    return question.told


def _answer(call: Call, own: Returned | Raised) -> Any:
    """Return or raise what a caller's own run came to."""
    if isinstance(own, Raised):
        raise own.error
    return CachedEntry(own.value, "fresh", "flight", 0.0, "") if call.described else own.value


def _server_time(clock: Clock) -> Core[int]:
    now = clock.server()
    if now is None:
        asked = clock()
        now = yield ServerTime()
        clock.learn(now, asked, clock())
    return now


def _early_in(options: Options, entry: Entry, left: float) -> float:
    """In how many seconds a value that is fresh for so many more is to be refreshed; 0 or less: now."""
    early = options.early_refresh
    if early == "xfetch":
        # -log of a number from 0 to 1 is distributed exponentially: so do the paper's readers draw.
        return left - entry.compute_time / 1e6 * options.beta * -math.log(1.0 - random.random())
    assert early is not None
    return left - (1.0 - early) * (entry.fresh_until - entry.stored) / 1e6


def _revalidate(call: Call, rooms: Rooms, clock: Clock, entry: Entry) -> Core[None]:
    """Have a value computed anew, once, while the caller takes the old one."""
    if not rooms.may_refresh(call.keys.entry, entry.fence, clock()):
        return
    call = _unawaited(replace(call, inline=call.eager))

    def beside() -> Core[None]:
        reply = yield from _newer(call, entry)
        if isinstance(reply, Won):
            yield from _dispatch(call, reply.fence)

    yield Aside(beside())


def _ask_anew(call: Call, entry: Entry) -> Core[Exception | None]:
    """Have a value computed anew, and learn why it cannot be, or is not to be tried again yet, if so."""
    call = _unawaited(replace(call, inline=call.eager))
    try:
        reply = yield from _newer(call, entry)
        if isinstance(reply, Won):
            yield Aside(_dispatch(call, reply.fence))
        elif isinstance(reply, Done) and (outcome := Entry.parse(reply.raw)).failed:
            return unpack_error(outcome)
    except (ArgumentError, DecodeError, StoreUnavailable) as error:
        return error
    return None


def _newer(call: Call, entry: Entry) -> Core[Done | Waiting | Won]:
    """Ask for a newer value than this one, without waiting for it."""
    call.check()
    return (yield from _acquired(call, _acquire(call, "miss", entry.fence)))


def _unawaited(call: Call) -> Call:
    """Return a call that nobody waits for: unless it runs right here, it may ask for what is computed here."""
    return call if call.inline() else replace(call, chain=())


def _still_there(call: Call, spare: _Spare, error: Exception) -> Core[_Spare]:
    """Return the spare value, or a newer one, unless an invalidation came meanwhile: then raise the error."""
    try:
        raw = yield Get(call.keys, LAST_LOOK)
    except StoreUnavailable:
        return spare  # nobody can tell; while the server is away it is served, as what is kept locally is
    if raw is None:
        raise error
    if fence_of(raw) == spare.entry.fence:
        return spare
    try:
        entry = Entry.parse(raw)
        return _Spare(_value_of(call, entry), entry)
    except (DecodeError, ValueTooLarge):
        raise error from None  # what is there cannot be read, and the old value does not count any more


def _describe(
    call: Call,
    value: Any,
    entry: Entry,
    clock: Clock,
    state: Literal["fresh", "stale", "error"] = "fresh",
    source: Literal["local", "store", "flight"] = "store",
    error: Exception | None = None,
) -> Core[CachedEntry[Any]]:
    try:
        age = ((yield from _server_time(clock)) - entry.stored) / 1e6
    except StoreUnavailable:
        age = None
    return CachedEntry(value, state, source, age if age is None else max(0.0, age), entry.fence, error)


def refresh(call: Call) -> Core[bool]:
    """Have the value computed anew, without waiting; the old one is served until then.

    Returns True if this call started the flight. A flight that waits for a worker is joined; after one that runs
    already (it may have read older data) the worker starts the next.
    """
    call.check()
    call = _unawaited(call)
    reply = yield from _acquired(call, _acquire(call, "force"))
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


def expire(call: Call) -> Core[bool]:
    """Let the value be stale from now on → whether there was one. Where no stale ones are kept that is to drop it."""
    if not call.options.keep_stale:
        return (yield from invalidate(call))
    _forget(call)
    try:
        return (yield Expire(call.keys, call.options.keep_stale))  # type: ignore[no-any-return]
    finally:
        _forget(call)


def put(call: Call, value: Any) -> Core[None]:
    """Store a value from outside; a running flight's waiters get it, and its late outcome is refused.

    One that is not to be stored takes away what it replaces.
    """
    packed = call.codec.pack(value)
    ttl = call.options.ttl_of(value)
    _forget(call)
    try:
        if ttl and (tags := call.tags) is not None:
            yield Index(tags, call.keys.entry, ttl + call.options.keep_stale + INDEX_GRACE)
        yield Put(call.keys, new_nonce(), packed, ttl, *_keep_and_park(call, ttl))
    finally:
        _forget(call)


def invalidate_tag(
    tags: TagKeys, forget: Callable[[str], None], on_progress: Callable[[int], None] | None = None
) -> Core[int]:
    """Invalidate whatever bears a tag, in batches → how many values there were.

    A run that began before this call is in the index, as it was put there before it began, and one that begins later
    reads newer data.
    """
    dropped = cursor = 0
    while True:
        cursor, entries = yield Members(tags, cursor)
        dropped += yield from _invalidate_all_of(entries, forget)
        if on_progress is not None:
            on_progress(dropped)
        if cursor == 0:
            return dropped


def invalidate_all(
    prefix: str, task: str, forget: Callable[[str], None], on_progress: Callable[[int], None] | None = None
) -> Core[int]:
    """Invalidate all values of a task, in batches → how many there were.

    A scan finds whatever is there from its beginning to its end. So the first finds each flight that goes on meanwhile,
    and the second each outcome that a flight stored which ended during the first.
    """
    dropped = 0
    for kinds in ("f", "ex"):
        cursor = 0
        while True:
            cursor, names = yield Scan(pattern(prefix, task, kinds), cursor)
            dropped += yield from _invalidate_all_of([Keys.of_any(name).entry for name in names], forget)
            if on_progress is not None:
                on_progress(dropped)
            if cursor == 0:
                break
    return dropped


def _invalidate_all_of(entries: Iterable[str], forget: Callable[[str], None]) -> Core[int]:
    entries = list(dict.fromkeys(entries))
    if not entries:
        return 0
    for entry in entries:
        forget(entry)
    try:
        replies = yield RunAll(tuple(Invalidate(Keys(entry), new_nonce(), 30.0) for entry in entries))
    finally:
        for entry in entries:
            forget(entry)
    for reply in replies:
        if isinstance(reply, StoreUnavailable):
            raise reply
    return sum(replies)


def _forget(call: Call) -> None:
    """Before a change nobody else shall be served the old value here, and after it no read from before it kept."""
    if call.local is not None:
        call.local.drop(call.keys.entry)


def _look(call: Call, rooms: Rooms, seat: Seat, wish: _Wish, deadline: float, clock: Clock) -> Core[_Looked]:
    """Look for everybody in the room."""
    look = rooms.begin_look(seat)
    if look is None:
        return _Looked()
    wanted = max(0.0, deadline - clock())
    try:
        # The index of its tags has to be written before a run begins.
        holder = call.holder() if call.inline() and call.tags is None else ""
    except BaseException:
        rooms.interrupted(look)
        raise
    acquire = _acquire(call, wish.mode, wish.seen, look.following, look.sequence, wanted, wish.since, holder)
    try:
        reply = yield from _acquired(call, acquire)
    except StoreUnavailable as error:
        if clock() >= deadline:
            rooms.interrupted(look)  # the others may have more time
            yield Aside(_withdraw(call, acquire))
            return _Looked(error)
        rooms.broken(look, error)
        return _Looked()
    except BaseException:
        rooms.interrupted(look)
        raise
    if isinstance(reply, Done):
        rooms.settled(look, reply.raw)
        return _Looked()
    if wish.mode == "force":
        wish.since = wish.since or reply.now
    polls = (call.options.poll_interval, call.options.max_poll_interval)
    left = reply.lease if isinstance(reply, Won) else reply.lease_left
    rooms.wait(look, reply.fence, left, clock(), polls)
    if isinstance(reply, Waiting) and reply.progress:
        rooms.progressed(reply.fence, reply.progress)
    # An inline caller does not wait for a worker to begin: it may well occupy the only one.
    if not isinstance(reply, Won) and not (call.inline() and reply.state in UNCLAIMED):
        return _Looked()
    run = reply.run if isinstance(reply, Won) else None
    began = clock()
    wanted = max(0.0, deadline - began)
    if not call.inline():
        return _Looked(own=(yield from _dispatch(call, reply.fence, wanted, run)))
    rooms.away(seat)
    try:
        own = yield from _dispatch(call, reply.fence, wanted, run)
    finally:
        rooms.back(seat)
    return _Looked(own=own, busy=clock() - began)


def _dispatch(
    call: Call, fence: str, patience: float = math.inf, run: Run | None = None
) -> Core[Returned | Raised | GoesOn | None]:
    """Have a flight run → its outcome, where it ran here and that is the caller's own answer."""
    # Others may have more time than the winner has, so it is not the winner's last moment that fails the flight.
    timeout = min(call.options.dispatch_lease, max(patience, LEAST_DISPATCH))
    ticket = Ticket(call.keys, fence, call.chain, call.overrides, run)
    inline = call.inline()
    try:
        own = yield Dispatch(ticket, call.arguments, inline, timeout)
    except Exception as error:
        # The flight fails for all its waiters; were they to try in turn, each would wait for the broker.
        ttl = call.options.error_ttl_of(error)
        yield Settle(call.keys, run or Run(fence, 0), "E", pack_error(error), ttl, ttl, call.park)
        raise
    if inline:
        return own  # type: ignore[no-any-return]
    # The message is out, and the worker's claim does without.
    yield from _unless_away(Confirm(call.keys, fence, call.options.queue_timeout))
    return None


def _acquired(call: Call, acquire: Acquire) -> Core[Done | Waiting | Won]:
    """Perform an `Acquire`; who is interrupted before the reply is there leaves nothing behind."""
    try:
        return (yield acquire)  # type: ignore[no-any-return]
    except (StoreUnavailable, GeneratorExit):
        raise
    except BaseException:
        yield Aside(_withdraw(call, acquire))
        raise


def _withdraw(call: Call, acquire: Acquire) -> Core[None]:
    yield from _unless_away(Withdraw(call.keys, acquire.nonce, call.park))  # else what it won goes with its lease


def _acquire(
    call: Call,
    mode: Literal["miss", "force"],
    seen: str = "",
    following: str = "",
    register: int | None = None,
    wanted: float = 0.0,
    since: int = 0,
    holder: str = "",
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
        _crashed(call),
        since,
        holder,
    )


def _value(call: Call, raw: bytes) -> Any:
    return _value_of(call, Entry.parse(raw))


def _value_of(call: Call, entry: Entry) -> Any:
    if entry.failed:
        raise unpack_error(entry)
    return call.codec.unpack(entry)


_STATES: Final[dict[str, tuple[Literal["PENDING", "QUEUED", "RUNNING"], str]]] = {
    "P": ("PENDING", "its message is on the way to the queue"),
    "Q": ("QUEUED", "it waits for a worker"),
    "R": (
        "RUNNING",
        "the task takes longer than wait_timeout, or its worker died, which is known when its lease is over",
    ),
}


_SENT_BACK: Final = "a worker took it and sent it back, as for a retry: it waits for its time, and then for a worker"


def _too_late(call: Call, waited: float, ended: float, told: Told) -> WaitTimeout:
    task, key = call.task, call.keys.tag
    text = f"no value of task {task!r}, key {key!r}, within {waited:.1f} s"
    if told.state not in _STATES:
        return WaitTimeout(text, task, key, waited=waited)
    state, hint = _STATES[told.state]
    seconds = max(0.0, ended - told.since)
    text += f": its flight has been {state} for {seconds:.1f} s ({told.workers or hint})"
    return WaitTimeout(text, task, key, state, seconds, waited)


def _crashed(call: Call) -> Packed:
    options = call.options
    return _crashed_so_often(call.task, options.max_crashes, options.external_timeout if options.external else None)


@lru_cache(maxsize=1024)
def _crashed_so_often(task: str, times: int, external_timeout: float | None) -> Packed:
    text = f"task {task!r} lost its worker {times} times over one flight"
    if external_timeout is not None:
        text = (
            f"task {task!r} was handed out {times} times over one flight, and nobody settled it within "
            f"external_timeout={external_timeout:g} s"
        )
    return pack_error(FlightFailed(text))


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
        _crashed(call),
    )
    index: _Indexed | None = None
    wrong: ArgumentError | None = None
    try:
        if (tags := call.tags) is not None:
            index = _Indexed(tags, ticket.keys.entry, options.lease, clock)
            # Before anything is read: what an invalidation does not find has not begun.
            yield from index.keep(_at_most(options))
    except ArgumentError as error:
        wrong = error  # it did not fail in the caller, and those who wait must not do so in vain
    run = ticket.run or (yield from _patiently(claim, options.lease, clock))
    if not isinstance(run, Run):
        return run  # type: ignore[no-any-return]
    if wrong is not None:
        settle, _ = _settlement(call, ticket, run, Raised(wrong))
        return Finished((yield from _patiently(settle, options.lease, clock)), wrong)
    if options.external:
        yield from _patiently(Renew(ticket.keys, run, options.external_timeout, True), options.lease, clock)
        outcome = yield Body(run)
        if isinstance(outcome, Returned):
            return Finished("HANDED OUT")
    else:
        yield Hold(ticket.keys, run, options.lease, options.max_run)
        try:
            outcome = yield Body(run)
        finally:
            yield Release(run)
    if isinstance(outcome, GoesOn):
        return Finished(None)
    if isinstance(outcome, Interrupted):
        yield from _unless_away(Requeue(ticket.keys, run, retries, 0.0))
        raise outcome.by
    try:
        settle, refused = _settlement(call, ticket, run, outcome)
    except (KeyboardInterrupt, SystemExit):  # the process ends, and not only the run
        yield from _unless_away(Requeue(ticket.keys, run, retries, 0.0))
        raise
    except BaseException as error:  # such as gevent's Timeout, in a function among the options
        text = f"what task {call.task!r} came to could not be settled: {described(error)}"
        yield from _unless_away(_settlement(call, ticket, run, Raised(FlightFailed(text)))[0])
        raise
    try:
        if index is not None and settle.kind == "V" and settle.keep:
            if index.keeps(0.0):
                yield from index.keep(settle.keep)
            else:  # an invalidation may have looked for this run in vain: only those who wait get its value
                settle = replace(settle, ttl=0.0, keep=0.0)
        return Finished((yield from _patiently(settle, options.lease, clock)), refused)
    except StoreUnavailable as error:
        return Finished(None, error)


class _Indexed:
    """The entry of one run in the indices of its tags, where an invalidation by tag finds the run, and then its value.

    Args:
        tags: the indices.
        entry: what they name.
        patience: seconds for which the worker tries to reach the server, each time.
        clock: monotonic.
    """

    def __init__(self, tags: TagKeys, entry: str, patience: float, clock: Callable[[], float]) -> None:
        self._tags = tags
        self._entry = entry
        self._patience = patience
        self._clock = clock
        self._until = -math.inf

    def keeps(self, life: float) -> bool:
        """Whether it is there for so many seconds from the next word to the server on, however late that gets there."""
        return self._clock() + self._patience + life <= self._until

    def keep(self, life: float) -> Core[None]:
        """See to it that it is there for so long.

        Raises:
            StoreUnavailable: the server cannot be reached.
        """
        if self.keeps(life):
            return
        life += self._patience + INDEX_GRACE
        until = self._clock() + life
        yield from _patiently(Index(self._tags, self._entry, life), self._patience, self._clock)
        self._until = until


def _at_most(options: Options) -> float:
    """How long, in seconds, after its claim a run may go on, and its value be there if another process settles it."""
    if not options.external:
        return options.max_run
    assert not callable(options.ttl)
    # A flight outlives its lease by a minute, and may be settled until then.
    return max(options.max_run, options.external_timeout) + INDEX_GRACE + options.ttl + options.keep_stale


def _settlement(
    call: Call, ticket: Ticket, run: Run, outcome: Returned | Raised
) -> tuple[Settle, MemoLockError | None]:
    """Encode an outcome; a value that cannot be stored becomes an error for all who wait."""
    options = call.options
    error: BaseException
    refused = None
    if isinstance(outcome, Returned):
        try:
            ttl = options.ttl_of(outcome.value, outcome.ttl)
            if outcome.unchanged is None:
                packed = call.codec.pack(outcome.value, outcome.etag)
            else:
                packed = call.codec.repack(outcome.unchanged, outcome.etag)
            return Settle(ticket.keys, run, "V", packed, ttl, *_keep_and_park(call, ttl)), None
        except (EncodeError, OptionError, ValueTooLarge) as unstorable:
            error = refused = unstorable
        except Exception as trouble:  # such as an etag that is no UTF-8
            error = refused = EncodeError(f"the value of task {call.task!r} cannot be stored: {described(trouble)}")
            error.__cause__ = trouble
    else:
        error = outcome.error
    ttl = options.error_ttl_of(error)
    return Settle(ticket.keys, run, "E", pack_error(error), ttl, ttl, call.park), refused


def _unless_away(effect: Script) -> Core[None]:
    """Say something that others do without, if the server hears it: at the latest they take over with the lease."""
    try:
        yield effect
    except StoreUnavailable:
        pass


def _keep_and_park(call: Call, ttl: float) -> tuple[float, float, bool]:
    """For a value with this ttl: how long it is kept, parked, and whether it may be gone before a late waiter looks."""
    return (ttl + call.options.keep_stale if ttl else 0.0), call.park, ttl < call.options.max_poll_interval


def _patiently(effect: Script, patience: float, clock: Callable[[], float]) -> Core[Any]:
    """Try again while the server is away: after `patience` seconds the lease is over and others take over.

    Where it turns this process away there is nothing to wait for.
    """
    deadline = clock() + patience
    delay = 0.1
    while True:
        try:
            return (yield effect)
        except StoreUnavailable as error:
            if error.refused or clock() + delay >= deadline:
                raise
        yield Pause(delay)
        delay = min(2 * delay, 1.0)
