"""What is stored under a key: a one-line header in plain text, then the payload.

    ML1 V <fence> <started> <fresh until> <compute time> <content type> <encoding> <compression>\\n<payload>

`V` is a value, `E` an error; the times are the server's, in microseconds; an absent encoding or compression is
``-``. The script that stores an outcome writes the front of the header, as only the server knows fence and
time; we write the rest. An entry is one Redis string, so a hit is one plain GET.
"""

from __future__ import annotations

import bz2
import json
import lzma
import re
import sys
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kombu import serialization
from kombu.compression import compress
from kombu.exceptions import SerializerNotInstalled
from kombu.serialization import registry  # type: ignore[attr-defined]  # the stubs lack it
from kombu.utils import json as kombu_json

from .errors import DecodeError, EncodeError, OptionError, RemoteTraceback, TaskFailed, ValueTooLarge

if TYPE_CHECKING:
    from .options import Options

__all__ = ["Codec", "Entry", "Packed", "check_formats", "fence_of", "pack_error", "unpack_error"]

_MAGIC = b"ML1"
_JSON = "application/json"
#: kombu's JSON calls a function for each object, to restore what bears this mark. Most values have none.
_HOOKED = b"__type__"
_decoders: dict[str, Any] = registry._decoders  # a program may have put another JSON there
_LONGEST_TRACEBACK = 32_768
_LONGEST_MESSAGE = 4_096


