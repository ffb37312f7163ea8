"""The core, walked by hand: each effect it asks for, each reply it may get."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from celery_memolock import (
    MISS,
    ArgumentError,
    DecodeError,
    DispatchError,
    EncodeError,
    FlightFailed,
    OptionError,
    ReentrantFlight,
    StoreUnavailable,
    ValueTooLarge,
    WaitTimeout,
)
from celery_memolock.clock import Clock
from celery_memolock.codec import Codec, Entry, pack_error, unpack_error
from celery_memolock.effects import (
    Acquire,
    Aside,
    Attempts,
    Attendance,
    Body,
    CachedEntry,
    Call,
    Claim,
    Computing,
    Confirm,
    Defer,
    Dispatch,
    Done,
    Finished,
    Get,
    GoesOn,
    Hold,
    Index,
    Leave,
    Listen,
    Pause,
    Raised,
    Release,
    Requeue,
    Returned,
    Run,
    Settle,
    Skip,
    TakeSeat,
    Ticket,
    Unreadable,
    Wait,
    Waiting,
    Won,
    drive,
)
from celery_memolock.keys import Keys
from celery_memolock.local import MISSING, Local
from celery_memolock.options import Options, Progress
from celery_memolock.protocol import compute, fetch, peek, refresh
from celery_memolock.rooms import Rooms, Seat, Turn

OPTIONS = Options(ttl=5)
KEYS = Keys.of("memolock", "shop.f:1:abc")
TICKET = Ticket(KEYS, "17-abc", (), {})
RUN = Run("17-abc", 1)


class Unsaid(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise ValueError

    __repr__ = __str__


def _raise(error: BaseException) -> Any:
    raise error


class Server:
    """Replies to effects from a script of answers, and remembers what was asked."""

    def __init__(self, **answers: Any) -> None:
        self.rooms = Rooms(lambda: 1.0, lambda _: None, lambda: 0.0)
        self.now = 0.0
        self.clock = Clock(lambda: self.now)
        self.asked: list[Any] = []
        self.answers = {"Get": None, "Confirm": True, "Leave": None, "Settle": "OK", **answers}

    def __call__(self, effect: Any) -> Any:
        self.asked.append(effect)
        if isinstance(effect, Wait):
            if effect.seat.turn is None:
                self.now += max(0.0, effect.timeout)
            return effect.seat.turn
        if isinstance(effect, TakeSeat):
            return Seat()
        if isinstance(effect, Pause):
            self.now += effect.seconds
        answer = self.answers.get(type(effect).__name__)
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def kinds(self) -> list[type]:
        return [type(effect) for effect in self.asked]


def call(**options: Any) -> Call:
    made = replace(OPTIONS, **options)
    return Call("shop.f", KEYS, made, Codec("shop.f", made))


def entry(value: Any, fence: str = "17-abc") -> bytes:
    packed = Codec("shop.f", OPTIONS).pack(value)
    return f"ML1 V {fence} 1 2 3 {packed.form}\n".encode() + packed.body


def failure(error: Exception) -> bytes:
    packed = pack_error(error)
    return f"ML1 E 17-abc 1 2 3 {packed.form}\n".encode() + packed.body


def ask(server: Server, **options: Any) -> Any:
    return drive(fetch(call(**options), server.rooms, server.clock), server)


def test_hit_is_one_get() -> None:
    """A hit asks for nothing but one GET."""
    server = Server(Get=entry([1]))
    assert ask(server) == [1]
    assert server.kinds() == [Get]


def test_stored_error_is_raised() -> None:
    """An error in its back-off is raised like one of a flight."""
    with pytest.raises(KeyError):
        ask(Server(Acquire=Done(failure(KeyError("k")))))


def test_winner() -> None:
    """A miss listens before it looks; the winner dispatches, confirms, and waits like all others."""
    server = Server(Acquire=[Won("17-abc", 5.0), Done(entry(7))])
    assert ask(server) == 7
    assert server.kinds() == [Get, TakeSeat, Listen, Wait, Acquire, Dispatch, Confirm, Wait, Acquire, Wait]


@pytest.fixture(autouse=True)
def _rung(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ring a room when its caller would wait in vain: the listener's work."""
    plain = Server.__call__

    def ringing(self: Server, effect: Any) -> Any:
        if isinstance(effect, Wait) and effect.seat.turn is None and self.answers.get("ring", True):
            self.rooms.ring_all()
        return plain(self, effect)

    monkeypatch.setattr(Server, "__call__", ringing)


