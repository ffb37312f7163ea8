"""What is stored under a key: a one-line header in plain text, then the payload.

    ML1 V <fence> <started> <fresh until> <compute time> <content type> <encoding> <compression> <etag>\\n<payload>

`V` is a value, `S` a value that is kept for longer than it is fresh, `E` an error; the times are the server's, in
microseconds; an absent encoding or compression is ``-``, and an etag begins with ``=``. The content type of a value of
a type of its own (`typed`) ends in ``;typed``. The script that stores an outcome writes the front of the header, as
only the server knows fence and time; we write the rest. An entry is one Redis string, so a hit is one plain GET.
"""

from __future__ import annotations

import bz2
import contextlib
import importlib
import json
import lzma
import re
import sys
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from kombu import serialization
from kombu.compression import compress
from kombu.exceptions import SerializerNotInstalled
from kombu.serialization import registry  # type: ignore[attr-defined]  # the stubs lack it
from kombu.utils import json as kombu_json

from .errors import DecodeError, EncodeError, OptionError, RemoteTraceback, TaskFailed, ValueTooLarge, text_of

if TYPE_CHECKING:
    from .options import Options
    from .shape import Shape

__all__ = ["Codec", "Entry", "Packed", "check_formats", "fence_of", "pack_error", "since", "unpack_error"]

_MAGIC = b"ML1"
_KINDS = {b"V": (False, False), b"S": (False, True), b"E": (True, False)}
_JSON = "application/json"
_TYPED = ";typed"
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
        soft: whether it is kept beyond `fresh_until`, so that a reader has to look at the time.
        fence: the flight, or `set_cached`, that stored it.
        started: server time at which its computing began, in microseconds since 1970.
        fresh_until: server time until which it is fresh, in microseconds since 1970.
        compute_time: how long the computing took, in microseconds.
        etag: what the task named this version of the value.
    """

    failed: bool
    soft: bool
    fence: str
    started: int
    fresh_until: int
    compute_time: int
    content_type: str
    encoding: str
    compression: str
    etag: str
    body: bytes

    @property
    def stored(self) -> int:
        """Server time at which it was stored, in microseconds since 1970."""
        return self.started + self.compute_time

    @classmethod
    def parse(cls, raw: bytes) -> Entry:
        """Take an entry apart.

        Raises:
            DecodeError: it is no entry, or of a format this version does not know.
        """
        header, newline, body = raw.partition(b"\n")
        try:
            magic, kind, fence, started, fresh, compute, ctype, encoding, compression, etag = header.split(b" ")
            if magic != _MAGIC or not newline or etag[:1] != b"=":
                raise ValueError
            return cls(
                *_KINDS[kind],
                fence.decode("ascii"),
                int(started),
                int(fresh),
                int(compute),
                ctype.decode("ascii"),
                encoding.decode("ascii"),
                compression.decode("ascii"),
                unquote(etag[1:].decode("ascii")) if len(etag) > 1 else "",
                body,
            )
        except (ValueError, KeyError):
            raise DecodeError("a stored entry has no header that this version can read") from None


def fence_of(raw: bytes) -> str:
    """Return what the server, too, takes for the fence of a stored value, be the rest as broken as it may; else ""."""
    found = re.match(rb"ML1 [VS] ([0-9]+-[0-9A-Za-z]+) ", raw[:128])
    return found[1].decode("ascii") if found else ""


def since(fence: str) -> int:
    """Return when a fence was made, in the server's microseconds; 0 if it is none."""
    return int(fence.partition("-")[0] or 0)


