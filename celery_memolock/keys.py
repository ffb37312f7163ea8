"""From a call to its Redis keys.

Two calls share a key when they would run the task with the same arguments: `f(1)`, `f(x=1)` and a filled in
default are one key. Values of different types never are: `1`, `1.0`, `True` and `"1"` are four keys.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from inspect import Parameter, Signature
from typing import Any
from uuid import UUID

from .errors import ArgumentError, OptionError
from .options import Options

__all__ = ["FORMAT", "KeyMaker", "Keys", "TagKeys", "entry_prefix", "inbox_channel", "pattern"]

#: The version of everything stored under our names. A new one makes all older names invisible.
FORMAT = "1"

_LONGEST_READABLE = 200


@dataclass(frozen=True, slots=True)
class Keys:
    """The Redis names that belong to one key. They share one hash tag, hence one cluster slot."""

    entry: str

    @classmethod
    def of(cls, prefix: str, tag: str) -> Keys:
        """Name the keys of `tag`, which holds no braces."""
        return cls(f"{prefix}:{FORMAT}:e:{{{tag}}}")

    @classmethod
    def of_any(cls, name: str) -> Keys:
        """Return the keys to which the name of an entry, a flight or an error record belongs."""
        head, tail = name.split(":{", 1)
        return cls(f"{head[:-1]}e:{{{tail}")

    @property
    def tag(self) -> str:
        """What is unique about this key: ``task:version:fingerprint``."""
        return self.entry[self.entry.index("{") + 1 : -1]

    @property
    def all(self) -> tuple[str, str, str, str]:
        """The entry, the flight, the error record and the runs that are alive: KEYS of every script."""
        return self.entry, self._of_kind("f"), self.error, self._of_kind("r")

    @property
    def error(self) -> str:
        """The error record."""
        return self._of_kind("x")

    def parked(self, fence: str) -> str:
        """Name the outcome of one flight, as it is kept for a while for those who waited for it."""
        return self._of_kind(f"p:{fence}")

    def _of_kind(self, kind: str) -> str:
        head, tail = self.entry.split(":e:{", 1)
        return f"{head}:{kind}:{{{tail}"


@dataclass(frozen=True, slots=True)
class TagKeys:
    """The names of the indices of some tags."""

    all: tuple[str, ...]

    @classmethod
    def of(cls, prefix: str, task: str, tags: Iterable[str]) -> TagKeys:
        """Name the indices.

        Raises:
            ArgumentError: a tag is no text, or an empty one.
        """
        names = []
        for tag in tags:
            if not isinstance(tag, str) or not tag:
                raise ArgumentError(f"task {task!r} has a tag {tag!r}; a tag must be a text that is not empty")
            name = tag if len(tag) <= _LONGEST_READABLE and _NAMEABLE(tag) else _digest(tag)
            names.append(f"{prefix}:{FORMAT}:t:{{{name}}}")
        return cls(tuple(names))


def inbox_channel(prefix: str, inbox: str) -> str:
    """Name the pub/sub channel of one process."""
    return f"{prefix}:{FORMAT}:i:{inbox}"


def entry_prefix(prefix: str, task: str) -> str:
    """Name what the names of all entries of a task begin with."""
    return f"{prefix}:{FORMAT}:e:{{{_quoted(task)}:"


def pattern(prefix: str, task: str, kinds: str) -> str:
    """Return the pattern of the names of all keys of a task that are of one of these kinds: e, f, x."""
    escaped = [re.sub(r"([*?\[\]\\])", r"\\\1", part) for part in (prefix, _quoted(task))]
    return f"{escaped[0]}:{FORMAT}:[{kinds}]:{{{escaped[1]}:*"


def _quoted(task: str) -> str:
    """Make a task's name one part of a key: a colon in it is none between two parts."""
    return task.replace("%", "%25").replace(":", "%3A")


