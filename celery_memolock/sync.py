"""The thread driver: performs the core's effects in the calling thread, and the methods that callers use."""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from typing_extensions import ParamSpec

from . import protocol
from .errors import ConfigurationError, MemoLockError, StoreUnavailable
from .protocol import MISS, Call, Core, Missing, Script, Ticket, drive
from .rooms import Broken, Seat, Settled, Turn

if TYPE_CHECKING:
    from .codec import Codec
    from .keys import KeyMaker
    from .options import Options
    from .store import Store

__all__ = ["CallerMethods", "Driver", "Engine", "Memo", "computing"]

logger = logging.getLogger("celery_memolock")
P = ParamSpec("P")
R = TypeVar("R")

#: The entries that are being computed in this context, outermost first.
computing: ContextVar[tuple[str, ...]] = ContextVar("celery_memolock_computing", default=())


class Engine(Protocol):
    """What runs flights. Engines send and run; they hold no locking code."""

    @property
    def store(self) -> Store:
        """The server of this engine; raises `ConfigurationError` if none is named."""
        ...

    @property
    def eager(self) -> bool:
        """Whether everything runs in the caller, so that a server is optional."""
        ...

    @property
    def in_worker(self) -> bool:
        """Whether the caller itself is a task in a worker."""
        ...

    def send(self, ticket: Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float) -> None:
        """Hand a flight's message to the queue within `timeout` seconds, or raise `DispatchError`."""

    def run_here(self, ticket: Ticket | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a flight in this very thread, or without a ticket the bare task → its result."""


class Driver:
    """Performs effects in the calling thread.

    Args:
        body: what the effect `Body` runs; only a worker has one.
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
        self._store = engine.store
        self._args = args
        self._kwargs = kwargs or {}
        self._body = body
        self._unreadable = unreadable

    def __call__(self, effect: Any) -> Any:
        """Perform one effect and return its reply."""
        match effect:
            case protocol.Get(keys, patience):
                return self._store.get(keys, patience)
            case Script():
                return self._store.run(effect)
            case protocol.Wait(seat, timeout):
                return _wait(seat, timeout)
            case protocol.TakeSeat():
                return _ThreadSeat()
            case protocol.Listen(timeout):
                return self._store.listen(timeout)
            case protocol.Dispatch(ticket, inline, timeout):
                if inline:
                    self._engine.run_here(ticket, self._args, self._kwargs)
                else:
                    self._engine.send(ticket, self._args, self._kwargs, timeout)
                return None
            case protocol.Body(run):
                assert self._body is not None
                return self._body(run)
            case protocol.Hold():
                return self._store.hold(effect)
            case protocol.Release(run):
                return self._store.release(run)
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


class Memo(Generic[P, R]):
    """One memolocked task as its callers see it."""

    def __init__(
        self,
        task: str,
        engine: Engine,
        options: Options,
        maker: KeyMaker,
        codec: Codec,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.task = task
        self.options = options
        self._engine = engine
        self._maker = maker
        self.codec = codec
        self._overrides = dict(overrides or {})
        self._complained = False

    def override(self, overrides: Mapping[str, Any]) -> Memo[P, R]:
        """Return the same task with other options for the calls made through it."""
        merged = {**self._overrides, **overrides}
        return Memo(self.task, self._engine, self.options.override(overrides), self._maker, self.codec, merged)

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Describe one call to the core."""
        engine = self._engine
        return Call(
            self.task,
            self._maker.keys(args, kwargs),
            self.options,
            self.codec,
            inline=lambda: engine.eager or (self.options.nested == "inline" and engine.in_worker),
            chain=computing.get(),
            overrides=self._overrides,
        )

    def fetch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> R:
        """See `CallerMethods.get_cached`."""

        def core(call: Call) -> Core[Any]:
            return protocol.fetch(call, self._engine.store.inbox.rooms, time.monotonic)

        def uncached() -> Any:
            return self._engine.run_here(None, args, kwargs)

        try:
            return self._do(core, args, kwargs, uncached)  # type: ignore[no-any-return]
        except StoreUnavailable:
            if self.options.on_redis_error == "raise":
                raise
            return uncached()  # type: ignore[no-any-return]

    def peek(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> R | Missing:
        """See `CallerMethods.peek`."""
        return self._do(protocol.peek, args, kwargs, lambda: MISS)  # type: ignore[no-any-return]

    def refresh(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """See `CallerMethods.refresh`."""
        return bool(self._do(protocol.refresh, args, kwargs, lambda: False))

    def invalidate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """See `CallerMethods.invalidate`."""
        return bool(self._do(protocol.invalidate, args, kwargs, lambda: False))

    def put(self, value: R, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See `CallerMethods.set_cached`."""
        self._do(lambda call: protocol.put(call, value), args, kwargs, lambda: None)

    def _do(
        self,
        core: Callable[[Call], Core[Any]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        without_server: Callable[[], Any],
    ) -> Any:
        call = self.call(args, kwargs)
        try:
            driver = Driver(self._engine, args, kwargs, unreadable=self._complain)
            return drive(core(call), driver)
        except (StoreUnavailable, ConfigurationError):
            if not self._engine.eager:
                raise
            return without_server()

    def _complain(self, error: MemoLockError) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("memolock counts an unreadable entry as a miss (said once): %s", error)


class CallerMethods(Generic[P, R]):
    """The methods that callers use, for a task and for `with_options` alike."""

    @property
    @abstractmethod
    def memo(self) -> Memo[P, R]:
        """What the methods work on."""

    def get_cached(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the cached value, or wait for the one flight that computes it, for everybody.

        Args:
            args, kwargs: as the task takes them.

        Raises:
            TypeError: the arguments do not fit the task; nothing was dispatched.
            ArgumentError: an argument cannot become part of a key or of a message.
            WaitTimeout: no outcome within `wait_timeout`.
            StoreUnavailable: Redis cannot be reached.
            DispatchError: the broker did not take the message.
            ReentrantFlight: called by the very task that computes this key.
            Exception: what the task raised, of its own type where that is safe, else `TaskFailed`; the
                worker's traceback is its cause.
        """
        return self.memo.fetch(args, kwargs)

    def peek(self, *args: P.args, **kwargs: P.kwargs) -> R | Missing:
        """Return the value if it is stored, else `MISS`, without computing or waiting."""
        return self.memo.peek(args, kwargs)

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Have the value computed anew, without waiting. The old one is served until then.

        Returns:
            True if this call started a flight, False if it joined one that waits for a worker or, as one that
            runs already may have read older data, asked for another after it.
        """
        return self.memo.refresh(args, kwargs)

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Drop the value: no later call sees it, nor one that is being computed from older data right now.

        Returns:
            Whether a value was stored.
        """
        return self.memo.invalidate(args, kwargs)

    def set_cached(self, value: R, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Store a value for these arguments. Whoever waits gets it; the outcome of a running flight is refused.

        Raises:
            EncodeError, ValueTooLarge: the value cannot be stored.
        """
        self.memo.put(value, args, kwargs)

    def with_options(self, **overrides: Any) -> CallerMethods[P, R]:
        """Return the task's caller methods with other options, for the calls made through it.

        Raises:
            OptionError: an option is unknown, or belongs to the task as a whole.
        """
        return _Overridden(self.memo.override(overrides))


class _Overridden(CallerMethods[P, R]):
    def __init__(self, memo: Memo[P, R]) -> None:
        self._memo = memo

    @property
    def memo(self) -> Memo[P, R]:
        return self._memo
