"""Several cores side by side, walked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from celery_memolock.clock import Clock
from celery_memolock.codec import Codec
from celery_memolock.effects import (
    Call,
    Done,
    GetAll,
    Leave,
    Run,
    RunAll,
    Settle,
    TakeSeats,
    WaitForAny,
    Waiting,
    Won,
    drive,
)
from celery_memolock.errors import DispatchError, StoreUnavailable, WaitTimeout
from celery_memolock.keys import Keys
from celery_memolock.options import Options
from celery_memolock.protocol import fetch
from celery_memolock.rooms import Rooms, Seat
from celery_memolock.weave import weave

OPTIONS = Options(ttl=5, wait_timeout=3)
CODEC = Codec("f", OPTIONS)


def entry(value: Any) -> bytes:
    packed = CODEC.pack(value)
    return f"ML1 V 17-abc 1 2 3 {packed.form}\n".encode() + packed.body


class Server:
    """Answers batches of effects: `stored` at the first look, then `looks` in order, for each key."""

    def __init__(self, stored: dict[str, Any], looks: dict[str, list[Any]], **others: Any) -> None:
        self.rooms = Rooms(lambda: 1.0, lambda _: None, lambda: 0.0)
        self.now = 0.0
        self.clock = Clock(lambda: self.now)
        self.asked: list[Any] = []
        self.stored = stored
        self.looks = looks
        self.left: tuple[str, float] | None = None
        self.others = others

    def __call__(self, effect: Any) -> Any:
        self.asked.append(effect)
        match effect:
            case GetAll(keys):
                return [self.stored.get(each.tag) for each in keys]
            case TakeSeats(count):
                return [Seat() for _ in range(count)]
            case RunAll(scripts):
                return [self.reply(script) for script in scripts]
            case WaitForAny(seats, timeout):
                if all(seat.turn is None for seat in seats):
                    self.now += min(timeout, 0.5)
                    self.rooms.ring_all()
                return None
        answer = self.others.get(type(effect).__name__)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def reply(self, script: Any) -> Any:
        if isinstance(script, Leave | Settle):
            return self.left if isinstance(script, Leave) else None
        answers = self.looks.get(script.keys.tag, [True])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def ask(self, *tags: str) -> list[Any]:
        cores = [fetch(Call("f", Keys(f"m:1:e:{{{tag}}}"), OPTIONS, CODEC), self.rooms, self.clock) for tag in tags]
        return drive(weave(cores, lambda: self.now), self)


def test_hits_are_one_trip() -> None:
    """Nothing but one batch of GETs."""
    server = Server({"a": entry(1), "b": entry(2)}, {})
    assert server.ask("a", "b", "a") == [1, 2, 1]
    assert [type(effect) for effect in server.asked] == [GetAll]


def test_misses_share_their_trips() -> None:
    """All looks go in one batch, and each call gets its own outcome, be it an error."""
    down = StoreUnavailable("refused")
    looks = {"b": [Won("1-b", 5.0), True, Done(entry(2))], "c": [Done(entry(3))], "d": [down]}
    server = Server({"a": entry(1)}, looks)
    found = server.ask("a", "b", "c", "d")
    assert found[:3] == [1, 2, 3]
    assert isinstance(found[3], StoreUnavailable)
    batches = [len(effect.scripts) for effect in server.asked if isinstance(effect, RunAll)]
    assert batches[0] == 3
    assert len(server.rooms) == 0


def test_one_message_that_cannot_be_sent() -> None:
    """The flight of that call fails, and the call with it."""
    looks = {"b": [Won("1-b", 5.0)], "c": [Done(entry(3))]}
    server = Server({}, looks, Dispatch=DispatchError("frozen"))
    found = server.ask("b", "c")
    assert isinstance(found[0], DispatchError)
    assert found[1] == 3
    settled = [script for effect in server.asked if isinstance(effect, RunAll) for script in effect.scripts]
    assert [script.run for script in settled if isinstance(script, Settle)] == [Run("1-b", 0)]


def test_time_outs() -> None:
    """Each waits until its own deadline, and gives up its registration."""
    server = Server({}, {"b": [Waiting("1-b", 50.0, "R", 0.0)], "c": [Waiting("1-c", 50.0, "R", 0.0)]})
    found = server.ask("b", "c")
    assert [type(each) for each in found] == [WaitTimeout, WaitTimeout]
    left = [script for effect in server.asked if isinstance(effect, RunAll) for script in effect.scripts]
    assert sum(isinstance(script, Leave) for script in left) == 2
    assert len(server.rooms) == 0


@pytest.mark.parametrize("state", ["Q", "R", ""])
def test_time_outs_of_one_key(state: str) -> None:
    """All are told what the first has asked; the last, which gives up the registration, asks as well."""
    server = Server({}, {"b": [Waiting("1-b", 50.0, "Q", 0.0)]}, Attendance="2 workers are busy")
    server.left = (state, 0.5) if state else None
    found = server.ask("b", "b", "b", "b")
    scripts = [script for effect in server.asked if isinstance(effect, RunAll) for script in effect.scripts]
    assert [script.place.sequence > 0 for script in scripts if isinstance(script, Leave)] == [False, True]
    expected = {"Q": "QUEUED", "R": "RUNNING", "": None}[state]
    assert [each.state for each in found] == [expected] * 4
    assert ["2 workers are busy" in str(each) for each in found] == [state == "Q"] * 4
    assert len(server.rooms) == 0


@pytest.mark.parametrize("number", range(7))
def test_interrupts_leave_nothing(number: int) -> None:
    """KeyboardInterrupt at each batch in turn is raised, and no caller stays in a room."""
    looks = {
        "b": [Won("1-b", 5.0), True, Waiting("1-b", 5.0, "R", 0.0), Done(entry(2))],
        "c": [Waiting("1-c", 5.0, "R", 0.0)],
    }
    server = Server({}, looks)
    count = -1

    def interrupting(effect: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        return server(effect)

    cores = [
        fetch(Call("f", Keys(f"m:1:e:{{{tag}}}"), OPTIONS, CODEC), server.rooms, lambda: server.now) for tag in "bc"
    ]
    with pytest.raises(KeyboardInterrupt):
        drive(weave(cores, lambda: server.now), interrupting)
    assert len(server.rooms) == 0


def test_abandoned() -> None:
    """A driver that is gone leaves no caller in a room."""
    server = Server({}, {})
    core = weave([fetch(Call("f", Keys("m:1:e:{b}"), OPTIONS, CODEC), server.rooms, lambda: 0.0)], lambda: 0.0)
    effect = next(core)
    while not isinstance(effect, WaitForAny):
        effect = core.send(server(effect))
    core.close()
    assert len(server.rooms) == 0