def test_follower() -> None:
    """A caller that has to wait dispatches nothing, and follows its flight when it looks again."""
    server = Server(Acquire=[Waiting("17-abc", 5.0, "R", 0.1), Done(entry(7))])
    assert ask(server) == 7
    looks = [effect for effect in server.asked if isinstance(effect, Acquire)]
    assert [look.following for look in looks] == ["", "17-abc"]
    assert looks[0].nonce != looks[1].nonce
    assert Dispatch not in server.kinds()


def test_outcome_comes_between_the_turn_and_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The listener has the outcome just when a caller sets out to look: it asks nobody, and takes it."""
    server = Server(Acquire=[Waiting("17-abc", 5.0, "R", 0.1)])
    begin = server.rooms.begin_look

    def late(seat: Seat) -> Any:
        if Acquire in server.kinds():
            server.rooms.notice("17-abc", entry(7))
        return begin(seat)

    monkeypatch.setattr(server.rooms, "begin_look", late)
    assert ask(server) == 7
    assert server.kinds().count(Acquire) == 1
    assert len(server.rooms) == 0


def test_dispatch_fails() -> None:
    """When the message cannot be sent the flight fails for all, with attempt 0, and the winner gets the error."""
    server = Server(Acquire=Won("17-abc", 5.0), Dispatch=DispatchError("frozen"))
    with pytest.raises(DispatchError, match="frozen"):
        ask(server)
    (settled,) = [effect for effect in server.asked if isinstance(effect, Settle)]
    assert (settled.run, settled.kind) == (Run("17-abc", 0), "E")
    assert len(server.rooms) == 0


def test_confirm_fails() -> None:
    """A confirmation that is lost changes nothing: the message is out."""
    server = Server(Acquire=[Won("17-abc", 5.0), Done(entry(7))], Confirm=StoreUnavailable("down"))
    assert ask(server) == 7


def test_store_down() -> None:
    """Without a server the caller hears so, and leaves nothing behind."""
    for name in ("Get", "Listen", "Acquire"):
        server = Server(**{name: StoreUnavailable("down")})
        with pytest.raises(StoreUnavailable):
            ask(server)
        assert len(server.rooms) == 0


def test_server_that_is_slower_than_a_caller_is_patient() -> None:
    """A look that came to nothing because its caller had no more time ends that caller alone: another one looks."""
    server = Server(Acquire=StoreUnavailable("did not answer in time"))
    others = [Seat() for _ in range(2)]

    def slow(effect: Any) -> Any:
        if isinstance(effect, Acquire):
            for seat in others:
                server.rooms.enter(KEYS.entry, seat)
            server.now += effect.wanted
        return server(effect)

    with pytest.raises(WaitTimeout) as caught:
        drive(fetch(call(wait_timeout=1), server.rooms, server.clock), slow)
    assert isinstance(caught.value.__cause__, StoreUnavailable)
    assert [seat.turn for seat in others] == [Turn.LOOK, None]


def test_subscription_that_takes_longer_than_a_caller_waits() -> None:
    """Whose own time is over while it is not acknowledged yet gets the time-out that it asked for."""
    server = Server(Flight=("Q", 0.1))

    def slow(effect: Any) -> Any:
        if isinstance(effect, Listen):
            server.now += effect.timeout
            raise StoreUnavailable("did not acknowledge a subscription")
        return server(effect)

    with pytest.raises(WaitTimeout):
        drive(fetch(call(wait_timeout=0.1), server.rooms, server.clock), slow)
    assert len(server.rooms) == 0


@pytest.mark.parametrize(("wait_timeout", "expected"), [(0.1, 1.0), (3, 3.0), (30, 5.0)])
def test_patience_with_the_broker(wait_timeout: float, expected: float) -> None:
    """A caller does not wait for the broker much longer than it waits at all, nor fails others' flight in a blink."""
    server = Server(Acquire=[Won("17-abc", 5.0), Done(entry(7))])
    assert ask(server, wait_timeout=wait_timeout) == 7
    assert next(effect for effect in server.asked if isinstance(effect, Dispatch)).timeout == expected


