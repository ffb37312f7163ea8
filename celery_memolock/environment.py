"""What environment variables say: ``MEMOLOCK_LEASE=30`` is a default for whatever this process asks for."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, Final

from .errors import OptionError
from .options import OF_A_TASK, Options, checked

__all__ = ["defaults", "instead"]

_START: Final = "MEMOLOCK_"

#: What can be said in a variable, and of which type it is. Types of exceptions cannot.
_KINDS: Final[Mapping[str, str]] = {
    f.name: str(f.type) for f in fields(Options) if f.name not in (*OF_A_TASK, "cache_errors")
}

#: Variables that are no options: they name servers, and tell this project's own demo and tests what to do. A container
#: that is linked to a service by the name of memolock has others, such as MEMOLOCK_SERVICE_HOST and MEMOLOCK_PORT.
_OTHERS: Final = re.compile(
    "redis_url|server_binary|driver|recovery|repeat|demo_.*|(.*_)?(service_host|service_port|port)(_.*)?"
)

_TRUE: Final = ("1", "true", "yes", "on")
_FALSE: Final = ("0", "false", "no", "off")


def defaults(without: Iterable[str] = ()) -> dict[str, Any]:
    """Return the options that the environment names. A variable without text counts as none.

    Args:
        without: options that mean nothing where these are asked for, and lie idle.

    Raises:
        OptionError: a variable names no option, or one that is for a single task, or has a value that makes no sense.
    """
    found: dict[str, Any] = {}
    for variable, text in os.environ.items():
        name = variable.removeprefix(_START).lower()
        if not variable.startswith(_START) or not text or _OTHERS.fullmatch(name):
            continue
        if name not in _KINDS:
            meant = instead(name, _KINDS, lambda each: _START + each.upper())
            raise OptionError(f"{variable} in the environment is nothing that memolock reads: {meant}")
        found[name] = checked(name, _read(_KINDS[name], text), f"{variable} in the environment")
    return {name: value for name, value in found.items() if name not in without}


def instead(name: str, known: Collection[str], spelt: Callable[[str], str]) -> str:
    """Say what could be done instead of naming a default that is none.

    Args:
        name: of the option, without what begins a setting's name.
        known: the options that would do.
        spelt: makes the setting's name of an option's.
    """
    if name in (f.name for f in fields(Options)):
        return f"{name} is set where the task is defined"
    near = difflib.get_close_matches(name, [*known, "redis_url"])
    return f"did you mean {' or '.join(map(spelt, near))}?" if near else "there is no such option"


def _read(kind: str, text: str) -> Any:
    """Read a value of a type. What cannot be read stays text, which the options refuse by name."""
    if kind == "bool":
        return text.lower() in _TRUE if text.lower() in _TRUE + _FALSE else text
    if kind.startswith("tuple"):
        return tuple(part.strip() for part in text.split(","))
    try:
        return int(text) if kind == "int" else float(text) if kind.startswith("float") else text
    except ValueError:
        return text
