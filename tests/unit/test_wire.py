"""Effects to scripts, raw replies to replies."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import celery_memolock
from celery_memolock import effects
from celery_memolock.codec import Packed
from celery_memolock.effects import Defer, Done, Run, Script, Skip, Waiting, Won
from celery_memolock.keys import Keys, TagKeys
from celery_memolock.options import Options
from celery_memolock.protocol import Place
from celery_memolock.wire import answer, arguments, command, load, parse_notice, reply, script_of

KEYS = Keys.of("memolock", "f:1:abc")
RUN = Run("17-abc", 1)
PACKED = Packed("application/json utf-8 - =", b"1")
OPTIONS = Options(ttl=5)
EFFECTS: list[Script] = [
    effects.Acquire(KEYS, OPTIONS, "n", "miss", "", "", 3, 30.0, 30.0, PACKED),
    effects.Confirm(KEYS, "17-abc", 300.0),
    effects.Claim(KEYS, OPTIONS, "17-abc", "n", "h/1/2", 0, False, 30.0, PACKED),
    effects.Renew(KEYS, RUN, 10.0),
    effects.Requeue(KEYS, RUN, 1, 10.0),
    effects.Settle(KEYS, RUN, "V", PACKED, 5.0, 5.0, 30.0),
    effects.Disown(KEYS, "17-abc", "h/1/2", PACKED, 30.0),
    effects.Put(KEYS, "n", PACKED, 5.0, 5.0, 30.0, False),
    effects.Expire(KEYS, 5.0),
    effects.Index(TagKeys.of("memolock", "f", ["a", "b"]), KEYS.entry, 60.0),
    effects.Invalidate(KEYS, "n", 30.0),
    effects.Withdraw(KEYS, "abc", 30.0),
    effects.Leave(KEYS, Place("17-abc", 3)),
    effects.Report(KEYS, RUN, 3, b'[0.5, ""]'),
]


def test_every_effect_is_here() -> None:
    """No script effect, and no script, escapes these tests."""
    names = {
        name
        for name, kind in vars(effects).items()
        if inspect.isclass(kind) and issubclass(kind, Script) and kind is not Script
    }
    assert {type(effect).__name__ for effect in EFFECTS} == names
    files = {path.stem for path in (Path(celery_memolock.__file__).parent / "scripts").glob("[a-z]*.lua")}
    assert files == {name.lower() for name in names}


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: type(effect).__name__)
def test_arguments_are_as_the_script_says(effect: Script) -> None:
    """As many arguments are sent as the contract on top of the script numbers."""
    text = (Path(celery_memolock.__file__).parent / "scripts" / f"{type(effect).__name__.lower()}.lua").read_text()
    contract = "\n".join(line for line in text.splitlines() if line.startswith("--"))
    part = contract.partition("ARGV")[2].partition("Returns")[0]
    numbers = [int(number) for number in re.findall(r"(?:^|--|,)\s+(\d+) \w+", part)]
    assert numbers == list(range(1, len(arguments(effect, "inbox")) + 1))


def test_script_is_cached_by_its_text() -> None:
    """The name under which the server caches a script is made of its whole text."""
    source = script_of(EFFECTS[1])
    assert source.text.startswith(load("claim").text[:500])
    assert source.sha != load("claim").sha
    assert len(source.sha) == 40


@pytest.mark.parametrize(
    ("effect", "raw", "expected"),
    [
        (EFFECTS[0], [b"DONE", b"x"], Done(b"x")),
        (EFFECTS[0], [b"WAIT", b"17-abc", 1500, b"R", 250, b"99", b"x"], Waiting("17-abc", 1.5, "R", 0.25, 99, b"x")),
        (EFFECTS[0], [b"WIN", b"17-abc", 5000, b"99"], Won("17-abc", 5.0, 99)),
        (EFFECTS[0], [b"RUN", b"17-abc", 5000, b"99"], Won("17-abc", 5.0, 99, Run("17-abc", 1))),
        (EFFECTS[1], 1, True),
        (EFFECTS[2], [b"RUN", b"17-abc", 2], Run("17-abc", 2)),
        (EFFECTS[2], [b"DEFER", 1500], Defer(1.5)),
        (EFFECTS[2], [b"SKIP", b"why"], Skip("why")),
        (EFFECTS[3], b"LOST", "LOST"),
        (EFFECTS[5], b"OK", "OK"),
        (EFFECTS[8], 1, True),
        (EFFECTS[9], 1, None),
        (EFFECTS[10], 0, False),
        (EFFECTS[11], None, None),
        (EFFECTS[12], [b"Q", 1500], ("Q", 1.5)),
        (EFFECTS[12], [], None),
        (EFFECTS[13], 1, True),
    ],
)
def test_replies(effect: Script, raw: Any, expected: Any) -> None:
    """Each answer of a script becomes the reply that its effect promises."""
    assert reply(effect, raw) == expected


@pytest.mark.parametrize(
    ("fence", "raw", "attempts"),
    [
        ("17-abc", [b"17-abc", b"2"], 2),
        ("", [b"17-abc", b"1"], 1),
        ("17-abc", [b"18-def", b"1"], 0),
        ("", [None] * 2, 0),
    ],
)
def test_attempts(fence: str, raw: Any, attempts: int) -> None:
    """Only those of the flight that was asked about count."""
    query = effects.Attempts(KEYS, fence)
    assert command(query) == ("HMGET", KEYS.all[1], "fence", "attempt")
    assert answer(query, raw) == attempts


def test_unknown_reply() -> None:
    """An answer of no known form is an error, not a guess."""
    with pytest.raises(TypeError, match="no known form"):
        reply(EFFECTS[0], [b"WHAT"])


def test_durations() -> None:
    """A short time is never rounded to nothing, and nothing stays nothing."""
    assert arguments(effects.Confirm(KEYS, "f", 0.0001), "i") == ("f", 1)
    assert arguments(effects.Settle(KEYS, RUN, "E", PACKED, 0.0, 0.0, 30.0), "i")[5] == 0


@pytest.mark.parametrize("data", [b"", b"no newline", b"\xff\n", b"x" * 100 + b"\n"])
def test_junk_is_no_notice(data: bytes) -> None:
    """What is not of our form is no notice."""
    assert parse_notice(data) is None


def test_notice() -> None:
    """A notice is a fence and, perhaps, an outcome, which may have newlines."""
    assert parse_notice(b"17-abc\n") == ("17-abc", b"")
    assert parse_notice(b"17-abc\nML1 V\n1") == ("17-abc", b"ML1 V\n1")
