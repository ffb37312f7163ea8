"""The asyncio driver: performs the core's effects in a running event loop, and never blocks it."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from . import protocol
from .engine import Engine
from .errors import MemoLockError
from .pipe import retrieve
from .protocol import Core, Script
from .rooms import Broken, Seat, Settled, Turn

__all__ = ["AsyncDriver", "adrive"]

T = TypeVar("T")


async def adrive(core: Core[T], perform: Callable[[Any], Awaitable[Any]]) -> T:
    """Perform a core's effects, one after the other, in the running loop; see `protocol.drive`.

    A cancellation is raised inside the core, as any error of an effect is, and the core then gives up its place.
    """
    try:
        effect = next(core)
        while True:
            try:
                reply = await perform(effect)
            except GeneratorExit:  # the loop is gone, and nothing can be awaited any more
                core.close()
                raise
            except BaseException as error:
                effect = core.throw(error)
            else:
                effect = core.send(reply)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


class AsyncDriver:
    """Performs effects in the running loop. What blocks, such as a broker, is left to a thread.

    Args:
        engine, unreadable: as for `sync.Driver`.

    Attributes:
        cancelled: a cancellation that had to wait for the end of an effect.
    """

    __slots__ = ("_engine", "_unreadable", "cancelled")

    def __init__(
        self,
        engine: Engine,
        unreadable: Callable[[MemoLockError], None],
    ) -> None:
        self._engine = engine
        self._unreadable = unreadable
        self.cancelled: asyncio.CancelledError | None = None

    async def __call__(self, effect: Any) -> Any:
        """Perform one effect and return its reply."""
        match effect:
            case protocol.Get(keys, patience):
                return await self._engine.store.aget(keys, patience)
            case Script():
                return await self._engine.store.arun(effect)
            case protocol.Wait(seat, timeout):
                if self.cancelled is not None:
                    raise self.cancelled
                return await _wait(seat, timeout)
            case protocol.TakeSeat():
                return _LoopSeat(_bell())
            case protocol.Listen(timeout):
                store = self._engine.store
                if not store.inbox.listening:
                    await _in_thread(store.listen, timeout)
                return None
            case protocol.Dispatch(ticket, (args, kwargs), inline, timeout):
                if inline:
                    await _in_thread(self._engine.run_here, ticket, args, kwargs)
                else:
                    await self._send(ticket, args, kwargs, timeout)
                return None
            case protocol.Uncached((args, kwargs)):
                return await _in_thread(self._engine.run_here, None, args, kwargs)
            case protocol.GetAll(keys, patience):
                return await self._engine.store.aget_all(keys, patience)
            case protocol.RunAll(scripts):
                return await self._engine.store.arun_all(scripts)
            case protocol.TakeSeats(count):
                return [_LoopSeat(_bell()) for _ in range(count)]
            case protocol.WaitForAny(seats, timeout):
                if self.cancelled is not None:
                    raise self.cancelled
                return await _wait_for_any(seats, timeout)
            case protocol.Unreadable(error):
                return self._unreadable(error)
        raise TypeError(f"no effect: {effect!r}")

    async def _send(
        self, ticket: protocol.Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float
    ) -> None:
        """Send a flight's message, to the end: others wait for the flight, which is confirmed or failed after that."""
        sending = asyncio.ensure_future(_in_thread(self._engine.send, ticket, args, kwargs, timeout))
        while not sending.done():
            try:
                await asyncio.wait([sending])
            except asyncio.CancelledError as error:
                self.cancelled = error
        sending.result()


# ---- waking callers: the listener's thread rings a loop once, however many of its callers have their turn ------


class _Bell:
    """Wakes the seats of one loop, from any thread."""

    __slots__ = ("__weakref__", "_lock", "_loop", "_rung", "_seats")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._seats: deque[_LoopSeat] = deque()
        self._rung = False
        self._lock = threading.Lock()

    def ring(self, seat: _LoopSeat) -> None:
        self._seats.append(seat)
        with self._lock:
            if self._rung:
                return
            self._rung = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed, and its callers with it
            self._seats.clear()

    def _wake(self) -> None:
        with self._lock:
            self._rung = False
        while self._seats:
            future = self._seats.popleft().future
            if future is not None and not future.done():
                future.set_result(None)


_bells: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell] = weakref.WeakKeyDictionary()


def _bell() -> _Bell:
    loop = asyncio.get_running_loop()
    bell = _bells.get(loop)
    if bell is None:
        bell = _bells[loop] = _Bell(loop)
    return bell


class _LoopSeat(Seat):
    __slots__ = ("_bell", "future")

    def __init__(self, bell: _Bell) -> None:
        self._bell = bell
        self.future: asyncio.Future[None] | None = None
        super().__init__(self._ring)

    def _ring(self) -> None:
        self._bell.ring(self)


def _give_up(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _wait(seat: Seat, timeout: float) -> Turn | Settled | Broken | None:
    await _wait_for_any((seat,), timeout)
    return seat.turn


async def _wait_for_any(seats: tuple[Seat, ...], timeout: float) -> None:
    # Turns are given by any thread, but the bell wakes us in this one: no turn can slip in between.
    if timeout <= 0 or any(seat.turn is not None for seat in seats):
        return
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    for seat in seats:
        assert isinstance(seat, _LoopSeat)
        seat.future = future
    timer = loop.call_later(timeout, _give_up, future)
    try:
        await future
    finally:
        timer.cancel()


# ---- what would block the loop ---------------------------------------------------------------------------------

#: A broker that is down holds a thread for as long as it may take a message, and must not hold up all others.
_threads = ThreadPoolExecutor(max_workers=32, thread_name_prefix="memolock-aio")


def _renew_threads() -> None:
    global _threads
    _threads = ThreadPoolExecutor(max_workers=32, thread_name_prefix="memolock-aio")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_threads)


async def _in_thread(call: Callable[..., T], *args: Any) -> T:
    """Call in another thread, in this context. If the caller is cancelled the call goes on, and its result is lost."""
    context = copy_context()
    work = asyncio.get_running_loop().run_in_executor(_threads, lambda: context.run(call, *args))
    work.add_done_callback(retrieve)
    return await asyncio.shield(work)
