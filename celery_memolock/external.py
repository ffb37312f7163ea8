"""Settling a flight from outside of its task: by a token, over plain Redis commands, from any process.

A token is a JSON object of format 1 with all that the command needs:

    {"format": 1, "keys": [entry, flight, error, runs], "fence": ..., "attempt": ...,
     "ttl": ms, "keep": ms, "most_ttl": ms or null, "max_size": bytes, "error_ttl": ms, "park": ms, "script": ...}

    EVAL <script> 4 <keys...> <fence> <attempt> <kind> <form> <body> <ttl> <keep> <park> 1

`kind` is "V" and `body` the value in JSON, at most `max_size` bytes of it, with `form` "application/json utf-8 - =" and
behind that its etag, if it has one, percent-encoded. To give it another ttl, change `keep` by as much; with a ttl of 0
both are 0, and it is not stored. Where `most_ttl` is a number no ttl may be longer: an invalidation by tag would find
the value no more. Or `kind` is "E", with `error_ttl` twice and the JSON object
{"type": "name", "message": "text", "traceback": "text", "args": null}. The answer: "OK" (it is stored), "AGAIN" (a
refresh was asked for meanwhile: it goes to those who wait, and is stored as a stale value, if the task keeps such, so
that the next call starts anew), "DETACHED" (only those who wait get it, as an invalidation came meanwhile) or "REFUSED"
(too late).

The script is there for other languages; what is settled by this module runs its own. Whoever holds a token can settle
its flight: take and give it as you would a session's key.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import redis

from .effects import Call, Run
from .errors import DecodeError, OptionError, StoreUnavailable, TaskFailed, ValueTooLarge
from .options import seconds_of
from .wire import load

__all__ = ["fail", "settle", "token_of"]

_FORM = "application/json utf-8 - ="
_KIND = "ExternalError"
_FIELDS = frozenset(("fence", "attempt", "ttl", "keep", "most_ttl", "max_size", "error_ttl", "park"))


def token_of(call: Call, run: Run) -> str:
    """Return the token of a run, as JSON.

    Raises:
        OptionError: values are of a type of their own, and another process settles with plain data.
    """
    options = call.options
    assert not callable(options.ttl)
    if call.codec.typed:
        raise OptionError(f"values of {call.task!r} are of a type of their own, which external=True does not go with")
    ttl = options.ttl
    return json.dumps(
        {
            "format": 1,
            "keys": call.keys.all,
            "fence": run.fence,
            "attempt": run.attempt,
            "ttl": round(ttl * 1000),
            "keep": round((ttl + options.keep_stale) * 1000),
            "most_ttl": round(ttl * 1000) if options.tags else None,  # so long do the indices name it
            "max_size": options.max_value_size,
            "error_ttl": round(options.error_ttl_of(TaskFailed(_KIND, "")) * 1000),
            "park": round(call.park * 1000),
            "script": load("settle").text,
        }
    )


def settle(client: redis.Redis, token: str, value: Any, *, ttl: float | None = None, etag: str = "") -> str:
    """Settle a flight with a value that JSON can hold.

    Args:
        client: of the server that keeps the values.
        token: what the task handed out as `current_flight.token`.
        value: the value; those who wait get it.
        ttl: for how many seconds it is fresh, 0 not to store it. Default: the task's.
        etag: your own name for this version of the value; the next run finds it as `current_flight.stale_etag`.

    Returns:
        "OK", "AGAIN", "DETACHED" or "REFUSED"; see above.

    Raises:
        DecodeError: the token is none.
        OptionError: the ttl is no time, or is longer than the task's, which has tags.
        ValueTooLarge: the value exceeds the task's `max_value_size`; the flight goes on.
        StoreUnavailable: the server cannot be reached, or refused.
    """
    read = _read(token)
    fresh = read["ttl"] if ttl is None else round(seconds_of("ttl", ttl, zero=True) * 1000)
    if read["most_ttl"] is not None and fresh > read["most_ttl"]:
        raise OptionError(
            f"ttl={ttl!r} is longer than that of the task, {read['most_ttl'] / 1000:g} s, for which the indices of its "
            f"tags were written: set the longer one on the task"
        )
    keep = fresh + read["keep"] - read["ttl"] if fresh else 0
    body = json.dumps(value)
    if len(body) > read["max_size"]:
        raise ValueTooLarge(
            f"the value takes {len(body)} bytes, more than the task's max_value_size={read['max_size']}"
        )
    return _run(client, read, "V", body, fresh, keep, quote(etag, safe=""))


def fail(client: redis.Redis, token: str, message: str, *, kind: str = _KIND) -> str:
    """Settle a flight with an error: all who wait get a `TaskFailed` with this message.

    Args:
        client, token: as for `settle`.
        message: what went wrong.
        kind: its `type_name`.

    Returns:
        As `settle` does.
    """
    read = _read(token)
    record = {"type": kind, "message": message, "traceback": "", "args": None}
    return _run(client, read, "E", json.dumps(record), read["error_ttl"], read["error_ttl"])


def _read(token: str) -> dict[str, Any]:
    try:
        read = json.loads(token)
        if read["format"] != 1 or len(read["keys"]) != 4 or not read.keys() >= _FIELDS:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DecodeError("this is no token of a flight, or one of another version") from None
    return read  # type: ignore[no-any-return]


def _run(client: redis.Redis, read: dict[str, Any], kind: str, body: str, ttl: int, keep: int, etag: str = "") -> str:
    given = (read["fence"], read["attempt"], kind, _FORM + etag, body, ttl, keep, read["park"], 1)
    try:
        answer: Any = client.eval(load("settle").text, 4, *read["keys"], *given)
    except (redis.RedisError, OSError) as error:
        raise StoreUnavailable(f"the flight could not be settled: {error}") from error
    return answer.decode() if isinstance(answer, bytes) else str(answer)
