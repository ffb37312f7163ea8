"""The stored form of values and errors."""

from __future__ import annotations

import dataclasses
import pickle
import random
import zlib
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from celery_memolock import DecodeError, EncodeError, RemoteTraceback, TaskFailed, ValueTooLarge
from celery_memolock.codec import Codec, Entry, Packed, pack_error, unpack_error
from celery_memolock.errors import text_of
from celery_memolock.options import Options
from tests.odd_errors import Askew, Coded


class Custom(Exception):
    """An exception with arguments."""


class Unusual(Exception):
    """An exception whose constructor takes other things than its arguments."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


class Silent(Exception):
    """An exception that will not be told of."""

    args = property(lambda self: 1 / 0)  # type: ignore[assignment]

    def __str__(self) -> str:
        raise KeyboardInterrupt

    def __repr__(self) -> str:
        raise ValueError

    def __reduce__(self) -> Any:
        raise ValueError


@dataclasses.dataclass(frozen=True)
class Command(Exception):
    """An exception with a field that hides the arguments, and that takes no attribute later."""

    name: str
    args: list[str] | None = None  # type: ignore[assignment]


class Loud(str):
    """A text that is none when it is cut."""

    def __getitem__(self, key: Any) -> Any:
        raise ValueError


class Spoken(Exception):
    """An exception whose text is such a one."""

    def __str__(self) -> str:
        return Loud(self.args[0])


class Changeling(Exception):
    """An exception whose class makes something else."""

    def __new__(cls, *args: Any) -> Any:
        return Exception.__new__(cls) if not args else KeyboardInterrupt(*args)


def codec(**options: Any) -> Codec:
    return Codec("shop.f", Options(ttl=5, **options))


def stored(packed: Packed, kind: str = "V") -> bytes:
    """Put together what the script stores."""
    return f"ML1 {kind} 17-abc 100 200 50 {packed.form}\n".encode() + packed.body


def back(value: Any, **options: Any) -> Any:
    made = codec(**options)
    return made.unpack(Entry.parse(stored(made.pack(value))))


def again(error: Exception) -> Exception:
    return unpack_error(Entry.parse(stored(pack_error(error), "E")))


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        "",
        [],
        False,
        1.5,
        "ä\n",
        {"a": [1, {"b": None}]},
        datetime(2026, 1, 2, tzinfo=timezone.utc),
        Decimal("1.10"),
        UUID(int=7),
        b"\x00\n",
    ],
)
@pytest.mark.parametrize("compression", [None, "gzip", "bzip2", "lzma"])
def test_round_trip(value: Any, compression: str | None) -> None:
    """A value comes back as it was."""
    assert back(value, compression=compression) == value


@pytest.mark.parametrize(("alias", "name"), [("zlib", "gzip"), ("bzip", "bzip2"), ("xz", "lzma")])
def test_other_names_of_a_compression(alias: str, name: str) -> None:
    """kombu knows it by either, and what is stored under one is read under the other."""
    assert codec(compression=name).unpack(Entry.parse(stored(codec(compression=alias).pack([1])))) == [1]


def test_header() -> None:
    """The header says when and by whom a value was stored, and what it is."""
    entry = Entry.parse(stored(codec().pack([1])))
    assert (entry.failed, entry.fence, entry.started, entry.fresh_until, entry.compute_time) == (
        False,
        "17-abc",
        100,
        200,
        50,
    )
    assert (entry.content_type, entry.encoding, entry.compression) == ("application/json", "utf-8", "-")


def test_unencodable_value() -> None:
    """What the serializer cannot encode is a typed error that names the task."""
    with pytest.raises(EncodeError, match=r"task 'shop\.f', a set.*'json'"):
        codec().pack({1})


def test_too_large() -> None:
    """The cap holds when a value is encoded and when it is read."""
    with pytest.raises(ValueTooLarge, match="max_value_size=10"):
        codec(max_value_size=10).pack("x" * 20)
    with pytest.raises(ValueTooLarge, match="max_value_size=10"):
        codec(max_value_size=10).unpack(Entry.parse(stored(codec().pack("x" * 20))))


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "lzma"])
def test_bomb(compression: str) -> None:
    """A small payload that would become a large one is refused before it does."""
    bomb = codec(compression=compression).pack("0" * 10_000_000)
    assert len(bomb.body) < 100_000
    with pytest.raises(ValueTooLarge):
        codec(max_value_size=100_000).unpack(Entry.parse(stored(bomb)))


def test_only_what_is_accepted_is_decoded() -> None:
    """Pickle, or any other content type than the task's own, is refused, by its name."""

    class Trap:
        def __reduce__(self) -> Any:
            return pytest.fail, ("unpickled",)

    for form in ("application/x-python-serialize binary - =", "application/data binary - =", "text/plain utf-8 - ="):
        with pytest.raises(DecodeError, match="same serializer"):
            codec().unpack(Entry.parse(stored(Packed(form, pickle.dumps(Trap())))))


def test_accept() -> None:
    """More content types may be accepted than are written."""
    packed = codec(serializer="pickle").pack({"a": 1})
    assert codec(accept=["json", "pickle"]).unpack(Entry.parse(stored(packed))) == {"a": 1}