class Codec:
    """Encodes and decodes the values of one task, as its options say.

    Args:
        shape: turns values into plain data and back, where the task says of what type they are.
    """

    def __init__(self, task: str, options: Options, shape: Shape | None = None) -> None:
        self._task = task
        self._shape = shape
        self._compress_over = options.compress_over
        self._serializer = options.serializer
        self._compression = _COMPRESSIONS.get(options.compression or "")
        self._mark = "" if shape is None else _TYPED
        self._cap = options.max_value_size
        self._accept = _content_types(options.accept or (options.serializer,))
        self._marked = frozenset(each + self._mark for each in self._accept)

    @property
    def typed(self) -> bool:
        """Whether values are of a type of their own, and not plain data."""
        return self._shape is not None

    def pack(self, value: Any, etag: str = "") -> Packed:
        """Encode a value.

        Raises:
            EncodeError: the serializer cannot encode it.
            ValueTooLarge: encoded, it exceeds `max_value_size`.
        """
        try:
            plain = value if self._shape is None else self._shape.plain(value)
            content_type, encoding, data = serialization.dumps(plain, serializer=self._serializer)
        except Exception as error:
            raise EncodeError(
                f"the value of task {self._task!r}, a {type(value).__qualname__}, cannot be encoded "
                f"by serializer {self._serializer!r}: {text_of(error)}"
            ) from error
        body = data.encode("utf-8") if isinstance(data, str) else bytes(data)
        if len(body) > self._cap:
            raise ValueTooLarge(
                f"the value of task {self._task!r} takes {len(body)} bytes, more than max_value_size={self._cap}"
            )
        compression = "-"
        if self._compression is not None and len(body) >= self._compress_over:
            if self._compression == _ZSTD:
                body, compression = _zstd().compress(body), _ZSTD
            else:
                body, compression = compress(body, self._compression)
        return Packed(f"{content_type}{self._mark} {encoding or '-'} {compression} ={quote(etag, safe='')}", body)

    def repack(self, entry: Entry, etag: str) -> Packed:
        """Return a stored value as it is, to be stored anew."""
        return Packed(f"{entry.content_type} {entry.encoding} {entry.compression} ={quote(etag, safe='')}", entry.body)

    def unpack(self, entry: Entry) -> Any:
        """Decode a value's entry.

        Raises:
            DecodeError: its content type is not accepted, it is typed and should not be, or the other way round; or the
                payload is not what the header says.
            ValueTooLarge: it exceeds `max_value_size`, compressed or not.
        """
        if entry.content_type not in self._marked:
            raise self._foreign(entry.content_type)
        content_type = entry.content_type.removesuffix(self._mark)
        body = entry.body
        if entry.compression != "-":
            body = _decompress(body, entry.compression, self._cap + 1, self._task)
        if len(body) > self._cap:
            raise ValueTooLarge(f"a stored value of task {self._task!r} exceeds max_value_size={self._cap}")
        try:
            if content_type == _JSON and _HOOKED not in body and _decoders.get(_JSON) is kombu_json.loads:
                value = json.loads(body.decode("utf-8"))  # the same, and three times as fast
            else:
                encoding = entry.encoding.replace("-", "")
                value = serialization.loads(body, content_type, encoding, accept=self._accept)
            return value if self._shape is None else self._shape.value(value)
        except Exception as error:
            raise DecodeError(f"a stored value of task {self._task!r} cannot be decoded: {text_of(error)}") from error

    def _foreign(self, content_type: str) -> DecodeError:
        there = content_type.endswith(_TYPED)
        if there != self.typed and content_type.removesuffix(_TYPED) in self._accept:
            found, expected = ("typed", "plain data") if there else ("plain data", "a typed one")
            return DecodeError(
                f"a stored value of task {self._task!r} is {found}, and {expected} is expected here: the task must set "
                f"the same typed (and a client the same of) in all processes, web and worker"
            )
        return DecodeError(
            f"a stored value of task {self._task!r} has content type {content_type!r}; accepted are "
            f"{', '.join(sorted(self._accept))}. Do web and worker set the same serializer?"
        )


def check_formats(options: Options) -> None:
    """Raise `OptionError` for a serializer, content type or compression that kombu does not know."""
    for name, given in (("serializer", (options.serializer,)), ("accept", options.accept)):
        try:
            _content_types(given)
            serialization.dumps("", serializer=options.serializer)
        except SerializerNotInstalled as error:  # kombu knows it, and lacks the package that does it
            ours = "pip install 'celery-memolock[msgpack]' brings what it needs"
            cure = ours if "msgpack" in str(error) else error
            raise OptionError(f"memolock option {name}={getattr(options, name)!r}: {cure}") from None
        except KeyError as error:
            known = ", ".join(sorted(registry.name_to_type))
            raise OptionError(
                f"memolock option {name} names {error.args[0]!r}, which kombu does not know; known: {known}"
            ) from None
    if options.compression is not None and options.compression not in _COMPRESSIONS:
        known = ", ".join(sorted(_COMPRESSIONS))
        raise OptionError(f"memolock option compression={options.compression!r} is unknown; known: {known}, or None")
    if options.compression is not None and _COMPRESSIONS[options.compression] == _ZSTD:
        _zstd()