def test_unreadable_entry_is_a_miss() -> None:
    """An entry that cannot be read is reported, and not taken for the answer again."""
    foreign = b"ML1 V 9-fff 1 2 3 application/x-python-serialize binary - =\nx"
    server = Server(Get=foreign, Acquire=[Won("17-abc", 5.0), Done(entry(7))])
    assert ask(server) == 7
    assert Unreadable in server.kinds()
    assert next(effect for effect in server.asked if isinstance(effect, Acquire)).seen == "9-fff"
    half = Server(Get=b"ML1 V 9-fff x y z json utf-8 - =\n1", Acquire=Done(entry(7)))
    assert ask(half) == 7
    assert next(effect for effect in half.asked if isinstance(effect, Acquire)).seen == "9-fff"
    garbage = Server(Get=b"garbage", Acquire=Done(entry(7)))
    assert ask(garbage) == 7


@pytest.mark.parametrize(
    ("state", "text"), [("P", "PENDING for 2.0 s"), ("Q", "QUEUED for 2.0 s"), ("R", "RUNNING for 2.0 s")]
)
def test_time_out(state: str, text: str) -> None:
    """A time-out says in which state the flight was, for how long, and gives up the registration."""
    server = Server(Acquire=Waiting("17-abc", 50.0, state, 0.0), Leave=(state, 2.0), ring=False)
    with pytest.raises(WaitTimeout, match=text) as caught:
        ask(server, wait_timeout=3)
    assert (caught.value.task, caught.value.key) == ("shop.f", KEYS.tag)
    assert caught.value.state == text.split()[0]
    assert (caught.value.seconds_in_state, caught.value.waited) == (2.0, 3.0)
    assert (Attendance in server.kinds()) is (state == "Q")
    assert server.now == 3.0
    (left,) = [effect for effect in server.asked if isinstance(effect, Leave)]
    assert left.place.fence == "17-abc"
    assert len(server.rooms) == 0


def test_time_out_of_a_retry() -> None:
    """Of a flight that a worker has begun already nobody is asked whether workers are there."""
    waiting = Waiting("17-abc", 50.0, "Q", 0.0)
    server = Server(Acquire=waiting, Leave=("Q", 2.0), Attempts=1, Attendance="no worker is there", ring=False)
    with pytest.raises(WaitTimeout, match=r"QUEUED for 2\.0 s \(a worker took it and sent it back, ") as caught:
        ask(server, wait_timeout=3)
    assert "no worker" not in str(caught.value)
    assert Attendance not in server.kinds()
    assert Attempts(KEYS, "17-abc") in server.asked


def test_time_out_asks_since_when() -> None:
    """What is said of the workers is to be no older than the flight's wait for one."""
    waiting = Waiting("17-abc", 50.0, "Q", 0.0)
    server = Server(Acquire=waiting, Leave=("Q", 2.0), Attempts=0, Attendance="no worker is there", ring=False)
    with pytest.raises(WaitTimeout, match=r"QUEUED for 2\.0 s \(no worker is there\)"):
        ask(server, wait_timeout=3)
    (asked,) = [effect for effect in server.asked if isinstance(effect, Attendance)]
    assert asked.since == 1.0


def test_time_out_that_nobody_hears_of() -> None:
    """After `soft_timeout` the stale value is returned at once: nothing is asked but to give up the registration."""
    server = Server(Get=stale("old"), ServerTime=NOW, Acquire=Waiting("17-abc", 50.0, "Q", 0.0), ring=False)
    assert ask(server, stale_ttl=60.0, soft_timeout=1.0) == "old"
    (left,) = [effect for effect in server.asked if isinstance(effect, Leave)]
    assert left.place.sequence > 0
    assert Attendance not in server.kinds()


