"""One memolocked task as its callers see it: the methods that they use, for threads and for asyncio alike."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from typing_extensions import ParamSpec

from . import protocol
from .aio import AsyncDriver, adrive
from .codec import Entry
from .errors import ConfigurationError, MemoLockError, StoreUnavailable
from .local import MISSING, Local
from .protocol import MISS, Call, Core, Missing, Uncached, drive
from .sync import Driver
from .weave import weave

if TYPE_CHECKING:
    from .codec import Codec
    from .engine import Engine
    from .keys import KeyMaker
    from .options import Options

__all__ = ["CallerMethods", "Memo", "computing"]

logger = logging.getLogger("celery_memolock")
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

#: The entries that are being computed in this context, outermost first.
computing: ContextVar[tuple[str, ...]] = ContextVar("celery_memolock_computing", default=())


class Memo(Generic[P, R]):
    """One memolocked task: makes the cores of its calls, and the drivers that perform them."""

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
            arguments=(args, kwargs),
            local=self._local(),
        )

    def kept(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the value that this process keeps, or `MISSING`."""
        if not self.options.local_ttl or computing.get():
            return MISSING
        local = self._local()
        if local is None:
            return MISSING
        found = local.get(self._maker.keys(args, kwargs).entry)
        return self.codec.unpack(found) if type(found) is Entry else found

    def _local(self) -> Local | None:
        if not self.options.local_ttl:
            return None
        try:
            return self._engine.store.local(self.task, self.options)
        except ConfigurationError:
            return None  # eager mode does without a server

    def run(self, core: Core[T]) -> T:
        """Drive a core of this task in the calling thread."""
        return drive(core, Driver(self._engine, unreadable=self._complain))

    async def arun(self, core: Core[T]) -> T:
        """Drive a core of this task in the running event loop."""
        driver = AsyncDriver(self._engine, self._complain)
        try:
            return await adrive(core, driver)
        finally:
            if driver.cancelled is not None:
                raise driver.cancelled

    # ---- what the methods of `CallerMethods` do

    def fetch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Core[R]:
        """Get the value, by any way that the options allow."""
        call = self.call(args, kwargs)
        try:
            value: R = yield from protocol.fetch(call, self._engine.store.inbox.rooms, time.monotonic)
            return value
        except (StoreUnavailable, ConfigurationError) as error:
            compute = isinstance(error, StoreUnavailable) and self.options.on_redis_error == "compute"
            if not compute and not self._engine.eager:
                raise
        computed: R = yield Uncached((args, kwargs))
        return computed

    def fetch_many(self, calls: Iterable[tuple[Any, ...]], return_exceptions: bool) -> Core[list[Any]]:
        """Get several values side by side."""
        found = yield from weave([self.fetch(tuple(args), {}) for args in calls], time.monotonic)
        if not return_exceptions:
            for each in found:
                if isinstance(each, BaseException):
                    raise each
        return found

    def peek(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Core[R | Missing]:
        """Look."""
        return self._eagerly(protocol.peek(self.call(args, kwargs)), MISS)

    def refresh(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Core[bool]:
        """Have it computed anew."""
        return self._eagerly(protocol.refresh(self.call(args, kwargs)), False)

    def invalidate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Core[bool]:
        """Drop it."""
        return self._eagerly(protocol.invalidate(self.call(args, kwargs)), False)

    def put(self, value: R, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Core[None]:
        """Set it."""
        return self._eagerly(protocol.put(self.call(args, kwargs), value), None)

    def _eagerly(self, core: Core[T], without_server: T) -> Core[T]:
        """In eager mode a server is optional."""
        try:
            return (yield from core)
        except (StoreUnavailable, ConfigurationError):
            if not self._engine.eager:
                raise
        return without_server

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
        memo = self.memo
        kept = memo.kept(args, kwargs)
        if kept is not MISSING:
            return kept  # type: ignore[no-any-return]
        return memo.run(memo.fetch(args, kwargs))

    async def aget_cached(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Do what `get_cached` does, from asyncio, without blocking the loop. To cancel it concerns no other caller."""
        memo = self.memo
        kept = memo.kept(args, kwargs)
        if kept is not MISSING:
            return kept  # type: ignore[no-any-return]
        return await memo.arun(memo.fetch(args, kwargs))

    @overload
    def get_cached_many(
        self, calls: Iterable[tuple[Any, ...]], *, return_exceptions: Literal[False] = False
    ) -> list[R]: ...

    @overload
    def get_cached_many(
        self, calls: Iterable[tuple[Any, ...]], *, return_exceptions: Literal[True]
    ) -> list[R | Exception]: ...

    def get_cached_many(self, calls: Iterable[tuple[Any, ...]], *, return_exceptions: bool = False) -> Any:
        """Return the values of several calls: one trip for all that are stored, and one to join or start the rest.

        Args:
            calls: the positional arguments of each, as tuples: ``[("q1",), ("q2",)]``.
            return_exceptions: put an error in its call's place instead of raising the first.

        Returns:
            A list in the order of the calls.

        Raises:
            Exception: what `get_cached` raises for the first call that fails.
        """
        memo = self.memo
        return memo.run(memo.fetch_many(calls, return_exceptions))

    @overload
    async def aget_cached_many(
        self, calls: Iterable[tuple[Any, ...]], *, return_exceptions: Literal[False] = False
    ) -> list[R]: ...

    @overload
    async def aget_cached_many(
        self, calls: Iterable[tuple[Any, ...]], *, return_exceptions: Literal[True]
    ) -> list[R | Exception]: ...

    async def aget_cached_many(self, calls: Iterable[tuple[Any, ...]], *, return_exceptions: bool = False) -> Any:
        """Do what `get_cached_many` does, from asyncio."""
        memo = self.memo
        return await memo.arun(memo.fetch_many(calls, return_exceptions))

    def peek(self, *args: P.args, **kwargs: P.kwargs) -> R | Missing:
        """Return the value if it is stored, else `MISS`, without computing or waiting."""
        memo = self.memo
        return memo.run(memo.peek(args, kwargs))

    async def apeek(self, *args: P.args, **kwargs: P.kwargs) -> R | Missing:
        """Do what `peek` does, from asyncio."""
        memo = self.memo
        return await memo.arun(memo.peek(args, kwargs))

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Have the value computed anew, without waiting. The old one is served until then.

        Returns:
            True if this call started a flight, False if it joined one that waits for a worker or, as one that
            runs already may have read older data, asked for another after it.
        """
        memo = self.memo
        return memo.run(memo.refresh(args, kwargs))

    async def arefresh(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Do what `refresh` does, from asyncio."""
        memo = self.memo
        return await memo.arun(memo.refresh(args, kwargs))

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Drop the value: no later call sees it, nor one that is being computed from older data right now.

        Returns:
            Whether a value was stored.
        """
        memo = self.memo
        return memo.run(memo.invalidate(args, kwargs))

    async def ainvalidate(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Do what `invalidate` does, from asyncio."""
        memo = self.memo
        return await memo.arun(memo.invalidate(args, kwargs))

    def set_cached(self, value: R, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Store a value for these arguments. Whoever waits gets it; the outcome of a running flight is refused.

        Raises:
            EncodeError, ValueTooLarge: the value cannot be stored.
        """
        memo = self.memo
        memo.run(memo.put(value, args, kwargs))

    async def aset_cached(self, value: R, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Do what `set_cached` does, from asyncio."""
        memo = self.memo
        await memo.arun(memo.put(value, args, kwargs))

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
