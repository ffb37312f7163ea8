"""The asyncio driver: performs the core's effects in a running event loop, and never blocks it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Final, TypeVar

from . import effects
from .bounded import LAST, log_failure, not_before
from .effects import Core, Onward, Script
from .engine import Engine
from .errors import MemoLockError
from .pipe import orphans, retrieve
from .rooms import Seat, Woken
from .sync import drive_aside

__all__ = ["AsyncDriver", "Daemons", "InThreads", "adrive", "beside", "in_thread", "run_in_thread"]

T = TypeVar("T")


async def adrive(core: Core[T], driver: AsyncDriver) -> T:
    """Perform a core's effects, one after the other, in the running loop; see `effects.drive`.

    A cancellation is raised inside the core, as any error of an effect is, and the core then gives up its place.
    """
    try:
        step = _next(core.send, None)
        while True:
            while type(step) is _End:
                if type(step.result) is not Onward:
                    return step.result  # type: ignore[no-any-return]
                core = step.result.core
                step = _next(core.send, None)
            try:
                step = driver.perform(step)  # the effect itself is not to be kept for as long as many wait
                reply = await step
            except GeneratorExit:  # the loop is gone, and nothing can be awaited any more
                core.close()
                raise
            except BaseException as error:
                driver.ending = driver.ending or isinstance(error, asyncio.CancelledError)
                step = _next(core.throw, error)
            else:
                driver.ending = driver.ending or type(reply) is effects.Interrupted
                step = _next(core.send, reply)
    finally:
        if driver.cancelled is not None:
            raise driver.cancelled


class _End:
    """Stands for what a core returned."""

    __slots__ = ("result",)

    def __init__(self, result: Any) -> None:
        self.result = result


def _next(step: Callable[[Any], Any], reply: Any) -> Any:
    """Go on with a core → its next effect, or its end.

    Apart, as a coroutine that has caught an exception is larger by a frame object for the rest of its life.
    """
    try:
        return step(reply)
    except StopIteration as stop:
        return _End(stop.value)


class AsyncDriver:
    """Performs effects in the running loop. What blocks, such as a broker, is left to a thread.

    Args:
        engine, unreadable: as for `sync.Driver`.
        body: a coroutine function that the effect `Body` awaits; only what runs flights has one.

    Attributes:
        cancelled: a cancellation that had to wait for the end of an effect.
        ending: whether the core was cancelled. So may be the whole loop, and a connection that is made now would never
            be closed: what is left to say is said from a thread.
    """

    __slots__ = ("_body", "_engine", "_unreadable", "cancelled", "ending")

    def __init__(
        self,
        engine: Engine,
        unreadable: Callable[[MemoLockError], None] | None = None,
        body: Callable[[effects.Run], Awaitable[Any]] | None = None,
    ) -> None:
        self._engine = engine
        self._unreadable = unreadable
        self._body = body
        self.cancelled: asyncio.CancelledError | None = None
        self.ending = False

    def perform(self, effect: Any) -> Awaitable[Any]:
        """Perform one effect → its reply, to be awaited. No coroutine of ours stands between: waiters are many."""
        match effect:
            case effects.Get(keys, patience):
                return self._engine.store.aget(keys, patience)
            case effects.Acquire() if not self.ending:
                return self._look(effect)
            case Script():
                store = self._engine.store
                return in_thread(store.run, effect) if self.ending else store.arun(effect)
            case effects.Wait(seat, timeout):
                return self._wait(seat, timeout)
            case effects.TakeSeat():
                return _Now(_LoopSeat(_bell()))
            case effects.Listen(timeout):
                store = self._engine.store
                return _Now(None) if store.inbox.listening else store.alisten(timeout)
            case effects.Dispatch(ticket, (args, kwargs), inline, timeout):
                if inline:
                    return self._run_here(ticket, args, kwargs)
                return self._send(ticket, args, kwargs, timeout)
            case effects.Attendance((args, kwargs), since, timeout):
                return _answer(not_before(since, lambda: self._engine.attendance(args, kwargs)), timeout)
            case effects.Own(run, timeout):
                return _end_of(run, timeout)
            case effects.Query():
                return self._engine.store.aask(effect)
            case effects.Aside(core):
                return self._aside(core)
            case effects.Uncached((args, kwargs)):
                return self._engine.arun_here(None, args, kwargs)
            case effects.GetAll(keys, patience):
                return self._engine.store.aget_all(keys, patience)
            case effects.RunAll(scripts):
                return self._engine.store.arun_all(scripts)
            case effects.TakeSeats(count):
                return _Now([_LoopSeat(_bell()) for _ in range(count)])
            case effects.WaitForAny(seats, timeout):
                return self._wait_for_any(seats, timeout)
            case effects.Body(run):
                assert self._body is not None
                return self._body(run)
            case effects.Hold():
                # Nobody goes on with a run whose loop was stopped or closed.
                self._engine.store.hold(effect, asyncio.get_running_loop().is_running)
                return _Now(None)
            case effects.Release(run):
                self._engine.store.release(run)
                return _Now(None)
            case effects.Pause(seconds):
                return asyncio.sleep(seconds)
            case effects.Unreadable(error):
                return _Now(self._unreadable(error) if self._unreadable is not None else None)
        raise TypeError(f"no effect: {effect!r}")

    async def _look(self, effect: effects.Acquire) -> Any:
        reply = await self._engine.store.arun(effect)
        await asyncio.sleep(0)  # whose GET was answered along with this is to be counted in
        return reply

    async def _aside(self, core: Core[Any]) -> None:
        engine = self._engine
        here = engine.eager or (engine.ends_with_job and not self.ending)
        if not here and (self.ending or engine.travels):
            drive_aside(engine, core)  # this loop may end before the core does
            return
        work = beside(adrive(core, AsyncDriver(engine, self._unreadable)))
        if here:  # nothing runs beside the caller there
            await asyncio.wait([work], timeout=None if engine.eager else LAST)

    async def _wait(self, seat: Seat, timeout: float) -> Woken | None:
        # Turns are given by any thread, but the bell wakes us in this one: no turn can slip in between.
        if self.cancelled is not None:
            raise self.cancelled
        timeout += time.monotonic()  # by now it is an instant: each number counts where many wait
        while seat.turn is None and time.monotonic() < timeout:
            future, timer = _sit((seat,), timeout)
            try:
                await future  # the bell may have rung for a turn that was taken already
            finally:
                timer.cancel()
        return seat.turn

    async def _wait_for_any(self, seats: tuple[Seat, ...], timeout: float) -> None:
        if self.cancelled is not None:
            raise self.cancelled
        if timeout > 0 and all(seat.turn is None for seat in seats):
            future, timer = _sit(seats, time.monotonic() + timeout)
            try:
                await future
            finally:
                timer.cancel()

    async def _run_here(self, ticket: effects.Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Begin to run a flight in this process. It is not its caller's alone: it goes on when that one has gone."""
        run = beside(self._engine.arun_here(ticket, args, kwargs), retrieve)
        return await _end_of(run, None) if self._engine.eager else effects.GoesOn(run)

    async def _send(
        self, ticket: effects.Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float
    ) -> None:
        """Send a flight's message, to the end: others wait for the flight, which is confirmed or failed after that."""
        if self.cancelled is not None:  # in an earlier one of several
            raise self.cancelled
        sending = asyncio.ensure_future(self._engine.asend(ticket, args, kwargs, timeout))
        while not sending.done():
            try:
                await asyncio.wait([sending])
            except asyncio.CancelledError as error:
                self.cancelled = error
        sending.result()