def test_interrupts_leave_nothing() -> None:
    """KeyboardInterrupt at each effect in turn is raised, and leaves no caller in a room."""
    for number in range(9):
        server = Server(Acquire=[Won("17-abc", 5.0), Waiting("17-abc", 5.0, "R", 0.0), Done(entry(7))])
        count = -1

        def interrupting(effect: Any, server: Server = server, number: int = number) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise KeyboardInterrupt
            return server(effect)

        with pytest.raises(KeyboardInterrupt):
            drive(fetch(call(), server.rooms, server.clock), interrupting)
        assert len(server.rooms) == 0, number


def test_abandoned_generator() -> None:
    """A core whose driver is gone leaves no caller in a room."""
    server = Server(Acquire=Waiting("17-abc", 5.0, "R", 0.0))
    first = fetch(call(), server.rooms, server.clock)
    assert isinstance(next(first), Get)
    with pytest.raises(StopIteration) as end:
        first.send(None)
    core = end.value.value.core
    effect = next(core)
    while not isinstance(effect, Acquire):
        effect = core.send(server(effect))
    core.close()
    assert len(server.rooms) == 0


def test_reentrant() -> None:
    """A call for a key in its own chain is refused before anything is asked."""
    server = Server()
    chained = replace(call(), chain=(Computing("memolock:1:e:{a:1:x}"), Computing(KEYS.entry)))
    with pytest.raises(ReentrantFlight, match=r"a:1:x -> shop\.f:1:abc -> shop\.f:1:abc"):
        drive(fetch(chained, server.rooms, server.clock), server)
    assert server.asked == []


def test_inline_caller_runs_an_unclaimed_flight() -> None:
    """A caller that computes for itself runs a flight that waits for a worker, and leaves one that runs alone."""
    for state, runs in (("Q", True), ("P", True), ("R", False)):
        server = Server(Acquire=[Waiting("17-abc", 5.0, state, 0.0), Done(entry(7))])
        inline = replace(call(), inline=lambda: True)
        assert drive(fetch(inline, server.rooms, server.clock), server) == 7
        assert (Dispatch in server.kinds()) is runs
        assert Confirm not in server.kinds()


@pytest.mark.parametrize("tags", [(), ("t",)])
def test_inline_winner_claims_as_it_acquires(tags: tuple[str, ...]) -> None:
    """One step less, but where an index of tags has to be written before a run begins."""
    run = None if tags else RUN
    server = Server(Acquire=[Won("17-abc", 5.0, 0, run), Done(entry(7))])
    inline = replace(call(tags=tags), inline=lambda: True, holder=lambda: "h/1/2")
    assert drive(fetch(inline, server.rooms, server.clock), server) == 7
    first = next(effect for effect in server.asked if isinstance(effect, Acquire))
    assert first.holder == ("" if tags else "h/1/2")
    dispatch = next(effect for effect in server.asked if isinstance(effect, Dispatch))
    assert dispatch.ticket.run == run
    worker = Server(Body=Returned(1))
    done = drive(compute(call(), dispatch.ticket, "h/1/2", 0, False, lambda: 0.0), worker) if run else None
    assert done is None or (done == Finished("OK") and Claim not in worker.kinds())


def test_refresh() -> None:
    """A refresh dispatches if it won, waits for nothing, and registers nobody."""
    server = Server(Acquire=Won("17-abc", 5.0))
    assert drive(refresh(call()), server) is True
    assert server.kinds() == [Acquire, Dispatch, Confirm]
    assert (server.asked[0].mode, server.asked[0].register) == ("force", None)
    assert drive(refresh(call()), Server(Acquire=Waiting("1-a", 1.0, "R", 0.0))) is False