def test_corrupt_entries() -> None:
    """Whatever is stored, reading it gives a value or a typed error, and nothing else."""
    rng = random.Random(5)
    good = stored(codec(compression="gzip").pack({"a": list(range(50))}))
    for _ in range(3000):
        raw = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            action = rng.randrange(3)
            at = rng.randrange(len(raw))
            if action == 0:
                raw[at] = rng.randrange(256)
            elif action == 1:
                del raw[at : at + rng.randrange(20)]
            else:
                raw[at:at] = rng.randbytes(3)
            raw = raw or bytearray(b"x")
        try:
            entry = Entry.parse(bytes(raw))
            if entry.failed:
                unpack_error(entry)
            else:
                codec().unpack(entry)
        except (DecodeError, ValueTooLarge):
            pass


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"\n", b"ML1", b"{}"),
        b"ML2 V 1-a 1 1 1 a b c =\n{}",
        b"ML1 X 1-a 1 1 1 a b c =\n{}",
        b"ML1 V 1-a 1 1 1 a b c\n{}",
        b"ML1 V 1-a 1 1 1 a b c d\n{}",
    ],
)
def test_other_formats(raw: bytes) -> None:
    """An entry of another format is no entry."""
    with pytest.raises(DecodeError):
        Entry.parse(raw)


def test_unknown_compression() -> None:
    """A compression that is not known here is an error, and so is a payload that is none."""
    with pytest.raises(DecodeError, match="not known here"):
        codec().unpack(Entry.parse(stored(Packed("application/json utf-8 application/brotli =", b"x"))))
    with pytest.raises(DecodeError, match="decompressed"):
        codec().unpack(Entry.parse(stored(Packed("application/json utf-8 application/x-gzip =", b"x"))))
    body = zlib.compress(b"{")
    with pytest.raises(DecodeError, match="decoded"):
        codec().unpack(Entry.parse(stored(Packed("application/json utf-8 application/x-gzip =", body))))


def test_error_of_its_own_type() -> None:
    """An exception of a loaded module comes back as itself, with the worker's traceback as its cause."""
    try:
        raise Custom("no stock", 7)
    except Custom as error:
        rebuilt = again(error)
    assert type(rebuilt) is Custom
    assert rebuilt.args == ("no stock", 7)
    assert isinstance(rebuilt.__cause__, RemoteTraceback)
    assert 'raise Custom("no stock", 7)' in str(rebuilt.__cause__)


@pytest.mark.parametrize("error", [Coded(5), Command("ls"), Spoken("loud"), Silent("x"), Askew("odd")])
def test_error_that_is_hard_to_tell_of(error: Exception) -> None:
    """Whatever its class does, its type and text are told, with where it was raised."""
    why = ValueError("why")
    why.__cause__ = error  # in a circle
    try:
        raise error from why
    except type(error):
        pass  # what is raised beyond this is not to be told as its consequence: pytest would fail to
    rebuilt = again(error)
    assert type(rebuilt) is type(error)
    assert text_of(rebuilt) == text_of(error)
    cause = str(rebuilt.__cause__)
    assert "raise error" in cause
    assert type(error).__qualname__ in cause


def test_error_whose_class_makes_something_else() -> None:
    """What is no ordinary exception is not raised in those who wait."""
    error = Changeling()
    vars(BaseException)["args"].__set__(error, ("x",))
    assert isinstance(again(error), TaskFailed)


def test_text_of_an_error_that_has_none() -> None:
    """It is told by its type: where an error is formatted there must not be another."""
    assert text_of(Silent()) == "<unprintable Silent>"
    assert type(text_of(Spoken("loud"))) is str


def test_each_caller_gets_an_instance_of_its_own() -> None:
    """Two callers do not share an exception, to which a traceback sticks."""
    packed = stored(pack_error(Custom(1)), "E")
    assert unpack_error(Entry.parse(packed)) is not unpack_error(Entry.parse(packed))


@pytest.mark.parametrize("error", [Unusual(4, reason="x"), Custom(object()), Custom("x" * 10**6)])
def test_error_that_cannot_be_rebuilt(error: Exception) -> None:
    """It becomes `TaskFailed`, with its name and text."""
    rebuilt = again(error)
    assert isinstance(rebuilt, TaskFailed)
    assert rebuilt.type_name.endswith(type(error).__qualname__)
    assert len(rebuilt.message) <= 4096
    assert str(rebuilt).startswith(rebuilt.type_name)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:SystemExit",
        "builtins:KeyboardInterrupt",
        "builtins:StopIteration",
        "builtins:exit",
        "builtins:eval",
        "not.loaded:Error",
        "",
        "builtins:",
    ],
)
def test_nothing_but_exceptions_is_built(name: str) -> None:
    """A forged record builds nothing but ordinary exceptions of loaded modules."""
    packed = pack_error(ValueError("echo forged"))
    body = packed.body.replace(b"builtins:ValueError", name.encode())
    rebuilt = unpack_error(Entry.parse(stored(Packed(packed.form, body), "E")))
    assert isinstance(rebuilt, TaskFailed)


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"type": 1}', b"\xff"])
def test_corrupt_error(body: bytes) -> None:
    """A record that describes no error is a typed error itself."""
    with pytest.raises(DecodeError):
        unpack_error(Entry.parse(stored(Packed("application/json utf-8 - =", body), "E")))
