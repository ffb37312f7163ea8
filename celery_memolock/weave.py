"""Several cores as one: what they ask for at the same time is asked for in one trip. Pure, as the cores are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .effects import (
    Core,
    Dispatch,
    Get,
    GetAll,
    Listen,
    Onward,
    RunAll,
    Script,
    ServerTime,
    TakeSeat,
    TakeSeats,
    Wait,
    WaitForAny,
)
from .errors import DispatchError, StoreUnavailable

__all__ = ["weave"]


class _Thread:
    """One core, the effect that it waits for, and in the end its result or its error."""

    __slots__ = ("core", "deadline", "effect", "error", "over", "result")

    def __init__(self, core: Core[Any]) -> None:
        self.core = core
        self.effect: Any = None
        self.deadline = 0.0
        self.over = False
        self.result: Any = None
        self.error: BaseException | None = None

    def send(self, reply: Any) -> None:
        self._step(lambda: self.core.send(reply))

    def throw(self, error: BaseException) -> None:
        self._step(lambda: self.core.throw(error))

    def _step(self, step: Callable[[], Any]) -> None:
        try:
            self.effect = step()
        except StopIteration as stop:
            if isinstance(stop.value, Onward):
                self.core = stop.value.core
                self.send(None)
            else:
                self.over, self.result = True, stop.value
        except BaseException as error:
            self.over, self.error = True, error


def weave(cores: Sequence[Core[Any]], clock: Callable[[], float], in_turn: bool = False) -> Core[list[Any]]:
    """Drive cores side by side → for each its result, or the exception that it raised.

    Where the caller computes what is missing in this very thread (`in_turn`), each core that has to join a flight does
    so only when the one before it has ended: what it won earlier would not be run, nor its looks be taken.

    A batch is one trip where the cores ask for alike things: the first look at all entries, and the looks for all that
    are missing. An interruption of a batch (KeyboardInterrupt, a cancellation) is raised inside each core, which then
    gives up its place, and once more at the end.
    """
    threads = [_Thread(core) for core in cores]
    for thread in threads:
        thread.send(None)
    interrupted: BaseException | None = None
    undelivered: DispatchError | None = None
    while active := [thread for thread in threads if not thread.over]:
        batch = _next_batch(active, in_turn)
        try:
            if undelivered is not None and isinstance(batch[0].effect, Dispatch):
                raise undelivered  # each more would wait for the same broker, one after the other
            yield from _perform(batch, clock)
        except GeneratorExit:
            for thread in active:
                thread.core.close()
            raise
        except Exception as error:
            if isinstance(error, DispatchError):
                undelivered = error
            for thread in batch:
                thread.throw(_another(error))
        except BaseException as error:
            interrupted = error
            for thread in active:
                thread.throw(error)
    if interrupted is not None:
        raise interrupted
    return [thread.result if thread.error is None else thread.error for thread in threads]


def _next_batch(active: list[_Thread], in_turn: bool) -> list[_Thread]:
    """Return those whose effects can be performed together; to wait is what is left when nobody has anything to do."""
    if in_turn:
        reading = [thread for thread in active if not isinstance(thread.effect, TakeSeat)]
        active = reading or active[:1]  # to take a seat is to join
    for kind in (Get, ServerTime, Listen, TakeSeat, Script):
        batch = [thread for thread in active if isinstance(thread.effect, kind)]
        if batch:
            return batch
    others = [thread for thread in active if not isinstance(thread.effect, Wait)]
    return others[:1] or active


def _perform(batch: list[_Thread], clock: Callable[[], float]) -> Core[None]:
    effects = [thread.effect for thread in batch]
    replies: list[Any]
    match effects[0]:
        case Get():
            patience = min(effect.patience for effect in effects)
            replies = yield GetAll(tuple(effect.keys for effect in effects), patience)
        case Listen():
            yield Listen(max(effect.timeout for effect in effects))
            replies = [None] * len(batch)
        case TakeSeat():
            replies = yield TakeSeats(len(batch))
        case ServerTime():
            replies = [(yield effects[0])] * len(batch)
        case Script():
            replies = yield RunAll(tuple(effects))
        case Wait():
            yield from _wait(batch, clock)
            return
        case effect:
            replies = [(yield effect)]
    for thread, reply in zip(batch, replies, strict=True):
        if isinstance(reply, StoreUnavailable):
            thread.throw(reply)
        else:
            thread.send(reply)


def _wait(batch: list[_Thread], clock: Callable[[], float]) -> Core[None]:
    now = clock()
    for thread in batch:
        if not thread.deadline:
            thread.deadline = now + thread.effect.timeout
    soonest = min(thread.deadline for thread in batch)
    yield WaitForAny(tuple(thread.effect.seat for thread in batch), max(0.0, soonest - now))
    now = clock()
    for thread in batch:
        turn = thread.effect.seat.turn
        if turn is not None or thread.deadline <= now:
            thread.deadline = 0.0
            thread.send(turn)


def _another(error: Exception) -> Exception:
    """Return an exception like this one: several cores must not share its traceback."""
    try:
        return type(error)(*error.args)
    except Exception:  # its constructor wants something else
        return error