def test_peek() -> None:
    """Peeking reads, and computes nothing."""
    assert drive(peek(call()), Server(Get=entry(None))) is None
    assert drive(peek(call()), Server()) is MISS
    assert drive(peek(call()), Server(Get=b"garbage")) is MISS
    assert not MISS
    assert repr(MISS) == "MISS"


# ---- with a stale value at hand


def stale(value: Any, fence: str = "9-aaa") -> bytes:
    """A value that has not been fresh for a second; see `NOW`."""
    return entry(value, fence).replace(b"ML1 V", b"ML1 S")


NOW = 1_000_000
SPARING = {"stale_if_error": 60.0, "wait_timeout": 5.0}


def entry_of(server: Server, **options: Any) -> CachedEntry[Any]:
    described = replace(call(**options), described=True)
    found: CachedEntry[Any] = drive(fetch(described, server.rooms, server.clock), server)
    return found


def test_what_on_progress_raises_is_no_error_of_the_flight() -> None:
    """It is raised, though there is a stale value to return when a fresh one cannot be had."""
    waiting = Waiting("17-abc", 5.0, "R", 0.1, 0, b'1 1 [0.5, "half"]')
    server = Server(Get=stale("old"), ServerTime=NOW, Acquire=waiting, ring=False)

    def stop(progress: Progress) -> None:
        raise KeyError(progress.message)

    with pytest.raises(KeyError, match="half"):
        ask(server, on_progress=stop, **SPARING)
    assert len(server.rooms) == 0


def test_newer_value_than_the_spare_one() -> None:
    """What somebody stored while a refresh failed is as fresh as any."""
    newer = entry(7, "18-abc").replace(b" 1 2 3 ", b" 1 %d 3 " % (NOW + 1_000_000))
    server = Server(Get=[stale("old"), newer], ServerTime=NOW, Acquire=Done(failure(KeyError("k"))))
    found = entry_of(server, **SPARING)
    assert (found.value, found.state, found.error) == (7, "fresh", None)


@pytest.mark.parametrize("pause", [{}, {"error_ttl": 8.0}])
def test_nobody_answers_and_there_is_a_stale_value(pause: dict[str, float]) -> None:
    """One call finds out. For a moment the next take the stale value at once, and the refresh is asked for beside."""
    waiting = Waiting("17-abc", 50.0, "Q", 0.0)
    server = Server(Get=stale("old"), ServerTime=NOW, Acquire=waiting, Leave=("Q", 5.0), ring=False)
    for moment, waits in ((0.0, True), (0.0, False), (0.9, False), (8.0, True)):
        server.now += moment
        server.asked.clear()
        began = server.now
        found = entry_of(server, **SPARING, **pause)
        assert (found.value, found.state) == ("old", "error")
        assert isinstance(found.error, WaitTimeout)
        assert (found.error.state, round(found.error.waited, 6)) == ("QUEUED", 5.0)
        assert round(server.now - began, 6) == (5.0 if waits else 0.0)
        assert (Aside in server.kinds()) is (moment == 0.0 and not waits)
    server.answers["Get"] = stale("another", "10-bbb")
    began = server.now
    assert entry_of(server, **SPARING).value == "another"
    assert round(server.now - began, 6) == 5.0


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Waiting("17-abc", 50.0, "R", 0.0), type(None)),
        (Done(entry("newer", "18-abc")), type(None)),
        (Done(failure(KeyError("k"))), KeyError),
        (Done(failure(KeyError("k")).replace(b"{", b"[")), DecodeError),
        (StoreUnavailable("gone"), StoreUnavailable),
    ],
)
def test_why_a_stale_value_stays(reply: Any, why: type) -> None:
    """Who wants a stale value described is told why there is none that is newer, if that is known."""
    found = entry_of(Server(Get=stale("old"), ServerTime=NOW, Acquire=reply), stale_ttl=10.0)
    assert (found.value, type(found.error)) == ("old", why)
    assert found.state == ("stale" if why is type(None) else "error")


