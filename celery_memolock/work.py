"""One flight where it is run: claimed, run under a renewed lease, and settled. The same for all engines."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any, Final

from .aio import AsyncDriver, adrive, beside
from .codec import fence_of, since
from .effects import (
    Call,
    Computing,
    Core,
    Defer,
    Disown,
    Finished,
    GoesOn,
    Interrupted,
    Raised,
    Report,
    Requeue,
    Returned,
    Run,
    Skip,
    Ticket,
    drive,
)
from .engine import Engine
from .errors import ArgumentError, MemoLockError, OptionError, StoreUnavailable, text_of
from .flight import Flight, flying
from .keys import FORMAT, Keys, apart, signature_of
from .memo import Memo, computing
from .options import CALLER_OPTIONS, Options, Progress, call_options
from .protocol import compute
from .sync import Driver

__all__ = ["Done", "Outcome", "Work", "as_wanted", "holder_of", "read_ticket", "unsendable", "write_ticket"]

logger = logging.getLogger("celery_memolock")

Outcome = Returned | Raised | Interrupted | GoesOn

#: What became of a message.
Done = Finished | Defer | Skip

#: The options that are for callers alone, as if none was given.
_NO_CALLER: Final = {each.name: each.default for each in fields(Options) if each.name in CALLER_OPTIONS}


class Work:
    """One message of one flight, or a flight without a message, in the process that runs it.

    Args:
        engine: has the server.
        memo: whose value is computed.
        ticket: of the flight.
        args, kwargs: of the call.
        holder: names this process, see `holder_of`.
        retries: how often the message was sent again after a failure.
        redelivered: whether the queue delivers it once more, as nobody said that it was done.

    Attributes:
        outcome: what the run came to, if it ran.
        ending: whether its loop was about to end while it ran.
    """

    def __init__(
        self,
        engine: Engine,
        memo: Memo[Any, Any],
        ticket: Ticket,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        holder: str,
        retries: int = 0,
        redelivered: bool = False,
    ) -> None:
        self._engine = engine
        self._memo = as_wanted(memo, ticket, engine.travels)
        self._ticket = ticket
        self._call = Call(memo.task, ticket.keys, self._memo.options, memo.codec, arguments=(args, kwargs))
        self._core: Core[Done] = compute(self._call, ticket, holder, retries, redelivered, time.monotonic)
        self._run: Run | None = None
        self._reports = count(1)
        self.outcome: Outcome | None = None
        self.ending = False

    def do(self, body: Callable[[Flight], Outcome]) -> Done:
        """Claim, run and settle, in this thread → what `compute` did.

        Args:
            body: runs the task's own code.

        Raises:
            StoreUnavailable: it could not be claimed.
            BaseException: what interrupted the run.
        """

        def run(run: Run) -> Outcome:
            with self._entered(run) as flight:
                self.outcome = body(flight)
            return self.outcome

        done = self._noted(drive(self._core, Driver(self._engine, body=run)))
        if isinstance(done, Finished) and done.answer == "AGAIN":
            try:
                self._again.run(self._again.refresh(*self._call.arguments))
            except Exception as error:  # that of a function among the options, too: the run itself is settled
                _log_again(error)
        return done

    async def ado(self, body: Callable[[Flight], Awaitable[Outcome]]) -> Done:
        """Do what `do` does, in the running loop."""

        async def run(run: Run) -> Outcome:
            with self._entered(run) as flight:
                self.outcome = await body(flight)
            driver.ending = self.ending
            return self.outcome

        driver = AsyncDriver(self._engine, body=run)
        done = self._noted(await adrive(self._core, driver))
        if isinstance(done, Finished) and done.answer == "AGAIN":
            beside(self._refresh_again())
        return done

    def own_answer(self, done: Done) -> Returned | Raised | None:
        """Return what `effects.Dispatch` replies for this run, if it was an inline one."""
        if not isinstance(done, Finished):
            return None
        if isinstance(self.outcome, Raised) and done.answer != "REFUSED":
            return self.outcome
        if isinstance(self.outcome, Returned) and done.answer is None:
            return self.outcome
        return None

    def requeue(self, retries: int, delay: float) -> bool:
        """Put the flight back into the queue, before its message is sent again → whether that is worth it.

        It is not where an invalidation or a take-over made the flight worthless.
        """
        assert self._run is not None
        lease = delay + self._call.options.queue_timeout
        try:
            answer = self._engine.store.run(Requeue(self._ticket.keys, self._run, retries, lease))
        except StoreUnavailable as error:
            # The message's higher count of retries shows the server that the earlier attempt is over.
            logger.warning("memolock could not requeue key %s: %s", self._ticket.keys.tag, error)
            return True
        return bool(answer == "OK")

    def hand_over(self) -> None:
        """Let somebody else begin at once, whether this process has begun or not: it will not come to the end.

        Raises:
            StoreUnavailable: the server cannot be reached.
        """
        run = self._run
        if run is None:
            self._engine.store.run(Disown(self._ticket.keys, self._ticket.fence, "", None, 0.0))
        else:
            self._engine.store.run(Requeue(self._ticket.keys, run, 0, 0.0))

    async def _refresh_again(self) -> None:
        try:
            await self._again.arun(self._again.refresh(*self._call.arguments))
        except Exception as error:
            _log_again(error)

    @property
    def _again(self) -> Memo[Any, Any]:
        return self._memo.override({"nested": "dispatch"})  # what is asked for after a run is another run

    @contextmanager
    def _entered(self, run: Run) -> Iterator[Flight]:
        """Let the code that runs within know what it runs for."""
        global _strangers
        _strangers = 0
        self._run = run
        store = self._engine.store
        read, lost = partial(store.get, self._ticket.keys), partial(store.lost, run)
        flight = Flight(self._call, run, read, lost, partial(self._report, run))
        this = Computing(self._ticket.keys.entry, self._memo.place())
        inside = computing.set((*self._ticket.chain, this))
        here = flying.set(flight)
        try:
            yield flight
        finally:
            this.over = True
            flying.reset(here)
            computing.reset(inside)

    def _report(self, run: Run, progress: Progress) -> None:
        report = Report(self._ticket.keys, run, next(self._reports), progress.encode())
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            try:
                self._engine.store.run(report)
            except StoreUnavailable as error:
                _log_report(error)
        else:
            beside(
                self._engine.store.arun(report),
                lambda sent: None if sent.cancelled() else _log_report(sent.exception()),
            )

    def _noted(self, done: Done) -> Done:
        tag = self._ticket.keys.tag
        match done:
            case Skip(reason):
                logger.info("memolock skips a message of key %s: %s", tag, reason)
                if self._ticket.server:
                    self._suspect_another_server()
            case Defer(delay):
                logger.info("memolock defers a message of key %s for %.1f s", tag, delay)
            case Finished(None, MemoLockError() as refused):
                logger.warning("memolock lost the value of key %s: %s", tag, refused)
        return done

    def _suspect_another_server(self) -> None:
        """Say so where a flight left no trace here, as it would have if its caller meant the same server."""
        global _strangers
        keys, fence, there, store = self._ticket.keys, self._ticket.fence, self._ticket.server, self._engine.store
        try:
            *stored, parked = store.get_all([*map(Keys, (keys.entry, keys.error, keys.parked(fence)))], _PATIENCE)
        except StoreUnavailable:
            return
        # What is older than the flight says nothing of it.
        if parked is not None or any(raw is not None and since(fence_of(raw)) >= since(fence) for raw in stored):
            return
        _strangers += 1
        if there != store.address or _strangers >= _MANY_STRANGERS:
            _complain(
                logging.ERROR,
                "memolock finds no flight of key %s on its server, %s; its caller waits for it on %s. If these are two "
                "servers, callers wait in vain: give web processes and workers the same memolock_redis_url",
                keys.tag,
                store.address,
                there,
            )


#: Flights that left no trace since this process last claimed one. A single one may have been invalidated or withdrawn;
#: where so many follow each other, one address means two servers.
_strangers = 0
_MANY_STRANGERS: Final = 3

#: Seconds that the search for traces may take.
_PATIENCE: Final = 1.0


def _log_again(error: Exception) -> None:
    logger.warning("memolock could not start the refresh that was asked for: %s", text_of(error))


def _log_report(error: BaseException | None) -> None:
    if error is not None:
        logger.debug("memolock could not report progress: %s", error)


def as_wanted(memo: Memo[Any, Any], ticket: Ticket, travels: bool = True) -> Memo[Any, Any]:
    """Return the task with the options that the winner wants, as far as this process understands that.

    Who sent the flight may be of another version, with other options or other ideas of what goes together. What is for
    callers alone is left out, the task's own as well: it might not go together with what the winner wants.
    """
    known = call_options(travels=travels) - CALLER_OPTIONS
    overrides = {name: value for name, value in ticket.overrides.items() if name in known}
    try:
        return memo.override({**_NO_CALLER, **overrides})
    except (OptionError, OverflowError) as error:
        logger.warning("memolock runs key %s with its task's own options: %s", ticket.keys.tag, error)
        return memo


# ---- a flight's ticket, as it travels, and the name of who runs it ----------------------------------------------


def write_ticket(ticket: Ticket, server: str) -> dict[str, Any]:
    """Return a ticket as plain data, to travel with a message; `server` is the address of the one that has it."""
    return {
        "server": server,
        "entry": ticket.keys.entry,
        "fence": ticket.fence,
        "chain": [each.entry for each in ticket.chain if not each.over],
        "options": {
            name: value.total_seconds() if isinstance(value, timedelta) else value
            for name, value in ticket.overrides.items()
            if name not in CALLER_OPTIONS
        },
    }


def read_ticket(data: object) -> Ticket | None:
    """Read what travelled; None if this version cannot, which is logged once."""
    given = data if isinstance(data, Mapping) else {}
    entry, fence, chain, overrides, server = map(given.get, ("entry", "fence", "chain", "options", "server"))
    if isinstance(entry, str) and _ENTRY(entry) and isinstance(fence, str) and _FENCE(fence):
        known = [each for each in chain if isinstance(each, str)] if isinstance(chain, list | tuple) else []
        return Ticket(
            Keys(entry),
            fence,
            tuple(map(Computing, known)),
            overrides if isinstance(overrides, Mapping) else {},
            server=server if isinstance(server, str) else "",
        )
    _complain(logging.WARNING, "memolock drops messages with tickets that it cannot read, such as %.200r", data)
    return None


_ENTRY: Final = re.compile(rf"[^{{}}]+:{FORMAT}:e:\{{[^{{}}]+\}}").fullmatch
_FENCE: Final = re.compile(r"\d{1,20}-\w{1,64}").fullmatch


def _complain(level: int, text: str, *args: object) -> None:
    """Log something once in the life of a process: it would come again with each message."""
    if text not in _complaints:
        _complaints.add(text)
        logger.log(level, text + " (said once)", *args)


_complaints: set[str] = set()


def unsendable(
    whose: str,
    call: tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]],
    serializer: str,
    dumps: Callable[[Any], object],
) -> ArgumentError | None:
    """Return an error that names the argument which cannot be serialised, and why; None if each can be by itself.

    Args:
        whose: what takes the arguments, for the error.
        call: the function, and its arguments by position and by name.
        serializer: its name, for the error.
        dumps: serialises a value.
    """
    function, args, kwargs = call
    signature = signature_of(function)
    for name, value in apart(signature, signature.bind(*args, **kwargs).arguments):
        try:
            dumps(value)
        except Exception as why:
            kind = type(value).__qualname__
            return ArgumentError(
                f"argument {name!r} of {whose}, a {kind}, cannot be sent with {serializer}: {text_of(why)}"
            )
    return None


def holder_of(worker: str, main: int, child: int) -> str:
    """Name the process that runs a flight: worker, its main process, the process of its pool."""
    return f"{worker}/{main}/{child}"
