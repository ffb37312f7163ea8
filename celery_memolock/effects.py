"""What a core asks for, and what it gets back.

A *core* is a generator that yields *effects* and is sent *replies*. It owns every decision and touches nothing: no
socket, clock, thread or queue. A driver performs the effects (see `drive`); threads, asyncio, Celery and tests differ
only in how.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Generic, Literal, TypeVar

from .codec import Codec, Entry, Packed
from .errors import ArgumentError, MemoLockError, ReentrantFlight, text_of
from .keys import Keys, TagKeys
from .local import Local
from .options import Options
from .rooms import Place, Seat

__all__ = [
    "MISS",
    "Acquire",
    "Arguments",
    "Aside",
    "Attempts",
    "Attendance",
    "Body",
    "CachedEntry",
    "Call",
    "Claim",
    "Computing",
    "Confirm",
    "Core",
    "Defer",
    "Disown",
    "Dispatch",
    "Done",
    "Expire",
    "Finished",
    "Get",
    "GetAll",
    "GoesOn",
    "Hold",
    "Index",
    "Interrupted",
    "Invalidate",
    "Leave",
    "Listen",
    "Members",
    "Missing",
    "Onward",
    "Own",
    "Pause",
    "Put",
    "Query",
    "Raised",
    "Release",
    "Renew",
    "Report",
    "Requeue",
    "Returned",
    "Run",
    "RunAll",
    "Scan",
    "Script",
    "ServerTime",
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
    "Withdraw",
    "Won",
    "drive",
    "new_nonce",
]

T = TypeVar("T")
R = TypeVar("R")
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


def new_nonce() -> str:
    """Return 64 random bits as text. A repeat of a call with the same nonce gets the same answer."""
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Onward:
    """What a core returns that ends with another one: who drives it goes on with that one.

    So nobody keeps for thousands of waiters what their first look needed.
    """

    core: Core[Any]


def drive(core: Core[T], perform: Callable[[Any], Any]) -> T:
    """Perform a core's effects, one after the other, in the calling thread.

    An exception of an effect, KeyboardInterrupt too, is raised inside the core, which may then still ask for
    effects that clean up.
    """
    while True:
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
            if type(stop.value) is not Onward:
                return stop.value  # type: ignore[no-any-return]
            core = stop.value.core


# ---- records ---------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Computing:
    """A key that is being computed where a call is made.

    Attributes:
        entry: of the key.
        place: the server that keeps it, where its callers compute it; else "", as it may be spelt in several ways.
        over: whether that has ended. Whoever it started, and who goes on, is not part of it any more.
    """

    entry: str
    place: str = ""
    over: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one task, as the core sees it.

    Attributes:
        inline: asked on a miss: is the value to be computed in this very caller if nobody has begun to?
        chain: what is being computed where the call was made, outermost first.
        overrides: the options that this call set, which its flight takes along.
        arguments: positional and by name; the core only hands them on.
        local: where values are kept in this process, if they are.
        eager: asked where nobody waits: is there no worker, so that all is computed in its caller?
        described: whether the value is wanted as a `CachedEntry`.
        holder: asked on a miss: what names this process where an inline winner may claim its flight as it acquires it;
            else "".
        place: asked within a chain: as in `Computing`.
    """

    task: str
    keys: Keys
    options: Options
    codec: Codec
    inline: Callable[[], bool] = bool
    chain: tuple[Computing, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    arguments: Arguments = ((), {})
    local: Local | None = None
    eager: Callable[[], bool] = bool
    described: bool = False
    holder: Callable[[], str] = str
    place: Callable[[], str] = str

    @property
    def park(self) -> float:
        """How long, in seconds, an outcome is kept for waiters that cannot read it from the entry."""
        return max(30.0, 3 * self.options.max_poll_interval)

    @property
    def tags(self) -> TagKeys | None:
        """The indices that the call's value is to be found in.

        Raises:
            ArgumentError: the function `tags` failed, or gave something else than names.
        """
        tags = self.options.tags
        if callable(tags):
            args, kwargs = self.arguments
            try:
                names: Iterable[str] = tags(*args, **kwargs)
                tags = (names,) if isinstance(names, str) else tuple(names)
            except Exception as error:
                raise ArgumentError(f"the function tags of task {self.task!r} failed: {text_of(error)}") from error
        return TagKeys.of(self.options.prefix, self.task, tags) if tags else None

    def refuse_to_wait_for_itself(self) -> None:
        """Find out whether the call is part of the computing of its own key.

        Raises:
            ReentrantFlight: it is.
        """
        entry, place = self.keys.entry, self.place()
        chain = [each for each in self.chain if not each.over]
        if any(each.entry == entry and (each.place == place or "" in (each.place, place)) for each in chain):
            raise ReentrantFlight(
                f"task {self.task!r} asked for key {self.keys.tag!r} while computing it; the chain is: "
                + " -> ".join(Keys(each).tag for each in (*(each.entry for each in chain), entry))
            )

    def check(self) -> None:
        """Find out before a flight begins what else only its worker would.

        Raises:
            ArgumentError: as for `tags`.
        """
        _ = self.tags


@dataclass(frozen=True, slots=True)
class CachedEntry(Generic[R]):
    """A value, and what is known of it.

    Attributes:
        value: as `get_cached` returns it.
        state: "fresh"; "stale": it is past its ttl, and a refresh is on its way; "error": it is past its ttl, and a
            fresh one could not be had.
        source: "local": kept in this process; "store": from Redis; "flight": this call waited for it.
        age: seconds since it was stored; None if that is not known, as Redis is away.
        fence: of the flight, or of `set_cached`, that stored it; the same fence means the same value.
        error: why there is no fresh one, in state "error".
    """

    value: R
    state: Literal["fresh", "stale", "error"]
    source: Literal["local", "store", "flight"]
    age: float | None
    fence: str
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """Reply of `Claim`: run it. The same attempt of the same fence never runs twice."""

    fence: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """What travels with a flight's message: which flight it is for, and how the winner wants it run.

    Attributes:
        run: the attempt that its winner has claimed already, to run it in its own process; it never travels.
        server: where it was won, as an address without a password; "" if it did not travel.
    """

    keys: Keys
    fence: str
    chain: tuple[Computing, ...]
    overrides: Mapping[str, Any]
    run: Run | None = None
    server: str = ""


@dataclass(frozen=True, slots=True)
class Done:
    """Reply of `Acquire`: the outcome is there."""

    raw: bytes


@dataclass(frozen=True, slots=True)
class Waiting:
    """Reply of `Acquire`: somebody computes it. Times in seconds; now is the server's, in microseconds."""

    fence: str
    lease_left: float
    state: str
    since: float
    now: int = 0
    progress: bytes = b""


@dataclass(frozen=True, slots=True)
class Won:
    """Reply of `Acquire`: the caller has to dispatch this flight, or to run the attempt that it claimed in one step."""

    fence: str
    lease: float
    now: int = 0
    run: Run | None = None


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
    keys: Any  # `Keys`, or `TagKeys` of an index: the names in its `all` are the script's KEYS


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
        since: when the same call looked first, if it did, in mode "force"; else 0.
        holder: who will run it, if the winner claims it in the same step; else "".
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
    since: int = 0
    holder: str = ""


@dataclass(frozen=True, slots=True)
class Withdraw(Script):
    """The reply to an `Acquire` will not be learned: nobody would run what it won."""

    keys: Keys
    nonce: str
    park: float


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
    """A sign of life of a run → "CONTINUE", "DETACHED" or "LOST".

    Attributes:
        external: whether the run is handed out now, for another process to settle.
    """

    keys: Keys
    run: Run
    lease: float
    external: bool = False


@dataclass(frozen=True, slots=True)
class Report(Script):
    """A run tells those who wait how far it is → whether the flight is still its own.

    Attributes:
        number: of the run's reports; notices and replies overtake each other on their ways.
    """

    keys: Keys
    run: Run
    number: int
    progress: bytes


@dataclass(frozen=True, slots=True)
class Requeue(Script):
    """A run goes back to the queue → "OK", "DETACHED" or "LOST"."""

    keys: Keys
    run: Run
    retries: int
    lease: float


@dataclass(frozen=True, slots=True)
class Settle(Script):
    """A run, or with attempt 0 a failed dispatch, ends → "OK", "AGAIN", "DETACHED" or "REFUSED".

    "AGAIN": a refresh was asked for meanwhile, and is for this worker to start.
    """

    keys: Keys
    run: Run
    kind: Literal["V", "E"]
    outcome: Packed
    ttl: float
    keep: float
    park: float
    fleeting: bool = False


@dataclass(frozen=True, slots=True)
class Disown(Script):
    """The worker's main process knows that a run, or with no holder a message, came to nothing → whether it mattered.

    With an outcome the flight fails for all; without one, those who wait may take over at once.

    Attributes:
        ttl: for how many seconds new callers get that outcome.
    """

    keys: Keys
    fence: str
    holder: str
    outcome: Packed | None
    park: float
    ttl: float = 0.0


@dataclass(frozen=True, slots=True)
class Put(Script):
    """Set a value from outside → its fence."""

    keys: Keys
    nonce: str
    outcome: Packed
    ttl: float
    keep: float
    park: float
    fleeting: bool


@dataclass(frozen=True, slots=True)
class Expire(Script):
    """Let the value be stale from now on, and keep it so for so many seconds at the most → whether there was one."""

    keys: Keys
    keep: float


@dataclass(frozen=True, slots=True)
class Index(Script):
    """Name an entry in the indices of its tags, for so many seconds."""

    keys: TagKeys
    entry: str
    life: float


@dataclass(frozen=True, slots=True)
class Invalidate(Script):
    """Drop the value, and whatever is being computed from older data → whether there was a value."""

    keys: Keys
    nonce: str
    park: float


@dataclass(frozen=True, slots=True)
class Leave(Script):
    """Give up a registration, if there is one → (state, seconds in it) of the flight, or None if it is over."""

    keys: Keys
    place: Place


class Query:
    """An effect that is one command which only reads. Raises `StoreUnavailable` when it cannot run."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Members(Query):
    """Read on in the index of a tag, from a cursor (first 0) → the next cursor (0: that was all), entries."""

    keys: TagKeys
    cursor: int


@dataclass(frozen=True, slots=True)
class Scan(Query):
    """Look on for keys that fit a pattern, from a cursor (first 0) → the next cursor (0: that was all), keys."""

    pattern: str
    cursor: int


@dataclass(frozen=True, slots=True)
class Attempts(Query):
    """Ask how often a worker has begun a flight → how often; 0 if another one took over, or none goes on.

    Attributes:
        fence: of the flight; "" for whichever goes on.
    """

    keys: Keys
    fence: str


@dataclass(frozen=True, slots=True)
class ServerTime(Query):
    """Ask what time it is on the server → microseconds since 1970."""


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
    """Hand the flight's message to the queue, or run it here and now if the call is `inline`.

    An inline run's reply is what it came to, where that is this very caller's answer: the error that it raised, as the
    caller's own; or the value, if it could not be brought to the server. It is `GoesOn` where the run has begun, and
    the caller waits as others do. Else, and for a message, it is None.
    """

    ticket: Ticket
    arguments: Arguments
    inline: bool
    timeout: float


@dataclass(frozen=True, slots=True)
class Attendance:
    """Ask what is known of the workers that could take the message of a call, for at most so many seconds → in words.

    "" if nothing is.

    Attributes:
        since: when its flight came to wait for a worker, by this process's clock. What others learnt before that is
            not known to hold still.
    """

    arguments: Arguments
    since: float
    timeout: float


@dataclass(frozen=True, slots=True)
class Own:
    """Wait at most so many seconds for the end of an inline run that goes on → as `Dispatch`, or None.

    What the caller's own run raised is better than what others are told of it.
    """

    run: Any
    timeout: float


@dataclass(frozen=True, slots=True)
class Aside:
    """Drive a core beside the caller, who does not wait for it; what it raises is logged."""

    core: Core[Any]


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
    """Run the task's own code → `Returned`, `Raised`, `Interrupted` or `GoesOn`."""

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
    """Outcome of `Body`: a value.

    Attributes:
        ttl: what the task itself said, in seconds.
        etag: what it named this version of the value.
        unchanged: the stale entry, if the task found that its value still holds.
    """

    value: Any
    ttl: float | None = None
    etag: str = ""
    unchanged: Entry | None = None


@dataclass(frozen=True, slots=True)
class Raised:
    """Outcome of `Body`: an error for all who wait."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Outcome of `Body`: its own caller was interrupted in it, which is no failure: another may begin at once."""

    by: BaseException


@dataclass(frozen=True, slots=True)
class GoesOn:
    """Outcome of `Body`: the flight went back to the queue (a retry), and its waiters keep waiting.

    Attributes:
        run: as a reply of `Dispatch`, the inline run that goes on, for `Own`; its driver knows what that is.
    """

    run: Any = None


@dataclass(frozen=True, slots=True)
class Finished:
    """What `compute` did.

    Attributes:
        answer: of the settling; None if the flight goes on, or the outcome could not be brought to the server.
        refused: why a returned value could not be stored, or an outcome not be brought to the server.
    """

    answer: str | None
    refused: MemoLockError | None = None
