"""Between the core's effects and the server's scripts: names, arguments, replies. Pure, the same for every driver."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final

from .effects import (
    Acquire,
    Attempts,
    Claim,
    Confirm,
    Defer,
    Disown,
    Done,
    Expire,
    Index,
    Invalidate,
    Leave,
    Members,
    Put,
    Query,
    Renew,
    Report,
    Requeue,
    Run,
    Scan,
    Script,
    ServerTime,
    Settle,
    Skip,
    Waiting,
    Withdraw,
    Won,
)
from .errors import FlightFailed

__all__ = ["Source", "answer", "arguments", "command", "digest", "load", "parse_notice", "reply", "script_of"]

#: How many keys are looked at in one trip.
_BATCH: Final = 500

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


# RQ's own worker forks for each job, from a process that has imported this: none of those has to read them then.
for _effect in Script.__subclasses__():
    load(_effect.__name__.lower())


def arguments(effect: Script, inbox: str) -> tuple[Argument, ...]:
    """Return ARGV of an effect's script; `inbox` is this process's."""
    match effect:
        case Acquire(_, options, nonce, mode, seen, following, register, wanted, park, crashed, since, holder):
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
                since or "",
                holder,
                _ms(options.lease),
                options.max_overlap,
                _ms(options.error_ttl_of(FlightFailed())),
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
                _ms(options.error_ttl_of(FlightFailed())),
            )
        case Renew(_, run, lease, external):
            return run.fence, run.attempt, _ms(lease), int(external)
        case Report(_, run, number, progress):
            return run.fence, run.attempt, b"%d %d %s" % (run.attempt, number, progress)
        case Requeue(_, run, retries, lease):
            return run.fence, run.attempt, retries, _ms(lease)
        case Settle(_, run, kind, outcome, ttl, keep, park, fleeting):
            times = _ms(ttl), _ms(keep), _ms(park)
            return run.fence, run.attempt, kind, outcome.form, outcome.body, *times, int(fleeting)
        case Disown(_, fence, holder, outcome, park, ttl):
            form, body = (outcome.form, outcome.body) if outcome else ("", "")
            return fence, holder, form, body, _ms(park), _ms(ttl)
        case Put(_, nonce, outcome, ttl, keep, park, fleeting):
            return nonce, outcome.form, outcome.body, _ms(ttl), _ms(keep), _ms(park), int(fleeting)
        case Expire(_, keep):
            return (_ms(keep),)
        case Index(_, entry, life):
            return entry, _ms(life)
        case Invalidate(_, nonce, park):
            return nonce, _ms(park)
        case Withdraw(_, nonce, park):
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
                case [b"WAIT", fence, left, state, since, now, progress]:
                    return Waiting(fence.decode(), left / 1000, state.decode(), since / 1000, int(now), progress)
                case [b"WIN", fence, lease, now]:
                    return Won(fence.decode(), lease / 1000, int(now))
                case [b"RUN", fence, lease, now]:
                    return Won(fence.decode(), lease / 1000, int(now), Run(fence.decode(), 1))
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
        case Confirm() | Disown() | Expire() | Invalidate() | Report():
            return bool(raw)
        case Index() | Withdraw():
            return None
        case Renew() | Requeue() | Settle() | Put():
            return raw.decode()
    raise TypeError(f"{type(effect).__name__} got an answer of no known form: {raw!r}")


def command(query: Query) -> tuple[Argument, ...]:
    """Return the command that a query is."""
    match query:
        case ServerTime():
            return ("TIME",)
        case Members(keys, cursor):
            return "ZSCAN", keys.all[0], cursor, "COUNT", _BATCH
        case Scan(pattern, cursor):
            return "SCAN", cursor, "MATCH", pattern, "COUNT", _BATCH
        case Attempts(keys):
            return "HMGET", keys.all[1], "fence", "attempt"
    raise TypeError(f"{type(query).__name__} has no command")


def answer(query: Query, raw: Any) -> Any:
    """Turn a command's reply into the answer that its query's docstring names."""
    match query:
        case ServerTime():
            return int(raw[0]) * 1_000_000 + int(raw[1])
        case Members():
            return int(raw[0]), [name.decode() for name in raw[1][::2]]
        case Scan():
            return int(raw[0]), [name.decode() for name in raw[1]]
        case Attempts(_, fence):
            found, attempt = raw
            return int(attempt) if found is not None and fence in ("", found.decode()) else 0
    raise TypeError(f"{type(query).__name__} has no command")


def parse_notice(data: bytes) -> tuple[str, bytes] | None:
    """Take a notice apart: (fence, outcome or b""); None if it is not one of ours."""
    fence, newline, raw = data.partition(b"\n")
    if not newline or len(fence) > 64 or not fence.isascii():
        return None
    return fence.decode("ascii"), raw


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000)) if seconds else 0
