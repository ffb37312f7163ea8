"""What is asked in a thread of its own, for all who want to know."""

from __future__ import annotations

import logging
import math
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack

import pytest

from celery_memolock import bounded
from celery_memolock.bounded import inquire, log_failure, not_before


class Owner:
    """Has something to be asked about."""


def told(answer: Future[str] | None) -> str:
    assert answer is not None
    return answer.result(20)


def test_one_answer_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks while the answer is on its way, or is new, shares it; each thing has its own, and an old one is none."""
    owner, gate, asked = Owner(), threading.Event(), []

    def ask(_: ExitStack) -> str:
        asked.append(gate.wait(20))
        return f"answer {len(asked)}"

    monkeypatch.setattr(bounded, "_AWAITED", 20.0)
    answers = [inquire(owner, "it", ask) for _ in range(5)]
    gate.set()
    answers.append(inquire(owner, "it", ask))
    assert [told(answer) for answer in answers] == ["answer 1"] * 6
    assert told(inquire(owner, "another", ask)) == "answer 2"
    monkeypatch.setattr(bounded, "_RECENT", 0.0)
    assert told(inquire(owner, "it", ask)) == "answer 3"


def test_no_answer() -> None:
    """A failure is an answer that says nothing, and is shared as any."""
    owner, asked = Owner(), []

    def ask(_: ExitStack) -> str:
        asked.append(1)
        raise ConnectionError("down")

    for _ in range(2):
        assert told(inquire(owner, "it", ask)) == ""
    assert asked == [1]


def test_no_answer_from_before() -> None:
    """What was asked before a moment tells nothing of what came then: it is asked anew, once, and that is shared."""
    owner, asked = Owner(), []

    def ask(_: ExitStack) -> str:
        asked.append(1)
        return f"answer {len(asked)}"

    def since(moment: float) -> str:
        return told(not_before(moment, lambda: inquire(owner, "it", ask)))

    assert since(-math.inf) == "answer 1"
    moment = time.monotonic()
    assert [since(moment) for _ in range(3)] == ["answer 2"] * 3
    assert told(inquire(owner, "it", ask)) == "answer 2"


def test_no_answer_from_about_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer on its way to a question from before the moment may be of either time, and nobody else is asked."""
    owner, gate, asked = Owner(), threading.Event(), []

    def ask(_: ExitStack) -> str:
        asked.append(gate.wait(20))
        return "answer"

    monkeypatch.setattr(bounded, "_AWAITED", 20.0)
    answer = inquire(owner, "it", ask)
    assert not_before(time.monotonic(), lambda: inquire(owner, "it", ask)) is None
    assert not_before(-math.inf, lambda: inquire(owner, "it", ask)) is answer
    assert not_before(0.0, lambda: None) is None
    gate.set()
    assert told(answer) == "answer"
    assert asked == [True]


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one who was asked keeps silent for too long nobody else is, and nobody waits for it."""
    owner, gate = Owner(), threading.Event()

    def ask(_: ExitStack) -> str:
        gate.wait(20)
        return "late"

    monkeypatch.setattr(bounded, "_AWAITED", 0.0)
    answer = inquire(owner, "it", ask)
    threads = threading.active_count()
    try:
        assert [inquire(owner, "it", ask) for _ in range(5)] == [None] * 5
        assert threading.active_count() == threads
    finally:
        gate.set()
    assert told(answer) == "late"
    assert inquire(owner, "it", ask) is answer


def test_what_takes_long_to_close() -> None:
    """The answer is there before it is closed."""
    gate, closed = threading.Event(), threading.Event()

    def ask(left: ExitStack) -> str:
        left.callback(closed.set)
        left.callback(gate.wait, 20)
        return "answer"

    answer = inquire(Owner(), "it", ask)
    assert told(answer) == "answer"
    assert not closed.is_set()
    gate.set()
    assert closed.wait(20)


def test_a_failure_that_has_no_text(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged all the same: to some handlers an error at that is one of the program."""

    class Unsaid(Exception):
        def __str__(self) -> str:
            raise ValueError

    with caplog.at_level(logging.WARNING, "celery_memolock"):
        log_failure(Unsaid())
    assert "in the background: <unprintable Unsaid>" in caplog.text
