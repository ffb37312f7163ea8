"""The thread driver: performs the core's effects in the calling thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any

from . import effects
from .bounded import LAST, TooSlow, aside, log_failure, not_before, within
from .effects import Core, Script, drive
from .engine import Engine
from .errors import MemoLockError
from .rooms import Seat, Woken

__all__ = ["Driver"]


class Driver:
    """Performs effects in the calling thread.

    Args:
        engine: what sends flights, and has the server.
        body: what the effect `Body` runs; only a worker has one.
        unreadable: is told of an entry that cannot be read.
    """

    def __init__(
        self,
        engine: Engine,
        body: Callable[[effects.Run], Any] | None = None,
        unreadable: Callable[[MemoLockError], None] | None = None,
    ) -> None:
        self._engine = engine
        self._body = body
        self._unreadable = unreadable
        self._any: Any = None

    def __call__(self, effect: Any) -> Any:
        """Perform one effect and return its reply."""
        match effect:
            case effects.Get(keys, patience):
                return self._engine.store.get(keys, patience)
            case Script():
                return self._engine.store.run(effect)
            case effects.Wait(seat, timeout):
                return _wait(seat, timeout)
            case effects.TakeSeat():
                return _ThreadSeat(_new_bell())
            case effects.Listen(timeout):
                return self._engine.store.listen(timeout)
            case effects.Dispatch(ticket, (args, kwargs), inline, timeout):
                if inline:
                    return self._engine.run_here(ticket, args, kwargs)
                return self._engine.send(ticket, args, kwargs, timeout)
            case effects.Attendance((args, kwargs), since, timeout):
                return _answer(not_before(since, lambda: self._engine.attendance(args, kwargs)), timeout)
            case effects.Query():
                return self._engine.store.ask(effect)
            case effects.Aside(core):
                return drive_aside(self._engine, core)
            case effects.Uncached((args, kwargs)):
                return self._engine.run_here(None, args, kwargs)
            case effects.GetAll(keys, patience):
                return self._engine.store.get_all(keys, patience)
            case effects.RunAll(scripts):
                return self._engine.store.run_all(scripts)
            case effects.TakeSeats(count):
                self._any = self._any or _new_bell()
                return [_ThreadSeat(self._any) for _ in range(count)]
            case effects.WaitForAny(seats, timeout):
                assert self._any is not None
                return _wait_for_any(self._any, seats, timeout)
            case effects.Body(run):
                assert self._body is not None
                return self._body(run)
            case effects.Hold():
                return self._engine.store.hold(effect)
            case effects.Release(run):
                return self._engine.store.release(run)
            case effects.Pause(seconds):
                return time.sleep(seconds)
            case effects.Unreadable(error):
                if self._unreadable is not None:
                    self._unreadable(error)
                return None
        raise TypeError(f"no effect: {effect!r}")


def drive_aside(engine: Engine, core: Core[Any]) -> None:
    """Drive a core in another thread; what it raises is logged."""

    def work() -> None:
        try:
            drive(core, Driver(engine))
        except Exception as error:
            log_failure(error)

    if engine.eager:  # nothing runs beside the caller there
        work()
    elif engine.ends_with_job:
        with contextlib.suppress(TooSlow):  # in a thread all the same, as it is not for the job's time-out to end it
            within(LAST, work)
    else:
        aside.do(work)


def _answer(asked: Future[str] | None, timeout: float) -> str:
    return asked.result() if asked is not None and futures.wait([asked], timeout).done else ""


def _new_bell() -> Any:
    """Return a lock that is held until somebody rings: an Event takes several times as long."""
    bell = threading.Lock()
    bell.acquire()
    return bell


class _ThreadSeat(Seat):
    __slots__ = ("bell",)

    def __init__(self, bell: Any) -> None:
        super().__init__()
        self.bell = bell

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has rung already
            self.bell.release()


def _wait(seat: Seat, timeout: float) -> Woken | None:
    assert isinstance(seat, _ThreadSeat)
    _wait_for_any(seat.bell, (seat,), timeout)
    return seat.turn


def _wait_for_any(bell: Any, seats: tuple[Seat, ...], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while all(seat.turn is None for seat in seats):
        left = deadline - time.monotonic()
        if left <= 0:
            return
        bell.acquire(timeout=min(left, threading.TIMEOUT_MAX))
