"""The thread driver: performs the core's effects in the calling thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from . import protocol
from .engine import Engine
from .errors import MemoLockError
from .protocol import Script
from .rooms import Broken, Seat, Settled, Turn

__all__ = ["Driver"]


class Driver:
    """Performs effects in the calling thread.

    Args:
        engine: what sends flights, and has the server.
        args, kwargs: of the call.
        body: what the effect `Body` runs; only a worker has one.
        unreadable: is told of an entry that cannot be read.
    """

    def __init__(
        self,
        engine: Engine,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        body: Callable[[protocol.Run], Any] | None = None,
        unreadable: Callable[[MemoLockError], None] | None = None,
    ) -> None:
        self._engine = engine
        self._args = args
        self._kwargs = kwargs or {}
        self._body = body
        self._unreadable = unreadable

    def __call__(self, effect: Any) -> Any:
        """Perform one effect and return its reply."""
        match effect:
            case protocol.Get(keys, patience):
                return self._engine.store.get(keys, patience)
            case Script():
                return self._engine.store.run(effect)
            case protocol.Wait(seat, timeout):
                return _wait(seat, timeout)
            case protocol.TakeSeat():
                return _ThreadSeat()
            case protocol.Listen(timeout):
                return self._engine.store.listen(timeout)
            case protocol.Dispatch(ticket, inline, timeout):
                if inline:
                    self._engine.run_here(ticket, self._args, self._kwargs)
                else:
                    self._engine.send(ticket, self._args, self._kwargs, timeout)
                return None
            case protocol.Uncached():
                return self._engine.run_here(None, self._args, self._kwargs)
            case protocol.Body(run):
                assert self._body is not None
                return self._body(run)
            case protocol.Hold():
                return self._engine.store.hold(effect)
            case protocol.Release(run):
                return self._engine.store.release(run)
            case protocol.Pause(seconds):
                return time.sleep(seconds)
            case protocol.Unreadable(error):
                if self._unreadable is not None:
                    self._unreadable(error)
                return None
        raise TypeError(f"no effect: {effect!r}")


class _ThreadSeat(Seat):
    __slots__ = ("event",)

    def __init__(self) -> None:
        self.event = threading.Event()
        super().__init__(self.event.set)


def _wait(seat: Seat, timeout: float) -> Turn | Settled | Broken | None:
    assert isinstance(seat, _ThreadSeat)
    deadline = time.monotonic() + timeout
    while seat.turn is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        seat.event.wait(left)
        seat.event.clear()
    return seat.turn