def test_what_is_there_instead_of_the_stale_value_cannot_be_read() -> None:
    """The time-out is raised, and not the trouble of reading what came in its place."""
    for newer in (b"garbage", b"ML1 V 11-ccc 1 2 3 application/x-python-serialize binary - =\nx"):
        waiting = Waiting("17-abc", 50.0, "R", 0.0)
        server = Server(Get=[stale("old"), newer], ServerTime=NOW, Acquire=waiting, ring=False)
        with pytest.raises(WaitTimeout):
            ask(server, **SPARING)


def test_soft_timeout_is_for_those_who_may_have_it() -> None:
    """Past `stale_ttl` a value that is kept for errors is returned as such, after the hard time-out."""
    server = Server(Get=stale("old"), ServerTime=NOW, Acquire=Waiting("17-abc", 50.0, "R", 0.0), ring=False)
    assert entry_of(server, **SPARING, stale_ttl=10.0, soft_timeout=1.0).state == "stale"
    assert server.now == 1.0
    assert entry_of(server, **SPARING, stale_ttl=0.5, soft_timeout=1.0).state == "error"
    assert server.now == 6.0


def test_kept_no_longer_than_it_is_fresh() -> None:
    """The server may be late to drop, and to tell of, a value whose time is over."""
    raw = entry(7).replace(b" 1 2 3 ", b" 1 %d 3 " % (NOW + 1_000_000))
    server = Server(Get=raw, ServerTime=NOW)
    local = Local(60.0, 10, 10_000, 1000.0, lambda: server.now)
    local.proved(server.now)
    assert drive(fetch(replace(call(), local=local), server.rooms, server.clock), server) == 7
    assert local.get(KEYS.entry) == 7
    server.now += 1.0
    assert local.get(KEYS.entry) is MISSING


@pytest.mark.parametrize(
    ("early", "kept_for"), [({}, 60.0), ({"early_refresh": 0.8}, 40.0), ({"early_refresh": 0.1}, 0)]
)
def test_kept_here_until_it_is_to_be_refreshed(early: dict[str, Any], kept_for: float) -> None:
    """A value is served from this process only up to its early moment, or nobody would see that this has come."""
    fresh = entry("new", "9-aaa").replace(b" 1 2 3 ", b" 0 100000000 0 ")  # of 100 s of ttl 40 are over
    server = Server(Get=fresh, ServerTime=40_000_000)
    local = Local(60.0, 10, 10_000, 1000.0, server.clock)
    local.proved(server.now)
    asked = replace(call(**early), local=local)
    assert drive(fetch(asked, server.rooms, server.clock), server) == "new"
    assert (Aside in server.kinds()) is (kept_for == 0)
    for moment in (0.0, 39.9, 40.1, 59.9, 60.1):
        server.now = moment
        assert (local.get(KEYS.entry) is not MISSING) is (moment < kept_for)


# ---- the worker


def work(server: Server, **options: Any) -> Any:
    return drive(compute(call(**options), TICKET, "h/1/2", 0, False, server.clock), server)


def test_run() -> None:
    """Claim, hold, run, release, settle."""
    server = Server(Claim=RUN, Body=Returned([1]))
    assert work(server) == Finished("OK")
    assert server.kinds() == [Claim, Hold, Body, Release, Settle]
    settled = server.asked[-1]
    assert (settled.kind, settled.run, settled.ttl, settled.outcome.body) == ("V", RUN, 5.0, b"[1]")


@pytest.mark.parametrize("reply", [Skip("over"), Defer(3.0)])
def test_nothing_to_run(reply: Any) -> None:
    """A message that is not needed, or not yet, runs nothing."""
    server = Server(Claim=reply)
    assert work(server) == reply
    assert server.kinds() == [Claim]


def test_failed_run() -> None:
    """An error is settled with the back-off that its type asks for."""
    server = Server(Claim=RUN, Body=Raised(KeyError("k")))
    work(server, error_ttl=1, cache_errors={KeyError: 30})
    settled = server.asked[-1]
    assert (settled.kind, settled.ttl) == ("E", 30)
    header = b"ML1 E 1-a 1 2 3 " + settled.outcome.form.encode() + b"\n"
    assert isinstance(unpack_error(Entry.parse(header + settled.outcome.body)), KeyError)


