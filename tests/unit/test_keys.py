"""From calls to keys."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any
from uuid import UUID

import pytest

from celery_memolock import ArgumentError, OptionError
from celery_memolock.keys import KeyMaker, Keys, TagKeys, entry_prefix, pattern
from celery_memolock.options import Options


def f(x: Any, y: Any = 2, *rest: Any, z: Any = None, **more: Any) -> None:
    """Take whatever comes."""


def plain(x: Any, y: Any = 2) -> None:
    """Take two."""


def maker(function: Callable[..., Any] = f, **options: Any) -> KeyMaker:
    return KeyMaker("shop.f", inspect.signature(function), Options(ttl=5, **options))


def key(*args: Any, **kwargs: Any) -> Keys:
    return maker().keys(args, kwargs)


def test_one_key_for_one_call() -> None:
    """By position, by name or by default: the same arguments are one key."""
    assert key(1) == key(x=1) == key(1, 2) == key(1, y=2) == key(x=1, y=2, z=None)
    assert maker(plain).keys((1, 2), {}) == maker(plain).keys((1,), {}) == maker(plain).keys((), {"y": 2, "x": 1})


def test_types_matter() -> None:
    """1, 1.0, True and "1" are four keys, and so on."""
    values = [
        1,
        1.0,
        True,
        "1",
        b"1",
        Decimal(1),
        None,
        "None",
        "",
        [],
        {},
        set(),
        0,
        False,
        0.0,
        -0.0,
        [1],
        ["1"],
        [[1]],
    ]
    assert len({key(value) for value in values}) == len(values)


def test_order_of_a_dict() -> None:
    """The order of a dict or a set does not matter, that of a list does."""
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})
    assert key({3, 1, 2}) == key({1, 2, 3})
    assert key(1, more={"b": 1, "a": 2}) == key(1, more={"a": 2, "b": 1})
    assert key([1, 2]) != key([2, 1])


def test_list_and_tuple() -> None:
    """A task gets a list for either, so they are one key."""
    assert key((1, (2, 3))) == key([1, [2, 3]])


class Colour(Enum):
    """Something to enumerate."""

    RED = 1
    BLUE = 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (datetime(2026, 1, 1), date(2026, 1, 1)),
        (datetime(2026, 1, 1), datetime(2026, 1, 1, tzinfo=timezone.utc)),
        (time(1), time(1, 1)),
        (timedelta(1), timedelta(0, 1)),
        (UUID(int=1), UUID(int=2)),
        (Decimal("1.0"), Decimal("1.00")),
        (Colour.RED, Colour.BLUE),
        ("a\ud800", "a\ud801"),
    ],
)
def test_further_types(one: Any, other: Any) -> None:
    """What Celery's JSON can send can be part of a key."""
    assert key(one) == key(one)
    assert key(one) != key(other)


