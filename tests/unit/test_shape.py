"""Values of a type, and compression: what comes back is what was stored."""

from __future__ import annotations

import sys
import tracemalloc
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import attrs
import pydantic
import pytest

from celery_memolock import DecodeError, EncodeError, OptionError, ValueTooLarge
from celery_memolock.codec import _ZSTD_MODULE, Codec, Entry, Packed
from celery_memolock.options import Options
from celery_memolock.shape import Shape


@dataclass
class Point:
    """A plain dataclass."""

    x: int
    seen: datetime


@attrs.define
class Span:
    """A class of attrs."""

    start: Point
    length: float


@dataclass
class Blob:
    """A plain dataclass with bytes."""

    data: bytes


@attrs.define
class Sealed:
    """A class of attrs with bytes."""

    data: bytes


class Scan(pydantic.BaseModel):
    """A model that says how its bytes are written, as pydantic itself takes them for UTF-8."""

    model_config = pydantic.ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
    data: bytes


class Shelf(pydantic.BaseModel):
    """A model of pydantic, with another type in it."""

    name: str
    price: Decimal
    points: list[Point] = []


class Wide(Shelf):
    """A model with a field more."""

    width: int


WHEN = datetime(2026, 1, 2, tzinfo=timezone.utc)
POINT = Point(1, WHEN)


def points() -> list[Point]:
    return []


def silent():  # type: ignore[no-untyped-def]
    return 1


def codec(kind: Any = None, **options: Any) -> Codec:
    return Codec("f", Options(ttl=5, **options), None if kind is None else Shape("f", kind))


def stored(packed: Packed) -> Entry:
    return Entry.parse(f"ML1 V 17-abc 100 200 50 {packed.form}\n".encode() + packed.body)


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Point, POINT),
        (Span, Span(POINT, 2.5)),
        (Shelf, Shelf(name="a", price=Decimal("1.10"), points=[POINT])),
        (list[Point], [POINT, POINT]),
        (dict[str, Decimal], {"a": Decimal("0.1")}),
        (Point | None, None),
        (tuple[int, str], (1, "a")),
        (set[int], {1, 2}),
        (Shelf | Wide, Wide(name="a", price=Decimal("1.10"), width=7)),
        (bytes, b"\xff\x00"),
        (dict[str, bytes], {"a": b"\xff\x00"}),
        (Blob, Blob(b"\xff\x00")),
        (list[Blob], [Blob(b"\xff\x00")]),
        (Sealed, Sealed(b"\xff\x00")),
        (Scan, Scan(data=b"\xff\x00")),
    ],
    ids=str,
)
def test_comes_back(kind: Any, value: Any, serializer: str) -> None:
    """A typed value is what it was, for any serializer."""
    made = codec(kind, serializer=serializer)
    assert made.unpack(stored(made.pack(value))) == value


def test_wrong_value() -> None:
    """A task that does not return what it says is told so; a stored value of another shape cannot be read."""
    with pytest.raises(EncodeError, match="'f'"):
        codec(Point).pack({"x": "no number", "seen": None})
    with pytest.raises(DecodeError):
        codec(Point).unpack(stored(codec().pack({"y": 1})))


def test_types_that_are_none() -> None:
    """A function that does not say what it returns, or says what cannot be looked up, is refused."""
    with pytest.raises(OptionError, match="does not say"):
        Shape.of("f", silent)

    class Local:
        pass

    def local() -> Local:
        return Local()

    local.__annotations__["return"] = "Nowhere"
    with pytest.raises(OptionError, match="top of the module"):
        Shape.of("f", local)
    assert Shape.of("f", points).value([]) == []


@pytest.mark.parametrize("missing", ["pydantic", _ZSTD_MODULE])
def test_missing_package(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option whose package is missing names the extra, or what Python lacks."""
    monkeypatch.setitem(sys.modules, missing, None)
    uses = {"pydantic": lambda: Shape("f", Point), _ZSTD_MODULE: lambda: Options(ttl=5, compression="zstd")}
    with pytest.raises(OptionError, match=r"celery-memolock\[(typed|zstd)\]|without its module compression.zstd"):
        uses[missing]()


def test_typed_on_one_side_only() -> None:
    """Where one side sets `typed` and the other does not, each says what is wrong, and none takes it for garbage."""
    typed, plain = codec(Point), codec()
    values = {typed: POINT, plain: {"x": 1, "seen": WHEN}}
    for there, here, found in (
        (typed, plain, "is typed, and plain data"),
        (plain, typed, "is plain data, and a typed"),
    ):
        with pytest.raises(DecodeError, match=f"{found}.*must set the same typed"):
            here.unpack(stored(there.pack(values[there])))
    other = Codec("f", Options(ttl=5, serializer="pickle"), Shape("f", Point))
    with pytest.raises(DecodeError, match="same serializer"):
        typed.unpack(stored(other.pack(POINT)))


def test_zstd() -> None:
    """It is smaller, comes back whole, and is never unpacked beyond the cap or taken for whole when it is cut."""
    made = codec(compression="zstd")
    packed = made.pack(["x" * 10_000])
    assert len(packed.body) < 100
    assert made.unpack(stored(packed)) == ["x" * 10_000]
    with pytest.raises(DecodeError):
        made.unpack(stored(Packed(packed.form, packed.body[:-5])))
    with pytest.raises(DecodeError):
        made.unpack(stored(Packed(packed.form, b"rubbish")))
    bomb = codec(compression="zstd", max_value_size=60_000_000).pack("0" * 50_000_000)
    tracemalloc.start()
    with pytest.raises(ValueTooLarge):
        codec(compression="zstd", max_value_size=10_000).unpack(stored(bomb))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 5_000_000


#: ["xxx…"], with 10,000 of them, as others write it.
FRAMES = {
    "Python 3.14, its backport, and zstandard": "28b52ffd601426650000285b2278225d01000c870743",
    "a stream, which does not tell its size": "28b52ffd0058650000285b2278225d01000c870743",
    "with a checksum": "28b52ffd641426650000285b2278225d01000c870743f27e8ff0",
}


@pytest.mark.parametrize("writer", FRAMES)
def test_zstd_of_others(writer: str) -> None:
    """What one Python, or one library, has written, another reads; what was cut anywhere is refused."""
    made = codec(compression="zstd")
    form = made.pack(["x" * 10_000]).form
    frame = bytes.fromhex(FRAMES[writer])
    assert made.unpack(stored(Packed(form, frame))) == ["x" * 10_000]
    for cut in range(len(frame)):
        with pytest.raises(DecodeError):
            made.unpack(stored(Packed(form, frame[:cut])))


def test_compress_over() -> None:
    """What is small stays as it is."""
    made = codec(compression="gzip", compress_over=100)
    assert made.pack("x" * 50).form.split()[2] == "-"
    long = made.pack("x" * 500)
    assert long.form.split()[2] == "application/x-gzip"
    assert made.unpack(stored(long)) == "x" * 500