def test_value_that_cannot_be_stored() -> None:
    """It is settled as an error, and the worker is told why."""
    server = Server(Claim=RUN, Body=Returned("x" * 100))
    done = work(server, max_value_size=10)
    assert isinstance(done.refused, ValueTooLarge)
    assert server.asked[-1].kind == "E"


class Silent(BaseException):
    """What cannot be told of, and is no `Exception`."""

    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("returned", "options"),
    [
        (Returned(1), {"ttl": lambda value: _raise(Unsaid())}),
        (Returned(1), {"cache_if": lambda value: _raise(Unsaid())}),
        (Returned(1, etag="\ud800"), {}),
        (Returned(1), {"ttl": lambda value: type("Odd", (), {"__repr__": lambda self: 5})()}),
    ],
    ids=["ttl", "cache_if", "etag", "no time"],
)
def test_outcome_that_cannot_be_settled(returned: Returned, options: dict[str, Any]) -> None:
    """Whatever keeps a value from being stored, those who wait hear a typed error, and the worker the same."""
    server = Server(Claim=RUN, Body=returned)
    done = work(server, **options)
    assert (done.answer, type(done.refused)) in [("OK", EncodeError), ("OK", OptionError)]
    assert (server.asked[-1].kind, server.asked[-1].run) == ("E", RUN)


def test_outcome_whose_settling_is_left_by_no_error() -> None:
    """Those who wait hear of it; if it ends the process, too, they may begin at once."""
    server = Server(Claim=RUN, Body=Returned(1))
    with pytest.raises(Silent):
        work(server, ttl=lambda value: _raise(Silent()))
    assert b"could not be settled: Silent: <unprintable Silent>" in server.asked[-1].outcome.body
    assert (server.asked[-1].kind, server.asked[-1].run) == ("E", RUN)
    for error in (KeyboardInterrupt(), SystemExit(1)):
        server = Server(Claim=RUN, Body=Returned(1), Requeue=StoreUnavailable("down"))
        with pytest.raises(type(error)):
            work(server, ttl=lambda value, error=error: _raise(error))
        assert server.asked[-1] == Requeue(KEYS, RUN, 0, 0.0)


def test_a_winners_run_that_never_began() -> None:
    """It fails the attempt that it claimed as it acquired: for attempt 0 there would be nothing to fail."""
    server = Server(Acquire=Won("17-abc", 5.0, run=RUN), Dispatch=Unsaid())
    with pytest.raises(Unsaid):
        drive(fetch(replace(call(), inline=lambda: True, holder=lambda: "h"), server.rooms, server.clock), server)
    assert [each.run for each in server.asked if isinstance(each, Settle)] == [RUN]


def test_retry_settles_nothing() -> None:
    """A flight that goes on is not settled."""
    server = Server(Claim=RUN, Body=GoesOn())
    assert work(server) == Finished(None)
    assert server.kinds()[-1] is Release


def test_patience_of_a_worker() -> None:
    """While the server is away, claim and settle are tried again until the lease would be over."""
    down = StoreUnavailable("down")
    server = Server(Claim=[down, down, RUN], Body=Returned(1), Settle=[down, down, down, "OK"])
    assert work(server).answer == "OK"
    gone = Server(Claim=RUN, Body=Returned(1), Settle=down)
    done = work(gone, lease=3)
    assert (done.answer, done.refused) == (None, down)
    assert 2.0 <= gone.now <= 3.0
    with pytest.raises(StoreUnavailable):
        work(Server(Claim=down))