async def _end_of(run: asyncio.Future[Any], timeout: float | None) -> Any:
    done, _ = await asyncio.wait([run], timeout=timeout)
    return run.result() if done else None


async def _answer(asked: Future[str] | None, timeout: float) -> str:
    if asked is None:
        return ""
    loop = asyncio.get_running_loop()
    there: asyncio.Future[None] = loop.create_future()

    def tell(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(_give_up, there)

    asked.add_done_callback(tell)
    await asyncio.wait([there], timeout=timeout)
    return asked.result() if asked.done() else ""


# ---- waking callers: the listener's thread rings a loop once, however many of its callers have their turn ------


class _Bell:
    """Wakes the seats of one loop, from any thread."""

    __slots__ = ("__weakref__", "_lock", "_loop", "_rung", "_seats", "context")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self.context = Context()  # of the timers of all: by itself each has one of its own
        self._seats: deque[_LoopSeat] = deque()
        self._rung = False
        self._lock = threading.Lock()

    def ring(self, seat: _LoopSeat) -> None:
        self._seats.append(seat)
        with self._lock:
            if self._rung:
                return
            self._rung = True
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._wake)
                return
        except RuntimeError:  # the loop is closed, and its callers with it
            pass
        self._seats.clear()

    def ready(self) -> bool | None:
        loop = self._loop()
        return None if loop is None or loop.is_closed() else loop.is_running()

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
        orphans(_bells)
        bell = _bells[loop] = _Bell(loop)
    return bell


class _LoopSeat(Seat):
    __slots__ = ("_bell", "future")

    def __init__(self, bell: _Bell) -> None:
        super().__init__()
        self._bell = bell
        self.future: asyncio.Future[None] | None = None

    def wake(self) -> None:
        self._bell.ring(self)

    def ready(self) -> bool | None:
        return self._bell.ready()