def _content_types(names: tuple[str, ...]) -> frozenset[str]:
    known: dict[str, str] = registry.name_to_type
    return frozenset(name if "/" in name else known[name] for name in names)


# kombu unpacks without a limit (48 kB can become 50 MB), so unpacking is ours.
_GZIP, _BZIP2, _LZMA, _ZSTD = "application/x-gzip", "application/x-bz2", "application/x-lzma", "application/zstd"
#: By the names that kombu has for them.
_COMPRESSIONS = {
    "gzip": _GZIP,
    "zlib": _GZIP,
    "bzip2": _BZIP2,
    "bzip": _BZIP2,
    "lzma": _LZMA,
    "xz": _LZMA,
    "zstd": _ZSTD,
    "zstandard": _ZSTD,
}
_UNPACKERS: dict[str, Callable[[], Any]] = {
    _ZSTD: lambda: _zstd().ZstdDecompressor(),
    _GZIP: zlib.decompressobj,
    _BZIP2: bz2.BZ2Decompressor,
    _LZMA: lzma.LZMADecompressor,
}


#: A module of the standard library from Python 3.14 on, and before that its backport.
_ZSTD_MODULE = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


def _zstd() -> Any:
    try:
        return importlib.import_module(_ZSTD_MODULE)
    except ImportError:
        cure = "pip install 'celery-memolock[zstd]'"
        if sys.version_info >= (3, 14):
            cure = "this Python was built without its module compression.zstd"
        raise OptionError(f"memolock option compression='zstd': {cure}") from None


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
    """Describe an exception so that a caller in another process can raise its like, whatever its class does."""
    cls = type(error)
    name, message = f"{cls.__module__}:{cls.__qualname__}", text_of(error)[:_LONGEST_MESSAGE]
    record: dict[str, Any] = {
        "type": name,
        "message": message,
        "traceback": (_traceback(error) or f"{name}: {message}\n")[-_LONGEST_TRACEBACK:],
        # The base's own, as pickle takes them: a class may mean something else by that name.
        "args": list(vars(BaseException)["args"].__get__(error)),
    }
    try:
        _, _, body = serialization.dumps(record, serializer="json")
        if len(body) > 2 * _LONGEST_TRACEBACK:
            raise ValueError
    except Exception:  # an argument that is no plain data, or too much of it: the text must do
        record["args"] = None
        _, _, body = serialization.dumps(record, serializer="json")
    return Packed("application/json utf-8 - =", body.encode("utf-8") if isinstance(body, str) else body)


def _traceback(error: BaseException) -> str:
    """Return the traceback as text, or as much as can be had: `traceback` trusts what a class may have overridden."""
    with contextlib.suppress(Exception):
        return "".join(traceback.format_exception(type(error), error, error.__traceback__))
    with contextlib.suppress(Exception):
        where = "".join(traceback.format_tb(error.__traceback__))
        return f"{where}{type(error).__qualname__}: {text_of(error)}\n"
    return ""


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
    rebuilt = _rebuild(type_name, args, remote)
    if rebuilt is None or text_of(rebuilt)[:_LONGEST_MESSAGE] != message:
        rebuilt = TaskFailed(type_name, message)
        rebuilt.__cause__ = remote
    return rebuilt


def _rebuild(type_name: str, args: object, cause: Exception) -> Exception | None:
    module_name, _, qualname = type_name.partition(":")
    cls: Any = sys.modules.get(module_name)
    for part in qualname.split("."):
        cls = getattr(cls, "__dict__", {}).get(part)  # not getattr: a module's __getattr__ may import
    if not (isinstance(cls, type) and issubclass(cls, Exception) and isinstance(args, list)):
        return None
    if issubclass(cls, StopIteration | StopAsyncIteration):
        return None  # it would end the generators and coroutines that it passes through
    try:
        made = cls(*args)
        BaseException.__setattr__(made, "__cause__", cause)  # that of a frozen dataclass refuses
        return made if isinstance(made, Exception) else None
    except Exception:  # its constructor wants something else: it cannot be rebuilt
        return None
