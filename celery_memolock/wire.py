"""Between the core's effects and the server's scripts: names, arguments, replies. Pure, the same for every driver."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import Any

from .protocol import (
    Acquire,
    Claim,
    Confirm,
    Defer,
    Disown,
    Done,
    Invalidate,
    Leave,
    Put,
    Renew,
    Requeue,
    Run,
    Script,
    Settle,
    Skip,
    Waiting,
    Won,
)

__all__ = ["Source", "arguments", "digest", "load", "parse_notice", "reply", "script_of"]

Argument = str | bytes | int


@dataclass(frozen=True, slots=True)
class Source:
    """A script's text and the SHA-1 under which the server caches it."""

    name: str
    text: str
    sha: str


@cache
def load(name: str) -> Source:
    """Read a script, with what all scripts share in front."""
    folder = files("celery_memolock") / "scripts"
    text = "\n".join((folder / f"{part}.lua").read_text("utf-8") for part in ("_common", name))
    return Source(name, text, digest(text))


def digest(text: str) -> str:
    """Return the name under which the server caches a script of this text."""
    return sha1(text.encode(), usedforsecurity=False).hexdigest()


def script_of(effect: Script) -> Source:
    """Return the script that performs an effect: its class's name in lower case."""
    return load(type(effect).__name__.lower())


def arguments(effect: Script, inbox: str) -> tuple[Argument, ...]:
    """Return ARGV of an effect's script; `inbox` is this process's."""
    match effect:
        case Acquire(_, options, nonce, mode, seen, following, register, wanted, park, crashed):
            return (
                nonce,
                mode,
                seen,
                following,
                "" if register is None else inbox,
                register or 0,
                _ms(wanted),
                _ms(options.dispatch_lease),
                options.max_crashes,
                _ms(park),
                crashed.form,
                crashed.body,
            )
        case Confirm(_, fence, lease):
            return fence, _ms(lease)
        case Claim(_, options, fence, nonce, holder, retries, redelivered, park, crashed):
            return (
                fence,
                nonce,
                holder,
                _ms(options.lease),
                retries,
                int(redelivered),
                options.max_overlap,
                int(options.skip_abandoned),
                options.max_crashes,
                _ms(park),
                crashed.form,
                crashed.body,
            )
        case Renew(_, run, lease):
            return run.fence, run.attempt, _ms(lease)
        case Requeue(_, run, retries, lease):
            return run.fence, run.attempt, retries, _ms(lease)
        case Settle(_, run, kind, outcome, ttl, park, fleeting):
            return run.fence, run.attempt, kind, outcome.form, outcome.body, _ms(ttl), _ms(park), int(fleeting)
        case Disown(_, fence, holder, outcome, park):
            form, body = (outcome.form, outcome.body) if outcome else ("", "")
            return fence, holder, form, body, _ms(park)
        case Put(_, nonce, outcome, ttl, park, fleeting):
            return nonce, outcome.form, outcome.body, _ms(ttl), _ms(park), int(fleeting)
        case Invalidate(_, nonce, park):
            return nonce, _ms(park)
        case Leave(_, place):
            return place.fence, inbox, place.sequence
    raise TypeError(f"{type(effect).__name__} has no script")


def reply(effect: Script, raw: Any) -> Any:
    """Turn a script's answer into the reply that its effect's docstring names."""
    match effect:
        case Acquire():
            match raw:
                case [b"DONE", outcome]:
                    return Done(outcome)
                case [b"WAIT", fence, left, state, since]:
                    return Waiting(fence.decode(), left / 1000, state.decode(), since / 1000)
                case [b"WIN", fence, lease]:
                    return Won(fence.decode(), lease / 1000)
        case Claim():
            match raw:
                case [b"RUN", fence, attempt]:
                    return Run(fence.decode(), int(attempt))
                case [b"DEFER", delay]:
                    return Defer(delay / 1000)
                case [b"SKIP", reason]:
                    return Skip(reason.decode())
        case Leave():
            return (raw[0].decode(), raw[1] / 1000) if raw else None
        case Confirm() | Disown() | Invalidate():
            return bool(raw)
        case Renew() | Requeue() | Settle() | Put():
            return raw.decode()
    raise TypeError(f"{type(effect).__name__} got an answer of no known form: {raw!r}")


def parse_notice(data: bytes) -> tuple[str, bytes] | None:
    """Take a notice apart: (fence, outcome or b""); None if it is not one of ours."""
    fence, newline, raw = data.partition(b"\n")
    if not newline or len(fence) > 64 or not fence.isascii():
        return None
    return fence.decode("ascii"), raw


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000)) if seconds else 0
