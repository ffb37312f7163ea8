"""From a call to its Redis keys.

Two calls share a key when they would run the task with the same arguments: `f(1)`, `f(x=1)` and a filled in
default are one key. Values of different types never are: `1`, `1.0`, `True` and `"1"` are four keys.

What a decorated function takes is what its decorator takes, which may add arguments of its own, anywhere. One that
takes `*args, **kwargs` hides the names: who gives an argument by position does not tell which one it is, so that `f(1)`
and `f(x=1)` are two keys.
"""

from __future__ import annotations

import inspect
import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import _lru_cache_wrapper as lru_cache_wrapper
from functools import lru_cache
from hashlib import blake2b
from inspect import Parameter, Signature
from types import MethodType
from typing import Any, Final
from uuid import UUID

from .errors import ArgumentError, OptionError
from .options import Options

__all__ = [
    "FORMAT",
    "KeyMaker",
    "Keys",
    "TagKeys",
    "apart",
    "check_named",
    "entry_prefix",
    "inbox_channel",
    "is_of_task",
    "pattern",
    "signature_of",
]

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


def is_of_task(keys: Keys, task: str) -> bool:
    """Whether keys are those of one of a task's calls."""
    return keys.tag.startswith(f"{_quoted(task)}:")


def _quoted(task: str) -> str:
    """Make a task's name one part of a key: a colon in it is none between two parts."""
    return task.replace("%", "%25").replace(":", "%3A")


# ---- what a function takes -------------------------------------------------------------------------------------

#: Whose decorators hand on what they are given, though they take `*args, **kwargs`. So does `functools.lru_cache`.
_HAND_ON: Final = ("celery.", "celery_memolock.")


def signature_of(function: Callable[..., Any]) -> Signature:
    """Return what a call of a function takes, as Celery reads it: not what a decorator of it may add.

    A `__signature__` that a decorator sets counts.
    """
    function = _handed_on(function)
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        # What only type checkers import is not there to be evaluated.
        return inspect.signature(function, follow_wrapped=False, annotation_format=Format.STRING)
    return inspect.signature(function, follow_wrapped=False)


def check_named(function: object, decorator: str) -> None:
    """Raise `OptionError` where a decorator stands above what has no name of its own, by which a worker finds it."""
    if not callable(function) or any(not hasattr(function, name) for name in ("__module__", "__qualname__")):
        raise OptionError(
            f"what stands below @{decorator} is no function with a name, but a {type(function).__qualname__}: "
            f"call it in a function of your own"
        )