def _sit(seats: tuple[Seat, ...], until: float) -> tuple[asyncio.Future[None], asyncio.TimerHandle]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    for seat in seats:
        assert isinstance(seat, _LoopSeat)
        seat.future = future
    return future, loop.call_later(until - time.monotonic(), _give_up, future, context=_bell().context)


def _give_up(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Now:
    """An awaitable whose result is there already."""

    __slots__ = ("_result",)

    def __init__(self, result: Any) -> None:
        self._result = result

    def __await__(self) -> Generator[Any, None, Any]:
        return self._result
        yield


#: What runs beside its callers. A loop itself holds its tasks only weakly.
_beside: set[asyncio.Future[Any]] = set()


def beside(work: Awaitable[Any], then: Callable[[asyncio.Future[Any]], None] | None = None) -> asyncio.Future[Any]:
    """Have something done in this loop, whoever waits for it; `then` gets it at its end. Default: log its error."""
    future = asyncio.ensure_future(work)
    _beside.add(future)
    future.add_done_callback(_beside.discard)
    future.add_done_callback(then or _log_error)
    return future


def _log_error(work: asyncio.Future[Any]) -> None:
    if not work.cancelled() and (error := work.exception()) is not None:
        log_failure(error)


# ---- what would block the loop ---------------------------------------------------------------------------------


_MOST_THREADS: Final = 32


class Daemons(Executor):
    """A pool of threads for whose ends nobody waits, as an exit does for those of a `ThreadPoolExecutor`."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = 0
        self._free = 0

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call in a thread that is free, else in a new one, else when one becomes free."""
        future: Future[T] = Future()
        self._calls.put((future, partial(fn, *args, **kwargs)))
        with self._lock:
            if self._free:
                self._free -= 1
            elif self._started < self._most:
                self._started += 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # it is raised where the future is awaited
                    future.set_exception(error)
            del future, call
            with self._lock:
                self._free += 1


def _new_pools() -> tuple[Executor, Executor]:
    return ThreadPoolExecutor(_MOST_THREADS, "memolock-aio"), Daemons(_MOST_THREADS, "memolock-run")


#: A broker that is down holds a thread of the first for as long as it may take a message. What users have run takes as
#: long as it takes: it must not hold up the former, nor the process's exit.
_threads, _runners = _new_pools()


def _renew_threads() -> None:
    global _threads, _runners
    _threads, _runners = _new_pools()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_threads)


async def in_thread(call: Callable[..., T], *args: Any) -> T:
    """Call in another thread, in this context. If the caller is cancelled the call goes on, and its result is lost."""
    return await asyncio.shield(_in_pool(_threads, call, *args))


async def run_in_thread(call: Callable[..., T], *args: Any) -> T:
    """Do what `in_thread` does, for what is the user's own and may take long."""
    return await asyncio.shield(_in_pool(_runners, call, *args))


async def run_to_its_end(call: Callable[..., T], *args: Any) -> T:
    """Do what `run_in_thread` does. Who is cancelled waits for `LAST` seconds, as the thread goes on all the same.

    The cancellation is raised after that, or where what the call returned is still to be awaited.
    """
    work = _in_pool(_runners, call, *args)
    cancelled: asyncio.CancelledError | None = None
    until = math.inf
    while not work.done() and time.monotonic() < until:
        try:
            await asyncio.wait([work], timeout=None if until == math.inf else until - time.monotonic())
        except asyncio.CancelledError as error:
            cancelled = error
            until = min(until, time.monotonic() + LAST)
    if cancelled is not None and not work.done():
        raise cancelled
    result = work.result()
    if cancelled is not None and inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise cancelled
    return result


def _in_pool(pool: Executor, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    context = copy_context()
    work = asyncio.get_running_loop().run_in_executor(pool, lambda: context.run(_call, call, args))
    work.add_done_callback(retrieve)
    return work


def _call(call: Callable[..., T], args: tuple[Any, ...]) -> T:
    try:
        return call(*args)
    except StopIteration as error:  # no future takes one, and who awaits it would wait for ever
        raise RuntimeError("a function that was called in a thread raised StopIteration") from error


class InThreads:
    """The half of an `Engine` that is for asyncio, for one that itself knows only threads."""

    def asend(
        self: Any, ticket: effects.Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float
    ) -> Any:
        """Send from another thread."""
        return in_thread(self.send, ticket, args, kwargs, timeout)

    def arun_here(self: Any, ticket: effects.Ticket | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run in another thread."""
        return run_in_thread(self.run_here, ticket, args, kwargs)
