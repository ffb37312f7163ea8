"""The core, walked by hand: each effect it asks for, each reply it may get."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from celery_memolock import (
    MISS,
    DispatchError,
    FlightFailed,
    OptionError,
    ReentrantFlight,
    StoreUnavailable,
    ValueTooLarge,
    WaitTimeout,
)
from celery_memolock.codec import Codec, Entry, pack_error, unpack_error
from celery_memolock.keys import Keys
from celery_memolock.options import Options
from celery_memolock.protocol import (
    Acquire,
    Body,
    Call,
    Claim,
    Confirm,
    Defer,
    Dispatch,
    Done,
    Finished,
    Get,
    GoesOn,
    Hold,
    Leave,
    Listen,
    Pause,
    Raised,
    Release,
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
    compute,
    drive,
    fetch,
    peek,
    refresh,
)
from celery_memolock.rooms import Rooms, Seat, Turn

OPTIONS = Options(ttl=5)
KEYS = Keys.of("memolock", "shop.f:1:abc")
TICKET = Ticket(KEYS, "17-abc", (), {})
RUN = Run("17-abc", 1)


class Server:
    """Replies to effects from a script of answers, and remembers what was asked."""

    def __init__(self, **answers: Any) -> None:
        self.rooms = Rooms(lambda: 1.0, lambda _: None)
        self.now = 0.0
        self.asked: list[Any] = []
        self.answers = {"Get": None, "Confirm": True, "Leave": None, "Settle": "OK", **answers}

    def clock(self) -> float:
        return self.now

    def __call__(self, effect: Any) -> Any:
        self.asked.append(effect)
        if isinstance(effect, Wait):
            if effect.seat.turn is None:
                self.now += max(0.0, effect.timeout)
            return effect.seat.turn
        if isinstance(effect, TakeSeat):
            return Seat(lambda: None)
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
    assert server.kinds() == [Get, Listen, TakeSeat, Wait, Acquire, Dispatch, Confirm, Wait, Acquire, Wait]


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
    others = [Seat(lambda: None) for _ in range(2)]

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


@pytest.mark.parametrize(("wait_timeout", "expected"), [(0.1, 1.0), (3, 3.0), (30, 5.0)])
def test_patience_with_the_broker(wait_timeout: float, expected: float) -> None:
    """A caller does not wait for the broker much longer than it waits at all, nor fails others' flight in a blink."""
    server = Server(Acquire=[Won("17-abc", 5.0), Done(entry(7))])
    assert ask(server, wait_timeout=wait_timeout) == 7
    assert next(effect for effect in server.asked if isinstance(effect, Dispatch)).timeout == expected


def test_unreadable_entry_is_a_miss() -> None:
    """An entry that cannot be read is reported, and not taken for the answer again."""
    foreign = b"ML1 V 9-fff 1 2 3 application/x-python-serialize binary -\nx"
    server = Server(Get=foreign, Acquire=[Won("17-abc", 5.0), Done(entry(7))])
    assert ask(server) == 7
    assert Unreadable in server.kinds()
    assert next(effect for effect in server.asked if isinstance(effect, Acquire)).seen == "9-fff"
    half = Server(Get=b"ML1 V 9-fff x y z json utf-8 -\n1", Acquire=Done(entry(7)))
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
    with pytest.raises(WaitTimeout, match=text):
        ask(server, wait_timeout=3)
    assert server.now == 3.0
    (left,) = [effect for effect in server.asked if isinstance(effect, Leave)]
    assert left.place.fence == "17-abc"
    assert len(server.rooms) == 0


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
    core = fetch(call(), server.rooms, server.clock)
    effect = next(core)
    while not isinstance(effect, Acquire):
        effect = core.send(server(effect))
    core.close()
    assert len(server.rooms) == 0


def test_reentrant() -> None:
    """A call for a key in its own chain is refused before anything is asked."""
    server = Server()
    chained = replace(call(), chain=("memolock:1:e:{a:1:x}", KEYS.entry))
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