def apart(signature: Signature, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Iterate over bound arguments, each of `*args` and `**kwargs` by itself, with what to call it in a message."""
    for name, value in arguments.items():
        match signature.parameters[name].kind:
            case Parameter.VAR_POSITIONAL:
                yield from ((f"{name}[{number}]", each) for number, each in enumerate(value))
            case Parameter.VAR_KEYWORD:
                yield from value.items()
            case _:
                yield name, value


def _handed_on(function: Any) -> Any:
    """Return the function that is given a call's arguments as they are."""
    while hasattr(function, "__wrapped__"):
        where = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
        if not where.startswith(_HAND_ON) and not isinstance(function, lru_cache_wrapper):
            break
        inner = function.__wrapped__
        function = MethodType(inner, function.__self__) if inspect.ismethod(function) else inner
    return function


def _hidden_in(function: Any) -> list[list[str]]:
    """Return the names that each of the functions takes that a decorated one has within, from the outermost on."""
    found: list[list[str]] = []
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
        try:
            parameters = signature_of(function).parameters.values()
        except (TypeError, ValueError):  # it is written in C
            break
        found.append([each.name for each in parameters if each.kind not in _MANY])
    return found


_MANY: Final = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


# ---- keys ------------------------------------------------------------------------------------------------------


class KeyMaker:
    """Makes the keys of one task's calls.

    Args:
        task: the task's name, the first part of every tag; there its colons are quoted as "%3A", and "%" as "%25".
        function: what the task runs.
        options: `key`, `ignore`, `prefix` and `version` are read, and `refresh_calls` checked.
        check: called with a call's arguments when they do not fit; it may raise the `TypeError` that the
            call itself would raise.
        bound: whether the function's first argument is the task itself, which no caller gives.

    Raises:
        OptionError: `key` or `ignore` names something that is no argument of the task, or one of `refresh_calls`
            does not fit it.
    """

    def __init__(
        self,
        task: str,
        function: Callable[..., Any],
        options: Options,
        check: Callable[..., object] | None = None,
        *,
        bound: bool = False,
    ) -> None:
        if set(task) & set("{}"):
            raise OptionError(f"task name {task!r} has braces, which mark the hash tag of a Redis key")
        self._task = task
        self._head = f"{_quoted(task)}:{options.version}:"
        function = _handed_on(function)
        try:
            signature = signature_of(MethodType(function, task) if bound else function)
        except (TypeError, ValueError) as error:  # it is written in C, or no function
            raise OptionError(
                f"{task!r} does not tell its arguments: call it in a function of your own ({error})"
            ) from None
        self._signature = signature
        self._options = options
        self._check = check
        names = signature.parameters
        kinds = {each.kind: each.name for each in names.values()}
        self._rest = kinds.get(Parameter.VAR_POSITIONAL)
        self._more = kinds.get(Parameter.VAR_KEYWORD)
        inner = _hidden_in(function) if self._rest or self._more else []
        self._known = names.keys() | {name for each in inner for name in each}
        # Whatever decorates a method is given the object, or the class, first.
        is_method = _is_of_a_class(function) and not bound and not inspect.ismethod(function)
        first = inner[-1][0] if is_method and inner and inner[-1] else None
        hides = self._more is not None and next(iter(names)) == self._rest
        self._self = first if hides and first in ("self", "cls") else None
        # A call that gives all arguments by position needs no binding, which takes longer than all the rest.
        plain = all(each.kind is Parameter.POSITIONAL_OR_KEYWORD for each in names.values())
        self._plain = tuple(names) if plain else None
        # The keys of the last calls with plain arguments; `typed`, as 1 and True are different arguments.
        self._remembers = not callable(options.key)
        self._remembered = lru_cache(512, typed=True)(lambda *args: self._keys(args, {}))
        for name in options.ignore:
            if name not in self._known:
                raise OptionError(
                    f"memolock option ignore names {name!r}, which task {task!r} does not take; "
                    f"it takes: {', '.join(names) or 'nothing'}"
                )
        wanted = _names_in(task, options.key, self._known) if isinstance(options.key, str) else set()
        self._unnamed = wanted - names.keys()
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
        head, key = self._head, self._options.key
        if isinstance(key, str):
            if self._unnamed:
                more = arguments[self._more] if self._more is not None else {}
                if not self._unnamed <= more.keys():
                    # Nobody knows which argument is meant: all count. No template makes a key with such a head.
                    return Keys.of(self._options.prefix, f"{head[:-1]}p:{self._fingerprint(arguments)}")
                arguments = {**more, **arguments}
            fingerprint = self._custom(key.format(**arguments))
        else:
            fingerprint = self._fingerprint(arguments) if key is None else self._custom(key(*args, **kwargs))
        return Keys.of(self._options.prefix, head + fingerprint)

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._self is not None and args and self._self not in kwargs:
            args, kwargs = args[1:], {self._self: args[0], **kwargs}
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
        ignored = self._options.ignore
        for name, value in arguments.items():
            if name in ignored:
                continue
            counted = value
            if name == self._more and ignored:
                counted = {each: value[each] for each in value if each not in ignored}
            parts.append(name)
            try:
                _encode(counted, parts)
            except _Unencodable as error:
                raise self._unencodable(name, counted, error) from None
        return _digest("".join(parts))

    def _unencodable(self, name: str, value: Any, error: _Unencodable) -> ArgumentError:
        each_of_it = apart(self._signature, {name: value})
        at_fault = next((label for label, each in each_of_it if not _has_form(each)), name)
        leave = f"leave it out with ignore=({at_fault if at_fault in self._known else name!r},)"
        if name == self._rest:
            leave = "give it by its name and leave that out with ignore="
        return ArgumentError(
            f"argument {at_fault!r} of task {self._task!r} cannot become part of a key: {error}. "
            f"Pass plain data, {leave}, or say how with key="
        )

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


def _is_of_a_class(function: Any) -> bool:
    of, _, _ = getattr(function, "__qualname__", "").rpartition(".")
    return bool(of) and not of.endswith("<locals>")


def _names_in(task: str, template: str, names: Set[str]) -> set[str]:
    """Return the arguments that a template names.

    Raises:
        OptionError: it names none, or one that is not there.
    """
    try:
        wanted = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise OptionError(f"memolock option key={template!r} of task {task!r}: {error}") from None
    roots = {name.split(".")[0].split("[")[0] for name in wanted}
    for root in sorted(roots):
        if root not in names:
            raise OptionError(f"memolock option key={template!r} names {root!r}, which task {task!r} does not take")
    if not wanted:
        raise OptionError(f"memolock option key={template!r} of task {task!r} names no argument: one key for all calls")
    return roots


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


def _has_form(value: Any) -> bool:
    try:
        _encoded(value)
    except _Unencodable:
        return False
    return True


def _encoded(value: Any) -> str:
    out: list[str] = []
    _encode(value, out)
    return "".join(out)