@pytest.mark.parametrize(
    ("took", "options"),
    [
        (5.0, {}),
        (66.0, {}),
        (66.0, {"ttl": 100_000}),
        (1.0, {"ttl": 100_000}),
        (0.0, {"ttl": 60, "stale_ttl": 600}),
        (0.0, {"external": True, "ttl": 100_000}),
        (0.0, {"external": True, "external_timeout": 7200, "stale_if_error": 600}),
    ],
)
def test_index_outlives_the_value(took: float, options: dict[str, Any]) -> None:
    """However long the run took, its entry stays in the indices of its tags for as long as there may be a value."""
    server = Server(Claim=RUN, Body=Returned(1))
    gone = {"until": 0.0}

    def passing(effect: Any) -> Any:
        if isinstance(effect, Index):
            gone["until"] = max(gone["until"], server.now + effect.life)
        if isinstance(effect, Body):
            server.now += took
        return server(effect)

    described = call(**{"ttl": 60, "max_run": 60, "tags": ("a",), **options})
    drive(compute(described, TICKET, "h/1/2", 0, False, server.clock), passing)
    assert server.kinds()[0] is Index
    ends = described.options.external_timeout if described.options.external else server.now
    assert gone["until"] >= ends + float(described.options.ttl) + described.options.keep_stale  # type: ignore[arg-type]
    settled = [effect for effect in server.asked if isinstance(effect, Settle)]
    assert [each.keep > 0 for each in settled] == [True] * (not described.options.external)


def test_run_that_outlives_its_index() -> None:
    """An invalidation by tag may have looked for it in vain: only those who wait get what it returns."""
    server = Server(Claim=RUN)

    def passing(effect: Any) -> Any:
        if isinstance(effect, Body):
            server.now += 200
            return Returned(1)
        return server(effect)

    described = call(ttl=60, max_run=60, tags=("a",))
    assert drive(compute(described, TICKET, "h/1/2", 0, False, server.clock), passing) == Finished("OK")
    assert (server.asked[-1].kind, server.asked[-1].ttl, server.asked[-1].keep) == ("V", 0.0, 0.0)


def _wrong(*_: Any) -> Any:
    raise KeyError("user")


WRONG_TAGS: list[Any] = [_wrong, lambda *_: _raise(Unsaid()), lambda *_: 7, lambda *_: ["a", ""], lambda *_: ["a", 7]]


@pytest.mark.parametrize("tags", WRONG_TAGS)
def test_wrong_tags_in_the_caller(tags: Any) -> None:
    """Whoever would start the flight hears of it before there is one."""
    server = Server(Acquire=Won("17-abc", 5.0))
    for ask_for in (fetch(call(tags=tags), server.rooms, server.clock), refresh(call(tags=tags))):
        with pytest.raises(ArgumentError, match="tag"):
            drive(ask_for, server)
    assert server.kinds() == [Get]
    assert len(server.rooms) == 0


@pytest.mark.parametrize("tags", WRONG_TAGS)
def test_wrong_tags_in_the_worker(tags: Any) -> None:
    """What the worker alone finds wrong is told to those who wait, and the task does not run."""
    server = Server(Claim=RUN)
    done = work(server, tags=tags)
    assert (done.answer, type(done.refused)) == ("OK", ArgumentError)
    assert server.kinds() == [Claim, Settle]
    assert (server.asked[-1].kind, server.asked[-1].run) == ("E", RUN)


def test_cache_if_is_asked_first() -> None:
    """A ttl that the task gave its value does not store one that `cache_if` refuses."""
    for value, kept in (("no", 0.0), ("yes", 30.0)):
        server = Server(Claim=RUN, Body=Returned(value, ttl=30.0))
        work(server, cache_if=lambda value: value != "no")
        assert server.asked[-1].keep == kept


def test_worker_is_stopped() -> None:
    """SystemExit in the task ends the renewal, settles nothing, and goes on its way."""
    server = Server(Claim=RUN, Body=SystemExit())
    with pytest.raises(SystemExit):
        work(server)
    assert server.kinds() == [Claim, Hold, Body, Release]


def test_errors_of_the_library() -> None:
    """Every error has the one root, and those that stand for a builtin are one too."""
    assert issubclass(OptionError, ValueError)
    assert issubclass(WaitTimeout, TimeoutError)
    assert issubclass(StoreUnavailable, ConnectionError)
    assert str(FlightFailed("why")) == "why"