class KeyMaker:
    """Makes the keys of one task's calls.

    Args:
        task: the task's name, the first part of every tag; there its colons are quoted as "%3A", and "%" as "%25".
        signature: what the task takes (without `self`).
        options: `key`, `ignore`, `prefix` and `version` are read, and `refresh_calls` checked.
        check: called with a call's arguments when they do not fit; it may raise the `TypeError` that the
            call itself would raise.

    Raises:
        OptionError: `key` or `ignore` names something that is no argument of the task, or one of `refresh_calls`
            does not fit it.
    """

    def __init__(
        self,
        task: str,
        signature: Signature,
        options: Options,
        check: Callable[..., object] | None = None,
    ) -> None:
        if set(task) & set("{}"):
            raise OptionError(f"task name {task!r} has braces, which mark the hash tag of a Redis key")
        self._task = task
        self._head = f"{_quoted(task)}:{options.version}:"
        self._signature = signature
        self._options = options
        self._check = check
        names = signature.parameters
        # A call that gives all arguments by position needs no binding, which takes longer than all the rest.
        plain = all(each.kind is Parameter.POSITIONAL_OR_KEYWORD for each in names.values())
        self._plain = tuple(names) if plain else None
        # The keys of the last calls with plain arguments; `typed`, as 1 and True are different arguments.
        self._remembers = not callable(options.key)
        self._remembered = lru_cache(512, typed=True)(lambda *args: self._keys(args, {}))
        for name in options.ignore:
            if name not in names:
                raise OptionError(
                    f"memolock option ignore names {name!r}, which task {task!r} does not take; "
                    f"it takes: {', '.join(names) or 'nothing'}"
                )
        if isinstance(options.key, str):
            _check_template(task, options.key, names)
        for call in options.refresh_calls if options.refresh_every is not None else ():
            try:
                signature.bind(*call)
            except TypeError as error:
                raise OptionError(
                    f"memolock option refresh_calls of task {task!r}: the arguments {call!r} do not fit it: {error}"
                ) from None

    def keys(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Keys:
        """Return the keys of a call.

        Raises:
            TypeError: the arguments do not fit the task.
            ArgumentError: an argument cannot become part of a key.
        """
        if kwargs or not self._remembers:
            return self._keys(args, kwargs)
        for value in args:  # a loop, as a generator takes longer than the rest
            kind = type(value)
            if kind not in _ATOMS or (kind is str and len(value) > _LONGEST_REMEMBERED):
                return self._keys(args, kwargs)
        found: Keys = self._remembered(*args)
        return found

    def _keys(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Keys:
        if self._plain is not None and len(args) == len(self._plain) and not kwargs:
            arguments: Mapping[str, Any] = dict(zip(self._plain, args, strict=True))
        else:
            arguments = self._bind(args, kwargs)
        key = self._options.key
        if key is None:
            fingerprint = self._fingerprint(arguments)
        else:
            fingerprint = self._custom(key.format(**arguments) if isinstance(key, str) else key(*args, **kwargs))
        return Keys.of(self._options.prefix, self._head + fingerprint)

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            if self._check is not None:
                self._check(*args, **kwargs)
            raise TypeError(f"{self._task}() {error}") from None
        bound.apply_defaults()
        return bound.arguments

    def _fingerprint(self, arguments: Mapping[str, Any]) -> str:
        parts: list[str] = []
        for name, value in arguments.items():
            if name in self._options.ignore:
                continue
            parts.append(name)
            try:
                _encode(value, parts)
            except _Unencodable as error:
                raise ArgumentError(
                    f"argument {name!r} of task {self._task!r} cannot become part of a key: {error}. "
                    f"Pass plain data, leave it out with ignore=({name!r},), or say how with key="
                ) from None
        return _digest("".join(parts))

    def _custom(self, key: object) -> str:
        if not isinstance(key, str) or not key:
            raise ArgumentError(f"key= of task {self._task!r} gave {key!r}; it must give a text that is not empty")
        if not _NAMEABLE(key):
            raise ArgumentError(
                f"key= of task {self._task!r} gave {key!r}; braces are refused, they mark the hash tag, and so is half "
                f"of a character (a lone surrogate), which cannot be sent"
            )
        return key if len(key) <= _LONGEST_READABLE else _digest(key)


#: Not float: 0.0 and -0.0 are equal, and make different keys.
_ATOMS = frozenset([str, int, bool, type(None)])


#: Half of a character of two cannot be sent, and braces mark the hash tag.
_NAMEABLE = re.compile(r"[^{}\ud800-\udfff]*").fullmatch


#: Longer texts as arguments are not kept in memory.
_LONGEST_REMEMBERED = 200


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _check_template(task: str, template: str, names: Mapping[str, Parameter]) -> None:
    try:
        wanted = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise OptionError(f"memolock option key={template!r} of task {task!r}: {error}") from None
    for name in wanted:
        root = name.split(".")[0].split("[")[0]
        if root not in names:
            raise OptionError(f"memolock option key={template!r} names {root!r}, which task {task!r} does not take")
    if not wanted:
        raise OptionError(f"memolock option key={template!r} of task {task!r} names no argument: one key for all calls")


class _Unencodable(Exception):
    pass


def _encode(value: Any, out: list[str]) -> None:
    """Append a text that differs for every two values that differ, in type or in content.

    Every part carries its length or its end, so that no two lists of parts read the same.
    """
    if value is None:
        out.append("n;")
    elif value is True:
        out.append("t;")
    elif value is False:
        out.append("f;")
    elif isinstance(value, Enum):
        out.append(f"E{type(value).__module__}.{type(value).__qualname__}.{value.name};")
    elif isinstance(value, str):
        out.append(f"s{len(value)}:{value}")
    elif isinstance(value, int):
        out.append(f"i{int(value)};")
    elif isinstance(value, float):
        out.append(f"d{float(value)!r};")
    elif isinstance(value, bytes | bytearray | memoryview):
        out.append(f"b{bytes(value).hex()};")
    elif isinstance(value, list | tuple):
        # One key for both: JSON hands either to the task as a list.
        out.append(f"l{len(value)}:")
        for item in value:
            _encode(item, out)
    elif isinstance(value, Mapping):
        out.append(f"m{len(value)}:")
        out.extend(sorted(_encoded(key) + _encoded(item) for key, item in value.items()))
    elif isinstance(value, set | frozenset):
        out.append(f"S{len(value)}:")
        out.extend(sorted(_encoded(item) for item in value))
    elif isinstance(value, datetime | date | time):
        out.append(f"{type(value).__name__}{value.isoformat()};")
    elif isinstance(value, timedelta):
        out.append(f"D{value.days},{value.seconds},{value.microseconds};")
    elif isinstance(value, Decimal | UUID):
        out.append(f"{type(value).__name__}{value};")
    else:
        raise _Unencodable(f"a {type(value).__module__}.{type(value).__qualname__} has no canonical form")


def _encoded(value: Any) -> str:
    out: list[str] = []
    _encode(value, out)
    return "".join(out)