def _value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 3 else 6)
    text = "".join(rng.choice("as1:;l{}[]") for _ in range(rng.randrange(4)))
    leaves = [None, rng.random() < 0.5, rng.randrange(3), float(rng.randrange(3)), text, text.encode()]
    if kind < 6:
        return leaves[kind]
    items = [_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return items if kind < 8 else {f"k{n}{text}": item for n, item in enumerate(items)}


def _typed(value: Any) -> Any:
    """Return a form that is equal only for values that are the same in type and content."""
    if isinstance(value, list):
        return ("list", tuple(_typed(item) for item in value))
    if isinstance(value, dict):
        return ("dict", tuple(sorted((name, _typed(item)) for name, item in value.items())))
    return (type(value).__name__, repr(value))


def test_no_two_values_share_a_key() -> None:
    """Of thousands of values made to be confused, none shares the key of another."""
    rng = random.Random(7)
    seen: dict[Any, Any] = {}
    for _ in range(5000):
        value = _value(rng)
        assert seen.setdefault(key(value), _typed(value)) == _typed(value)
    assert len(set(seen.values())) == len(seen)


def test_wrong_arguments() -> None:
    """Arguments that do not fit are a TypeError that names the task."""
    with pytest.raises(TypeError, match=r"shop\.f\(\) missing a required argument: 'x'"):
        key()
    with pytest.raises(TypeError, match="too many positional"):
        maker(plain).keys((1, 2, 3), {})


def test_unencodable_argument() -> None:
    """What has no canonical form is an error that names argument and cure."""
    with pytest.raises(ArgumentError, match=r"argument 'y' of task 'shop\.f'.*builtins\.object.*ignore=.*key="):
        key(1, {"deep": [object()]})


def test_ignored_arguments() -> None:
    """An ignored argument may be anything, and makes no difference."""
    ignoring = maker(ignore=("y",))
    assert ignoring.keys((1, object()), {}) == ignoring.keys((1,), {"y": 3})
    assert ignoring.keys((1,), {}) != ignoring.keys((2,), {})
    with pytest.raises(OptionError, match="ignore names 'nope'"):
        maker(ignore=("nope",))


def test_custom_key() -> None:
    """`key=` may be a callable or a format string; long keys are hashed."""
    assert maker(key="{x}-{y}").keys((1,), {}).tag == "shop.f:1:1-2"
    assert maker(key=lambda x, y=2: f"{x}+{y}").keys((1,), {}).tag == "shop.f:1:1+2"
    assert maker(plain, key="{x}").keys((1, 2), {}) == maker(plain, key="{x}").keys((1, 3), {})
    assert len(maker(key="{x}").keys(("a" * 500,), {}).tag) < 60


@pytest.mark.parametrize("made", ["", "a{b", None, 7])
def test_bad_custom_key(made: Any) -> None:
    """A key that is no text, is empty or has braces is refused."""
    with pytest.raises(ArgumentError, match="key= of task"):
        maker(key=lambda *_, **__: made).keys((1,), {})


@pytest.mark.parametrize("template", ["{nope}", "fixed", "{x"])
def test_bad_template(template: str) -> None:
    """A format string that names no argument, or one that is not there, is refused at once."""
    with pytest.raises(OptionError, match="key="):
        maker(key=template)


def test_version_and_prefix() -> None:
    """Both are part of every name."""
    assert maker(version=2).keys((1,), {}) != key(1)
    assert maker(prefix="shop").keys((1,), {}).entry.startswith("shop:1:e:{")


def test_names_share_one_slot() -> None:
    """All names of a key have the same hash tag, kind first and tag last."""
    keys = key(1)
    assert {name[name.index("{") :] for name in keys.all} == {"{" + keys.tag + "}"}
    assert [name.split(":")[2] for name in keys.all] == ["e", "f", "x", "r"]


def test_braces_in_a_task_name() -> None:
    """A task's name may not have braces."""
    with pytest.raises(OptionError, match="braces"):
        KeyMaker("a{b}", inspect.signature(f), Options(ttl=5))


@pytest.mark.parametrize(("one", "other"), [("user", "user:1"), ("a:b", "a%3Ab"), ("a%:b", "a%25:b")])
def test_colons_in_a_task_name(one: str, other: str) -> None:
    """They end no part of a key: no two tasks share a name, nor does one's begin as all of another's do."""
    options = Options(ttl=5, key=lambda text: text)
    ours, theirs = (KeyMaker(name, inspect.signature(lambda text: text), options) for name in (one, other))
    assert ours.keys(("1:7",), {}) != theirs.keys(("7",), {})
    theirs_entry = theirs.keys(("7",), {}).entry
    assert not theirs_entry.startswith(entry_prefix("memolock", one))
    assert not fnmatchcase(theirs_entry, pattern("memolock", one, "e"))
    assert theirs_entry.startswith(entry_prefix("memolock", other))
    assert fnmatchcase(theirs_entry, pattern("memolock", other, "e"))


def test_refresh_calls_that_do_not_fit() -> None:
    """They are refused where the task is defined, and so is a task that needs arguments and is given none."""
    for calls in ([("a", 1, 2)], [("a",), ()], [()]):
        with pytest.raises(OptionError, match=r"refresh_calls of task 'shop\.f': the arguments .* do not fit it"):
            maker(plain, refresh_every=1, refresh_calls=calls)
    maker(plain, refresh_every=1, refresh_calls=[("a",), ("a", 1)])


def test_tags_that_cannot_be_sent() -> None:
    """Half of a character of two, as a broken text may hold, has a name that can be sent, and one of its own."""
    names = TagKeys.of("memolock", "f", ["\ud83d", "\ude00", "\U0001f600", "a\n"]).all
    assert len({name.encode() for name in names}) == 4
