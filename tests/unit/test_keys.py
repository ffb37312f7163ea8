"""From calls to keys."""

from __future__ import annotations

import functools
import inspect
import itertools
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
    return KeyMaker("shop.f", function, Options(ttl=5, **options))


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
        KeyMaker("a{b}", f, Options(ttl=5))


@pytest.mark.parametrize(("one", "other"), [("user", "user:1"), ("a:b", "a%3Ab"), ("a%:b", "a%25:b")])
def test_colons_in_a_task_name(one: str, other: str) -> None:
    """They end no part of a key: no two tasks share a name, nor does one's begin as all of another's do."""
    options = Options(ttl=5, key=lambda text: text)
    ours, theirs = (KeyMaker(name, lambda text: text, options) for name in (one, other))
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


# ---- decorated functions ---------------------------------------------------------------------------------------


def decorator(call: Callable[..., Any]) -> Callable[..., Any]:
    """Make a decorator of what it does with the function and a call's arguments."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return call(function, args, kwargs)

        return wrapper

    return decorate


SESSION = object()
plainly = decorator(lambda function, args, kwargs: function(*args, **kwargs))
by_name = decorator(lambda function, args, kwargs: function(*args, session=SESSION, **kwargs))
in_front = decorator(lambda function, args, kwargs: function(SESSION, *args, **kwargs))
DECORATORS = {
    "plainly": plainly,
    "by name": by_name,
    "by name, twice": lambda function: plainly(by_name(function)),
    "where it is not given": decorator(lambda f, args, kwargs: f(*args, **{"session": SESSION, "y": 9} | kwargs)),
    "in front": in_front,
    "two in front": decorator(lambda function, args, kwargs: function(SESSION, 7, *args, **kwargs)),
    "the first is dropped": decorator(lambda function, args, kwargs: function(*args[1:], **kwargs)),
    "reversed": decorator(lambda function, args, kwargs: function(*reversed(args), **kwargs)),
    "the last becomes the first": decorator(lambda function, args, kwargs: function(*args[-1:], *args[:-1], **kwargs)),
}


def inner(x: Any, y: Any = 2, session: Any = None) -> dict[str, Any]:
    """Return what came."""
    return {"x": x, "y": y}


def inner_behind(session: Any, x: Any, y: Any = 2) -> dict[str, Any]:
    """Return what came, with the session in front."""
    return {"x": x, "y": y}


def outcome(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        return str(error)


@pytest.mark.parametrize("name", DECORATORS)
@pytest.mark.parametrize("function", [inner, inner_behind])
@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, ["x", "y"]),
        ({"ignore": ("y",)}, ["x"]),
        ({"ignore": ("session", "y")}, ["x"]),
        ({"key": "{x}"}, ["x"]),
        ({"key": "{x}-{y}"}, ["x", "y"]),
    ],
)
def test_no_two_calls_share_a_key(name: str, function: Any, options: Any, counts: list[str]) -> None:
    """Whatever a decorator does with the arguments: one key stands for one and the same, and each call has a key."""
    decorated = DECORATORS[name](function)
    made = maker(decorated, **options)
    seen: dict[str, Any] = {}
    values = (2, 7, 9)
    for count in range(4):
        for args in itertools.product(values, repeat=count):
            for named in ((), ("x",), ("y",), ("x", "y"), ("session",), ("x", "session")):
                for given in itertools.product(values, repeat=len(named)):
                    kwargs = dict(zip(named, given, strict=True))
                    came = outcome(decorated, args, kwargs)
                    tag = made.keys(args, kwargs).tag
                    if isinstance(came, dict) or not options:  # whether a call fails may hang on what does not count
                        counted = {each: came[each] for each in counts} if isinstance(came, dict) else came
                        assert seen.setdefault(tag, counted) == counted, (args, kwargs)
    assert seen


def test_what_a_decorator_hides() -> None:
    """An argument that it adds is not asked for. By name and by position are two keys; by name templates are filled."""
    for function in (by_name(inner), in_front(inner_behind)):
        made = maker(function, key="{x}", refresh_every=1, refresh_calls=[(3,)])
        assert made.keys((), {"x": 3}).tag == "shop.f:1:3"
        assert len({made.keys((3,), {}), made.keys((4,), {}), made.keys((), {"x": 3})}) == 3
        with pytest.raises(OptionError, match="names 'z'"):
            maker(function, key="{z}")
        with pytest.raises(OptionError, match="ignore names 'z'"):
            maker(function, ignore=("z",))
    assert maker(by_name(inner), key="{y}").keys((3,), {"y": 4}).tag == "shop.f:1:4"
    ignoring = maker(by_name(inner), ignore=("y",))
    assert ignoring.keys((3,), {"y": object()}) == ignoring.keys((3,), {})
    with pytest.raises(ArgumentError, match=r"argument 'args\[1\]' of task .* give it by its name and leave"):
        ignoring.keys((3, object()), {})
    with pytest.raises(ArgumentError, match=r"argument 'x' of task .* leave it out with ignore=\('x',\)"):
        ignoring.keys((), {"x": object()})


def test_what_a_decorator_says() -> None:
    """Its own parameters have names, and a signature that it sets is meant."""

    @functools.wraps(inner)
    def named(x: int, **more: Any) -> Any:
        return inner(x, session=SESSION, **more)

    made = maker(named, key="{x}-{y}")
    assert made.keys((3,), {"y": 4}) == made.keys((), {"x": 3, "y": 4})
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        made.keys((), {"y": 4})
    said = by_name(inner)
    said.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    assert maker(said).keys((3,), {}) == maker(said).keys((), {"x": 3, "y": 2}) == maker(plain).keys((3,), {})
    assert maker(functools.lru_cache(plain)).keys((3,), {}) == maker(plain).keys((), {"x": 3})


class Shop:
    """Has methods with decorators."""

    @plainly
    def method(self, x: int) -> None:
        """Take an object."""

    @plainly
    def of_class(cls, x: int) -> None:
        """Take a class."""

    @staticmethod
    @in_front
    def static(session: Any, x: int) -> None:
        """Take neither."""


def test_a_decorated_method() -> None:
    """Its object comes first, also through a decorator, and is known by its name."""
    for method, name, given in ((Shop.method, "self", Shop()), (Shop.of_class, "cls", Shop)):
        made = maker(method, ignore=(name,))
        assert made.keys((given, 3), {}) == made.keys((None, 3), {}) != made.keys((given, 4), {})
        assert maker(method, key=f"{{{name}}}-{{x}}").keys((1,), {"x": 2}).tag == "shop.f:1:1-2"
    static = maker(Shop.static, ignore=("session",))
    assert static.keys((3,), {}) != static.keys((4,), {})