@dataclass(frozen=True, slots=True)
class Packed:
    """An outcome on its way to the server: our part of the header, and the payload."""

    form: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored outcome, taken apart but not decoded.

    Attributes:
        failed: True for an error, False for a value.
        fence: the flight, or `set_cached`, that stored it.
        started: server time at which its computing began, in microseconds since 1970.
        fresh_until: server time until which it is fresh, in microseconds since 1970.
        compute_time: how long the computing took, in microseconds.
    """

    failed: bool
    fence: str
    started: int
    fresh_until: int
    compute_time: int
    content_type: str
    encoding: str
    compression: str
    body: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Entry:
        """Take an entry apart.

        Raises:
            DecodeError: it is no entry, or of a format this version does not know.
        """
        header, newline, body = raw.partition(b"\n")
        try:
            magic, kind, fence, started, fresh, compute, ctype, encoding, compression = header.split(b" ")
            if magic != _MAGIC or not newline or kind not in (b"V", b"E"):
                raise ValueError
            return cls(
                kind == b"E",
                fence.decode("ascii"),
                int(started),
                int(fresh),
                int(compute),
                ctype.decode("ascii"),
                encoding.decode("ascii"),
                compression.decode("ascii"),
                body,
            )
        except ValueError:
            raise DecodeError("a stored entry has no header that this version can read") from None


def fence_of(raw: bytes) -> str:
    """Return what the server, too, takes for the fence of a stored value, be the rest as broken as it may; else ""."""
    found = re.match(rb"ML1 V ([0-9]+-[0-9A-Za-z]+) ", raw[:128])
    return found[1].decode("ascii") if found else ""


class Codec:
    """Encodes and decodes the values of one task, as its options say."""

    def __init__(self, task: str, options: Options) -> None:
        self._task = task
        self._serializer = options.serializer
        self._compression = options.compression
        self._cap = options.max_value_size
        self._accept = _content_types(options.accept or (options.serializer,))

    def pack(self, value: Any) -> Packed:
        """Encode a value.

        Raises:
            EncodeError: the serializer cannot encode it.
            ValueTooLarge: encoded, it exceeds `max_value_size`.
        """
        try:
            content_type, encoding, data = serialization.dumps(value, serializer=self._serializer)
        except Exception as error:
            raise EncodeError(
                f"the value of task {self._task!r}, a {type(value).__qualname__}, cannot be encoded "
                f"by serializer {self._serializer!r}: {error}"
            ) from error
        body = data.encode("utf-8") if isinstance(data, str) else bytes(data)
        if len(body) > self._cap:
            raise ValueTooLarge(
                f"the value of task {self._task!r} takes {len(body)} bytes, more than max_value_size={self._cap}"
            )
        compression = "-"
        if self._compression is not None:
            body, compression = compress(body, self._compression)
        return Packed(f"{content_type} {encoding or '-'} {compression}", body)

    def unpack(self, entry: Entry) -> Any:
        """Decode a value's entry.

        Raises:
            DecodeError: its content type is not accepted, or the payload is not what the header says.
            ValueTooLarge: it exceeds `max_value_size`, compressed or not.
        """
        if entry.content_type not in self._accept:
            raise DecodeError(
                f"a stored value of task {self._task!r} has content type {entry.content_type!r}; accepted are "
                f"{', '.join(sorted(self._accept))}. Do web and worker set the same serializer?"
            )
        body = entry.body
        if entry.compression != "-":
            body = _decompress(body, entry.compression, self._cap + 1, self._task)
        if len(body) > self._cap:
            raise ValueTooLarge(f"a stored value of task {self._task!r} exceeds max_value_size={self._cap}")
        try:
            if entry.content_type == _JSON and _HOOKED not in body and _decoders.get(_JSON) is kombu_json.loads:
                return json.loads(body.decode("utf-8"))  # the same, and three times as fast
            return serialization.loads(body, entry.content_type, entry.encoding.replace("-", ""), accept=self._accept)
        except Exception as error:
            raise DecodeError(f"a stored value of task {self._task!r} cannot be decoded: {error}") from error


def check_formats(options: Options) -> None:
    """Raise `OptionError` for a serializer, content type or compression that kombu does not know."""
    for name, given in (("serializer", (options.serializer,)), ("accept", options.accept)):
        try:
            _content_types(given)
            serialization.dumps("", serializer=options.serializer)
        except SerializerNotInstalled as error:  # kombu knows it, and lacks the package that does it
            raise OptionError(f"memolock option serializer={options.serializer!r}: {error}") from None
        except KeyError as error:
            known = ", ".join(sorted(registry.name_to_type))
            raise OptionError(
                f"memolock option {name} names {error.args[0]!r}, which kombu does not know; known: {known}"
            ) from None
    if options.compression is not None and options.compression not in _COMPRESSIONS:
        known = ", ".join(sorted(_COMPRESSIONS))
        raise OptionError(f"memolock option compression={options.compression!r} is unknown; known: {known}, or None")


def _content_types(names: tuple[str, ...]) -> frozenset[str]:
    known: dict[str, str] = registry.name_to_type
    return frozenset(name if "/" in name else known[name] for name in names)


# kombu unpacks without a limit (48 kB can become 50 MB), so unpacking is ours.
_COMPRESSIONS = {"gzip": "application/x-gzip", "bzip2": "application/x-bz2", "lzma": "application/x-lzma"}
_UNPACKERS: dict[str, Callable[[], Any]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": lzma.LZMADecompressor,
}


def _decompress(data: bytes, compression: str, most: int, task: str) -> bytes:
    unpacker = _UNPACKERS.get(compression)
    if unpacker is None:
        raise DecodeError(f"a stored value of task {task!r} is compressed as {compression!r}, which is not known here")
    try:
        unpacking = unpacker()
        unpacked: bytes = unpacking.decompress(data, most)
        if not unpacking.eof and len(unpacked) < most:
            raise EOFError("it is cut short")
    except Exception as error:
        raise DecodeError(f"a stored value of task {task!r} cannot be decompressed: {error}") from error
    return unpacked


def pack_error(error: BaseException) -> Packed:
    """Describe an exception so that a caller in another process can raise its like. Never fails."""
    cls = type(error)
    text = "".join(traceback.format_exception(cls, error, error.__traceback__))
    record: dict[str, Any] = {
        "type": f"{cls.__module__}:{cls.__qualname__}",
        "message": _text(error)[:_LONGEST_MESSAGE],
        "traceback": text[-_LONGEST_TRACEBACK:],
        "args": list(error.args),
    }
    try:
        _, _, body = serialization.dumps(record, serializer="json")
        if len(body) > 2 * _LONGEST_TRACEBACK:
            raise ValueError
    except Exception:  # an argument that is no plain data, or too much of it: the text must do
        record["args"] = None
        _, _, body = serialization.dumps(record, serializer="json")
    return Packed("application/json utf-8 -", body.encode("utf-8") if isinstance(body, str) else body)


def unpack_error(entry: Entry) -> Exception:
    """Make a new exception from an error's entry: of the original type where that is safe, else `TaskFailed`.

    Safe means: the class is an ordinary exception, defined in a module that this process has imported already
    (nothing is imported on the word of stored data), and rebuilding it gives the same text.

    Raises:
        DecodeError: the record is no description of an error.
    """
    try:
        record = serialization.loads(entry.body, "application/json", "utf-8", accept={"application/json"})
        type_name, message, args = str(record["type"]), str(record["message"]), record["args"]
        remote = RemoteTraceback(str(record["traceback"]))
    except Exception as error:
        raise DecodeError("a stored error cannot be decoded") from error
    rebuilt = _rebuild(type_name, args)
    if rebuilt is None or _text(rebuilt)[:_LONGEST_MESSAGE] != message:
        rebuilt = TaskFailed(type_name, message)
    rebuilt.__cause__ = remote
    return rebuilt


def _rebuild(type_name: str, args: object) -> Exception | None:
    module_name, _, qualname = type_name.partition(":")
    cls: Any = sys.modules.get(module_name)
    for part in qualname.split("."):
        cls = getattr(cls, "__dict__", {}).get(part)  # not getattr: a module's __getattr__ may import
    if not (isinstance(cls, type) and issubclass(cls, Exception) and isinstance(args, list)):
        return None
    if issubclass(cls, StopIteration | StopAsyncIteration):
        return None  # it would end the generators and coroutines that it passes through
    try:
        return cls(*args)
    except Exception:  # its constructor wants something else: it cannot be rebuilt
        return None


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a broken __str__ must not hide that there was an error
        return "<unprintable>"
