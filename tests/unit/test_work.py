"""What a flight is run with, where caller and worker are of different versions."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any, cast

import pytest

from celery_memolock import OptionError
from celery_memolock.codec import Codec
from celery_memolock.effects import Computing, Finished, Run, Ticket
from celery_memolock.engine import Engine
from celery_memolock.keys import KeyMaker, Keys
from celery_memolock.memo import Memo
from celery_memolock.options import Options
from celery_memolock.work import Work, _complaints, holder_of, read_ticket, write_ticket


class Nothing:
    """An engine that is never asked to do anything."""

    travels = True
    eager = False
    in_worker = True
    holder = ""


def memo_of(**of_task: Any) -> Memo[..., Any]:
    options = Options(ttl=5, lease=3, **of_task)
    maker = KeyMaker("t", len, options)
    return Memo("t", cast(Engine, Nothing()), options, maker, Codec("t", options))


def work(overrides: dict[str, Any], **of_task: Any) -> Any:
    memo = memo_of(**of_task)
    sent = write_ticket(Ticket(Keys.of("p", "t:1:k"), "17-abc", (Computing("e"),), overrides), "redis://there")
    ticket = read_ticket(sent)
    assert ticket is not None
    assert (ticket.fence, [each.entry for each in ticket.chain]) == ("17-abc", ["e"])
    return Work(cast(Engine, Nothing()), memo, ticket, (), {}, holder_of("w", 1, 2))


def test_options_of_the_winner() -> None:
    """A flight runs with the options of the call that won it; what only callers need does not travel."""
    made = work({"lease": 7, "soft_timeout": 1, "force_refresh": True})
    assert made._call.options == Options(ttl=5, lease=7)


def test_options_that_go_together_without_the_callers_own() -> None:
    """What the task gives its callers does not keep a worker from doing what the winner wants."""
    made = work({"ttl": 600, "stale_ttl": 0, "soft_timeout": None}, stale_ttl=60, soft_timeout=1)
    assert made._call.options == Options(ttl=600, lease=3)


def test_the_next_run_is_wanted_as_this_one() -> None:
    """A refresh that is asked for during a run is done with the options of that run."""
    made = work({"ttl": 600, "soft_timeout": 1})
    assert made._again.options == Options(ttl=600, lease=3, nested="dispatch")


def test_options_are_checked_once() -> None:
    """Not for each run and each call, but no function is kept, as it may hold on to anything."""
    memo = memo_of()
    assert memo.override({"ttl": 7}) is memo.override({"ttl": 7})
    assert memo.override({"ttl": 7}) is not memo.override({"ttl": 7.0})
    assert memo.override({"on_progress": print}) is not memo.override({"on_progress": print})
    with pytest.raises(OptionError, match="ttl"):
        memo.override({"ttl": []})  # what cannot be hashed is refused as before


@pytest.mark.parametrize("overrides", [{"of_tomorrow": 1}, {"lease": -1}, {"external_timeout": 5}, {"ttl": 10**400}])
def test_options_that_this_version_does_not_take(overrides: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """They must not keep a worker from running the flight, which nobody else would learn before `queue_timeout`."""
    with caplog.at_level(logging.WARNING, "celery_memolock"):
        assert work(overrides)._call.options == Options(ttl=5, lease=3)
    assert ("with its task's own options" in caplog.text) == ("of_tomorrow" not in overrides)


class Once:
    """A server on which a run is claimed, and after whose end another one is asked for."""

    address = "redis://there"

    def run(self, effect: Any) -> Any:
        return {"Claim": Run("17-abc", 1), "Settle": "AGAIN"}[type(effect).__name__]

    async def arun(self, effect: Any) -> Any:
        return self.run(effect)

    def hold(self, *_: Any) -> None:
        pass

    get = lost = release = hold


def test_a_refresh_that_cannot_be_asked_for_anew(caplog: pytest.LogCaptureFixture) -> None:
    """What a function among the options raises then is logged: the run that was settled before is what it was."""

    class Unsaid(Exception):
        def __str__(self) -> str:
            raise ValueError

    def key(argument: Any) -> str:
        raise Unsaid

    for asking in ("threads", "asyncio"):
        caplog.clear()
        made = work({}, key=key)
        made._engine.store, made._call = Once(), replace(made._call, arguments=((1,), {}))
        if asking == "threads":
            done = made.do(lambda flight: flight.outcome(1))
        else:

            async def ask(made: Any = made) -> Any:
                async def body(flight: Any) -> Any:
                    return flight.outcome(1)

                done = await made.ado(body)
                await asyncio.sleep(0.01)  # it is asked for beside this
                return done

            done = asyncio.run(ask())
        assert done == Finished("AGAIN")
        assert "could not start the refresh that was asked for: <unprintable Unsaid>" in caplog.text


def test_tickets_that_cannot_be_read_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """They come with each message of a caller that is of another version."""
    _complaints.clear()
    with caplog.at_level(logging.WARNING, "celery_memolock"):
        for data in (None, {"entry": "x" * 10_000}, {"entry": "p:1:e:{t:1:k}", "fence": "17-" + "a" * 1000}):
            assert read_ticket(data) is None
    (record,) = caplog.records
    assert len(record.getMessage()) < 500
