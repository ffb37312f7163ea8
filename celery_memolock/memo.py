"""One memolocked task as its callers see it: the methods that they use, for threads and for asyncio alike."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from typing_extensions import ParamSpec

from . import protocol
from .aio import AsyncDriver, adrive
from .codec import Entry
from .effects import MISS, CachedEntry, Call, Computing, Core, Missing, Onward, Ticket, Uncached, drive
from .errors import ConfigurationError, MemoLockError, OptionError, StoreUnavailable
from .keys import TagKeys
from .local import MISSING, Local
from .options import Progress
from .pipe import retrieve
from .protocol import EARLY
from .sync import Driver
from .weave import weave

if TYPE_CHECKING:
    from .clock import Clock
    from .codec import Codec
    from .engine import Engine
    from .keys import KeyMaker
    from .options import Options
    from .rooms import Rooms

__all__ = ["CallerMethods", "Memo", "computes", "computing", "remembered"]

logger = logging.getLogger("celery_memolock")
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

#: What is being computed in this context, outermost first.
computing: ContextVar[tuple[Computing, ...]] = ContextVar("celery_memolock_computing", default=())


@contextmanager
def computes(ticket: Ticket) -> Iterator[Callable[[], None]]:
    """Refuse calls within for what a flight is part of, and for its own key until what this yields is called."""
    this = Computing(ticket.keys.entry)
    outside = computing.set((*ticket.chain, this))
    try:
        yield partial(setattr, this, "over", True)
    finally:
        computing.reset(outside)


def remembered(make: Callable[..., T]) -> Callable[..., T]:
    """Keep what was made of the last options: to check them takes as long as a command to the server."""
    kept = lru_cache(256, typed=True)(make)

    def get(**options: Any) -> T:
        try:
            return kept(**options)
        except TypeError:  # one of them cannot be hashed
            return make(**options)

    return get


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
        self._inline: Callable[[], bool] = lambda: (
            engine.eager or (self.options.nested == "inline" and engine.in_worker)
        )
        self._is_eager: Callable[[], bool] = lambda: engine.eager
        self._holder: Callable[[], str] = lambda: engine.holder
        self.place: Callable[[], str] = lambda: "" if engine.travels or engine.eager else engine.store.address
        self._keeps = bool(options.local_ttl) and not options.force_refresh and EARLY.isdisjoint(self._overrides)
        self._near: Local | None = None
        self._complained = False
        self._with = remembered(self._override)

    def override(self, overrides: Mapping[str, Any]) -> Memo[P, R]:
        """Return the same task with other options for the calls made through it.

        The last ones are kept, but no function: it may hold on to anything.
        """
        return (self._override if any(map(callable, overrides.values())) else self._with)(**overrides)

    def _override(self, **overrides: Any) -> Memo[P, R]:
        merged = {**self._overrides, **overrides}
        options = self.options.override(overrides, travels=self._engine.travels)
        return Memo(self.task, self._engine, options, self._maker, self.codec, merged)

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], described: bool = False) -> Call:
        """Describe one call to the core."""
        return Call(
            self.task,
            self._maker.keys(args, kwargs),
            self.options,
            self.codec,
            inline=self._inline,
            chain=computing.get(),
            overrides=self._overrides,
            arguments=(args, kwargs),
            local=self._local(),
            eager=self._is_eager,
            described=described,
            holder=self._holder,
            place=self.place,
        )

    def kept(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the value that this process keeps, or `MISSING`."""
        if not self._keeps or computing.get():
            return MISSING
        local = self._near
        if local is None or local.over:  # the way to it takes as long as all the rest
            local = self._near = self._local()
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

    def arun(self, core: Core[T]) -> Awaitable[T]:
        """Drive a core of this task in the running event loop."""
        return adrive(core, AsyncDriver(self._engine, self._complain))

    # ---- what the methods of `CallerMethods` do

    def fetch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], described: bool = False) -> Core[Any]:
        """Get the value, by any way that the options allow."""
        call = self.call(args, kwargs, described)
        if self._engine.eager:
            return self._or_compute(call, (StoreUnavailable, ConfigurationError))
        if self.options.on_redis_error == "compute":
            return self._or_compute(call, (StoreUnavailable,))
        return protocol.fetch(call, *self._here())

    def _or_compute(self, call: Call, errors: tuple[type[MemoLockError], ...]) -> Core[Any]:
        try:
            found = yield from protocol.fetch(call, *self._here())
            return (yield from found.core) if isinstance(found, Onward) else found
        except errors as error:
            # What an external task returns is not the value; and an option's function failed after the run.
            if call.options.external or isinstance(error, OptionError):
                raise
            trouble = error
        value = yield Uncached(call.arguments)
        return CachedEntry(value, "fresh", "flight", 0.0, "", trouble) if call.described else value

    async def follow(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AsyncIterator[Progress]:
        """Get the value, and iterate over what is reported until it is there."""
        heard: asyncio.Queue[Progress | None] = asyncio.Queue()
        memo = self.override({"on_progress": heard.put_nowait})
        waiting = asyncio.ensure_future(memo.arun(memo.fetch(args, kwargs)))

        def over(_: object) -> None:
            retrieve(waiting)  # whoever iterates may have gone
            heard.put_nowait(None)

        waiting.add_done_callback(over)
        try:
            while (progress := await heard.get()) is not None:
                yield progress
            waiting.result()
        finally:
            waiting.cancel()

    def fetch_many(
        self, calls: Iterable[tuple[Any, ...]], return_exceptions: bool, blocking: bool = False
    ) -> Core[list[Any]]:
        """Get several values side by side, or where a thread computes what is missing itself, one after the other."""
        cores = [self._later(self._kept_or(self.fetch), tuple(args)) for args in calls]
        return self.many(cores, return_exceptions, in_turn=blocking and self._inline())

    def _kept_or(self, make: Callable[..., Core[T]]) -> Callable[..., Core[T]]:
        """Return what makes a core that asks for no more than what is kept here, if it is."""

        def core(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Core[T]:
            kept = self.kept(args, kwargs)
            return (yield from make(args, kwargs)) if kept is MISSING else kept

        return core

    def invalidate_many(self, calls: Iterable[tuple[Any, ...]], return_exceptions: bool) -> Core[list[Any]]:
        """Drop several."""
        return self.many([self._later(self.invalidate, tuple(args)) for args in calls], return_exceptions)

    def put_many(self, values: Iterable[tuple[tuple[Any, ...], R]], return_exceptions: bool) -> Core[list[Any]]:
        """Set several."""
        cores = [self._later(partial(self.put, value), tuple(args)) for args, value in values]
        return self.many(cores, return_exceptions)

    @staticmethod
    def _later(make: Callable[..., Core[T]], args: tuple[Any, ...]) -> Core[T]:
        return (yield from make(args, {}))  # arguments that do not fit are this call's failure alone

    def _here(self) -> tuple[Rooms, Clock]:
        store = self._engine.store
        return store.inbox.rooms, store.clock

    def peek(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Core[R | Missing]:
        """Look."""
        return self._kept_or(self._peek)(args, kwargs)

    def _peek(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Core[R | Missing]:
        return self._eagerly(protocol.peek(self.call(args, kwargs)), MISS)

    def refresh(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Core[bool]:
        """Have it computed anew."""
        return self._eagerly(protocol.refresh(self.call(args, kwargs)), False)

    def invalidate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Core[bool]:
        """Drop it."""
        return self._eagerly(protocol.invalidate(self.call(args, kwargs)), False)

    def expire(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Core[bool]:
        """Let it be stale."""
        return self._eagerly(protocol.expire(self.call(args, kwargs)), False)

    def invalidate_all(self, on_progress: Callable[[int], None] | None) -> Core[int]:
        """Drop all values of the task."""
        return self._eagerly(self._over_all(on_progress), 0)

    def _over_all(self, on_progress: Callable[[int], None] | None) -> Core[int]:
        forget = self._engine.store.forget
        return (yield from protocol.invalidate_all(self.options.prefix, self.task, forget, on_progress))

    def invalidate_tag(self, tag: str, on_progress: Callable[[int], None] | None) -> Core[int]:
        """Drop all that bears a tag."""
        tags = TagKeys.of(self.options.prefix, self.task, [tag])
        return self._eagerly(self._over_tag(tags, on_progress), 0)

    def _over_tag(self, tags: TagKeys, on_progress: Callable[[int], None] | None) -> Core[int]:
        return (yield from protocol.invalidate_tag(tags, self._engine.store.forget, on_progress))

    def many(self, cores: Iterable[Core[Any]], return_exceptions: bool, in_turn: bool = False) -> Core[list[Any]]:
        """Do several things side by side; see `weave`."""
        found = yield from weave(list(cores), time.monotonic, in_turn)
        if not return_exceptions:
            for each in found:
                if isinstance(each, BaseException):
                    raise each
        return found

    def put(self, value: R, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Core[None]:
        """Set it."""
        return self._eagerly(protocol.put(self.call(args, kwargs), value), None)

    def _eagerly(self, core: Core[T], without_server: T) -> Core[T]:
        """In eager mode a server is optional."""
        try:
            return (yield from core)
        except (StoreUnavailable, ConfigurationError) as error:
            if not self._engine.eager or isinstance(error, OptionError):
                raise
        return without_server

    def _complain(self, error: MemoLockError) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("memolock counts an unreadable entry as a miss (said once): %s", error)


if TYPE_CHECKING:

    class _Typed(Generic[P, R]):
        pass
else:

    class _Typed:
        """Has no `Generic` at run time, which every class must have in the same place of its line of bases."""

        def __class_getitem__(cls, _: Any) -> type:
            return cls


class CallerMethods(_Typed[P, R]):
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
        return memo.run(memo.fetch(args, kwargs))  # type: ignore[no-any-return]

    async def aget_cached(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Do what `get_cached` does, from asyncio, without blocking the loop. To cancel it concerns no other caller."""
        memo = self.memo
        kept = memo.kept(args, kwargs)
        if kept is not MISSING:
            return kept  # type: ignore[no-any-return]
        return await memo.arun(memo.fetch(args, kwargs))

    def get_cached_entry(self, *args: P.args, **kwargs: P.kwargs) -> CachedEntry[R]:
        """Do what `get_cached` does, and tell how fresh the value is and where it comes from.

        Raises:
            Exception: as `get_cached` does.
        """
        memo = self.memo
        found: CachedEntry[R] = memo.run(memo.fetch(args, kwargs, described=True))
        return found

    async def aget_cached_entry(self, *args: P.args, **kwargs: P.kwargs) -> CachedEntry[R]:
        """Do what `get_cached_entry` does, from asyncio."""
        memo = self.memo
        found: CachedEntry[R] = await memo.arun(memo.fetch(args, kwargs, described=True))
        return found

    def afollow(self, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[Progress]:
        """Iterate over what the task reports, as `current_flight.progress`, until the value is there.

        Where it is there already there is nothing to iterate over. Joins or starts the flight, as `aget_cached` does.

        Raises:
            Exception: as `aget_cached` does, at the end.
        """
        return self.memo.follow(args, kwargs)

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
        return memo.run(memo.fetch_many(calls, return_exceptions, blocking=True))

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

    def invalidate_many(
        self, calls: Iterable[tuple[Any, ...]], *, return_exceptions: bool = False
    ) -> list[bool | Exception]:
        """Do what `invalidate` does for several calls, in one trip.

        Args:
            calls: the positional arguments of each, as tuples: ``[("q1",), ("q2",)]``.
            return_exceptions: put an error in its call's place instead of raising the first; the others are done.

        Returns:
            Whether a value was stored, in the order of the calls.
        """
        memo = self.memo
        return memo.run(memo.invalidate_many(calls, return_exceptions))

    async def ainvalidate_many(
        self, calls: Iterable[tuple[Any, ...]], *, return_exceptions: bool = False
    ) -> list[bool | Exception]:
        """Do what `invalidate_many` does, from asyncio."""
        memo = self.memo
        return await memo.arun(memo.invalidate_many(calls, return_exceptions))

    def invalidate_all(self, *, on_progress: Callable[[int], None] | None = None) -> int:
        """Invalidate all values of the task, also those that are being computed from older data right now.

        The server is looked through in batches, twice: all its keys, also those of others, so this takes a second or
        two for each million. Values of all versions go.

        Args:
            on_progress: is called with the number of values dropped so far, after each batch.

        Returns:
            How many values were dropped.
        """
        memo = self.memo
        return memo.run(memo.invalidate_all(on_progress))

    async def ainvalidate_all(self, *, on_progress: Callable[[int], None] | None = None) -> int:
        """Do what `invalidate_all` does, from asyncio."""
        memo = self.memo
        return await memo.arun(memo.invalidate_all(on_progress))

    def invalidate_tag(self, tag: str, *, on_progress: Callable[[int], None] | None = None) -> int:
        """Invalidate whatever bears a tag, of this task and of all others with the same `prefix` on this server.

        Args:
            tag: as the option `tags` names it.
            on_progress: is called with the number of values dropped so far, after each batch.

        Returns:
            How many values were dropped.
        """
        memo = self.memo
        return memo.run(memo.invalidate_tag(tag, on_progress))

    async def ainvalidate_tag(self, tag: str, *, on_progress: Callable[[int], None] | None = None) -> int:
        """Do what `invalidate_tag` does, from asyncio."""
        memo = self.memo
        return await memo.arun(memo.invalidate_tag(tag, on_progress))

    def expire(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Let the value be stale from now on: the next call has it refreshed, and gets it as `stale_ttl` allows.

        The gentle form of `invalidate`: where no stale value is kept it is the same.

        Returns:
            Whether a value was stored.
        """
        memo = self.memo
        return memo.run(memo.expire(args, kwargs))

    async def aexpire(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Do what `expire` does, from asyncio."""
        memo = self.memo
        return await memo.arun(memo.expire(args, kwargs))

    def set_cached_many(
        self, values: Iterable[tuple[tuple[Any, ...], R]], *, return_exceptions: bool = False
    ) -> list[Exception | None]:
        """Do what `set_cached` does for several calls, in one trip.

        Args:
            values: the positional arguments and the value of each: ``[(("q1",), 5), (("q2",), 7)]``.
            return_exceptions: put an error in its call's place instead of raising the first; the others are done.

        Returns:
            None for each value that was stored, in the order of the calls.
        """
        memo = self.memo
        return memo.run(memo.put_many(values, return_exceptions))

    async def aset_cached_many(
        self, values: Iterable[tuple[tuple[Any, ...], R]], *, return_exceptions: bool = False
    ) -> list[Exception | None]:
        """Do what `set_cached_many` does, from asyncio."""
        memo = self.memo
        return await memo.arun(memo.put_many(values, return_exceptions))

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
