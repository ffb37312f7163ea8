"""The inline engine: who misses first computes, in its own process, and everybody else, in any process, waits."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any, Final, Generic, Literal, Protocol, TypeVar, overload

from redis import Redis
from typing_extensions import ParamSpec, Self

from .. import environment
from ..aio import beside, in_thread, run_in_thread, run_to_its_end
from ..bounded import LAST, Asides, log_failure
from ..codec import Codec
from ..effects import CachedEntry, Call, Defer, Interrupted, Missing, Raised, Ticket
from ..errors import ConfigurationError, FlightFailed, OptionError, StoreUnavailable
from ..flight import Flight, grounded
from ..keys import KeyMaker
from ..local import MISSING
from ..memo import CallerMethods, Memo, remembered
from ..options import Options, Progress, is_async, refuse_async
from ..shape import Shape
from ..store import Store, Stores, client_in_environment, client_of
from ..work import Done, Outcome, Work, holder_of

__all__ = ["AsyncMemoized", "Client", "InlineRuns", "MemoLock", "Memoized", "finished"]

P = ParamSpec("P")
R = TypeVar("R")
K = TypeVar("K")
T = TypeVar("T")
V = TypeVar("V")

_HOST: Final = socket.gethostname()

#: For what is to be computed beside its caller.
_BESIDE: Final = {"nested": "dispatch"}

#: Options that say how messages are sent, received and scheduled.
_OF_MESSAGES: Final = ("nested", "refresh_calls", "refresh_every", "skip_abandoned")


# ---- running in the caller's process ---------------------------------------------------------------------------


class InlineRuns:
    """The half of an `Engine` that runs flights where their caller is.

    Attributes:
        function: what computes the value.
        memo: whose value it is.
        starts_loop: tells of arguments whether the function has to be called in an event loop.
    """

    function: Callable[..., Any]
    memo: Memo[Any, Any]
    starts_loop: Callable[[tuple[Any, ...]], bool]

    @property
    def holder(self) -> str:
        """This process: its winners run their flights at once."""
        return holder_of(_HOST, os.getppid(), os.getpid())

    def run_here(self, ticket: Ticket | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a flight, or without a ticket the bare function, in this thread; see `Engine.run_here`."""
        if ticket is None:
            with grounded():
                return finished(self.function(*args, **kwargs))
        work = self._work(ticket, args, kwargs)
        return work.own_answer(self._do(work, args, kwargs))

    def _do(self, work: Work, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Done:
        def body(flight: Flight) -> Outcome:
            return _came_to(flight, self.memo.task, lambda: finished(self.function(*args, **kwargs)))

        return work.do(body)

    async def arun_here(self, ticket: Ticket | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Do what `run_here` does, in the running loop; a plain function runs in a thread."""
        if ticket is None:
            with grounded():
                return await self._call(args, kwargs)
        work = self._work(ticket, args, kwargs)
        return work.own_answer(await self._ado(work, args, kwargs))

    async def _ado(self, work: Work, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Done:
        async def body(flight: Flight) -> Outcome:
            # A task of its own: only so is a cancellation of the run told from one within the function's code.
            called = asyncio.ensure_future(self._call(args, kwargs, to_the_end=True))
            interrupted: BaseException | None = None
            while not called.done():
                try:
                    await asyncio.wait([called])
                except asyncio.CancelledError as error:
                    interrupted = error
                    work.ending = True
                    called.cancel()
            if interrupted is not None and called.cancelled():
                return Interrupted(interrupted)
            return _came_to(flight, self.memo.task, called.result)

        return await work.ado(body)

    async def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, to_the_end: bool = False) -> Any:
        """Call the function; with `to_the_end` a cancellation waits for one that runs in a thread."""
        if self.starts_loop(args):
            result = self.function(*args, **kwargs)
        else:
            run = run_to_its_end if to_the_end else run_in_thread
            result = await run(partial(self.function, *args, **kwargs))
        return await result if inspect.isawaitable(result) else result

    def _work(self, ticket: Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Work:
        engine: Any = self  # whoever inherits is the whole of one
        return Work(engine, self.memo, ticket, args, kwargs, self.holder)


def _came_to(flight: Flight, task: str, result: Callable[[], Any]) -> Outcome:
    """Return what a function's own code came to."""
    try:
        return flight.outcome(result())
    except asyncio.CancelledError as error:
        # Raised in those who wait it would end them. Nobody cancelled them, nor is it better when they try in turn.
        failure = FlightFailed(f"what computes task {task!r} was cancelled from within")
        failure.__cause__ = error
        return Raised(failure)
    except Exception as error:
        return Raised(error)
    except BaseException as error:
        return Interrupted(error)


def finished(result: Any) -> Any:
    """Return a function's result, of a coroutine function what it comes to in a loop of its own.

    Raises:
        ConfigurationError: a loop runs in this thread, and may be what the coroutine would wait for.
    """
    if not inspect.isawaitable(result):
        return result
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_awaited(result))
    if inspect.iscoroutine(result):
        result.close()
    raise ConfigurationError(
        "a coroutine function was to be run by a blocking call in a thread whose event loop is running: await the "
        "method with an a in front instead"
    )


async def _awaited(result: Awaitable[T]) -> T:
    return await result


class _Engine(InlineRuns):
    """Runs the flights of one function in the processes of its callers."""

    def __init__(self, server: _Server, function: Callable[..., Any], starts_loop: Callable[..., bool]) -> None:
        self._server = server
        self.function = function
        self.starts_loop = starts_loop

    @property
    def store(self) -> Store:
        """The server that the `MemoLock` names."""
        return self._server.store

    @property
    def eager(self) -> bool:
        """Whether the `MemoLock` may do without a server."""
        return self._server.eager

    @property
    def in_worker(self) -> bool:
        """Each caller is its own worker."""
        return True

    @property
    def ends_with_job(self) -> bool:
        """What runs beside its caller is waited for where that can be."""
        return False

    @property
    def travels(self) -> bool:
        """Nothing is sent anywhere."""
        return False

    def attendance(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """There are no workers."""

    def send(self, ticket: Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float) -> None:
        """Run a flight in another thread of this process."""
        flight = _Beside(self, ticket, args, kwargs)
        self._server.asides.do(flight.run, flight.hand_over)

    async def asend(self, ticket: Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float) -> None:
        """Run a flight beside its caller in the running loop."""
        flight = _Beside(self, ticket, args, kwargs)
        in_loops, running = self._server.in_loops, beside(flight.arun())
        in_loops[running] = flight
        running.add_done_callback(in_loops.pop)


class _Beside:
    """A flight that runs beside its caller. Where it has to wait for the end of other runs it comes again."""

    def __init__(self, engine: _Engine, ticket: Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._engine = engine
        self._arguments = args, kwargs
        self._new_work: Callable[[], Work] = lambda: engine._work(ticket, args, kwargs)
        self._work = self._new_work()
        self._over = False

    def run(self) -> None:
        """Run it in this thread, to its end."""
        try:
            while isinstance(done := self._engine._do(self._work, *self._arguments), Defer):
                time.sleep(done.delay)
                if self._over:
                    return
                self._work = self._new_work()
        except Exception as error:
            log_failure(error)

    async def arun(self) -> None:
        """Run it in the running loop, to its end."""
        while isinstance(done := await self._engine._ado(self._work, *self._arguments), Defer):
            await asyncio.sleep(done.delay)
            if self._over:
                return
            self._work = self._new_work()

    def hand_over(self) -> None:
        """Let another process begin it anew."""
        self._over = True
        self._work.hand_over()


class _Server:
    """Where a `MemoLock` keeps its values."""

    _stores: Final = Stores()

    def __init__(self, given: str | Redis | None, prefix: str, eager: bool) -> None:
        self._given = given
        self._prefix = prefix
        self.eager = eager
        self.asides = Asides()
        self.in_loops: dict[asyncio.Future[Any], _Beside] = {}

    @property
    def store(self) -> Store:
        return self._stores.of(self, _Server._make)

    def close(self) -> None:
        try:
            self.asides.end(LAST)
        finally:
            self._stores.drop(self)

    async def aclose(self) -> None:
        try:
            loop = asyncio.get_running_loop()
            here = {running: flight for running, flight in list(self.in_loops.items()) if running.get_loop() is loop}
            if here:
                _, left = await asyncio.wait(here, timeout=LAST)
                for running in left:
                    await in_thread(here[running].hand_over)
        except StoreUnavailable as error:
            log_failure(error)
        finally:
            await in_thread(self.close)

    def _make(self) -> Store:
        client = client_of(self._given, "redis of MemoLock") if self._given else client_in_environment()
        if client is None:
            raise ConfigurationError(
                "memolock has no Redis: MemoLock takes a URL or a redis.Redis, or the environment variable "
                "MEMOLOCK_REDIS_URL names one; MemoLock(eager=True) does without"
            )
        return Store(client, self._prefix)


# ---- values by their key ---------------------------------------------------------------------------------------


class Client(Generic[K, T]):
    """Values of one kind, each under a key that the caller names and computed by what the caller passes.

    Made by `MemoLock.client`. Its methods take the options of `Options` for one call, as keywords, but for those that
    shape the key or the stored form, which belong to the client. Each has a twin with an ``a`` in front for asyncio.
    """

    def __init__(
        self,
        server: _Server,
        name: str,
        key: Callable[[K], str] | None,
        of: Any,
        given: Mapping[str, Any],
        defaults: Mapping[str, Any],
    ) -> None:
        merged = {**defaults, **given}
        for option in ("ignore", "typed"):
            if option in merged:
                raise OptionError(f"memolock option {option} has no meaning for values that have a key of their own")
        self._server = server
        self._name = name
        self._has_ttl = "ttl" in merged
        self._defaults = merged
        tags = merged.get("tags", ())
        shaped: dict[str, Any] = {"key": _first("key", key or _as_it_is)}
        if callable(tags):
            shaped["tags"] = _first("tags", tags)
        shape = Shape(name, of) if of else None
        self._memo: Memo[Any, T] = _memo(
            server, name, _compute, {**given, **shaped}, {"ttl": 1, **defaults}, _fetches_async, shape
        )
        self._with = remembered(self._override)

    def get(self, key: K, fetch: Callable[[], T | Awaitable[T]], **options: Any) -> T:
        """Return the value, or have it computed, by this caller or by the one that began to, in whichever process.

        Args:
            key: what names it.
            fetch: computes it, in this thread, if this caller is the one; the flight's lease is renewed meanwhile, and
                `wait_timeout` does not count. A coroutine function is run in a loop of its own.
            options: for this call, such as ``ttl=5``.

        Raises:
            ArgumentError: the key is none.
            OptionError: an option is unknown, or `ttl` is nowhere given.
            WaitTimeout: somebody else computes it, for longer than `wait_timeout`.
            StoreUnavailable: Redis cannot be reached.
            ReentrantFlight: called by the very `fetch` that computes this key.
            Exception: what `fetch` raised. Who waits gets it as well, of its own type where that is safe, else a
                `TaskFailed`.
        """
        memo = self._for(options)
        kept = memo.kept((key, fetch), {})
        return memo.run(memo.fetch((key, fetch), {})) if kept is MISSING else kept  # type: ignore[no-any-return]

    async def aget(self, key: K, fetch: Callable[[], T | Awaitable[T]], **options: Any) -> T:
        """Do what `get` does, from asyncio: a coroutine function is run in this loop, a plain one in a thread.

        A coroutine that a plain one returns is awaited in this loop. What asks for the running loop when it is called,
        as `asyncio.gather` and `asyncio.create_task` do, belongs in a coroutine function: no loop runs in the thread.

        To cancel it concerns no other caller: the fetch that it began goes on. So it does after `wait_timeout`.
        """
        memo = self._for(options)
        kept = memo.kept((key, fetch), {})
        return await memo.arun(memo.fetch((key, fetch), {})) if kept is MISSING else kept

    def get_entry(self, key: K, fetch: Callable[[], T | Awaitable[T]], **options: Any) -> CachedEntry[T]:
        """Do what `get` does, and tell how fresh the value is and where it comes from."""
        memo = self._for(options)
        found: CachedEntry[T] = memo.run(memo.fetch((key, fetch), {}, described=True))
        return found

    async def aget_entry(self, key: K, fetch: Callable[[], T | Awaitable[T]], **options: Any) -> CachedEntry[T]:
        """Do what `get_entry` does, from asyncio."""
        memo = self._for(options)
        found: CachedEntry[T] = await memo.arun(memo.fetch((key, fetch), {}, described=True))
        return found

    def afollow(self, key: K, fetch: Callable[[], T | Awaitable[T]], **options: Any) -> AsyncIterator[Progress]:
        """Iterate over what the fetch reports, as `current_flight.progress`, until the value is there.

        Where it is there already there is nothing to iterate over. Joins or starts the fetch, as `aget` does.

        Raises:
            Exception: as `aget` does, at the end.
        """
        return self._for(options).follow((key, fetch), {})

    @overload
    def get_many(
        self,
        keys: Iterable[K],
        fetch: Callable[[K], T | Awaitable[T]],
        *,
        return_exceptions: Literal[False] = False,
        **options: Any,
    ) -> list[T]: ...

    @overload
    def get_many(
        self,
        keys: Iterable[K],
        fetch: Callable[[K], T | Awaitable[T]],
        *,
        return_exceptions: Literal[True],
        **options: Any,
    ) -> list[T | Exception]: ...

    def get_many(
        self,
        keys: Iterable[K],
        fetch: Callable[[K], T | Awaitable[T]],
        *,
        return_exceptions: bool = False,
        **options: Any,
    ) -> Any:
        """Return several values: one trip for all that are stored; what is missing is computed one after the other.

        Args:
            keys: what names them.
            fetch: computes one, of its key.
            return_exceptions: put an error in its key's place instead of raising the first.
            options: for this call.

        Returns:
            A list in the order of the keys.

        Raises:
            Exception: what `get` raises for the first key that fails.
        """
        memo = self._for(options)
        return memo.run(memo.fetch_many([(key, partial(fetch, key)) for key in keys], return_exceptions, blocking=True))

    @overload
    async def aget_many(
        self,
        keys: Iterable[K],
        fetch: Callable[[K], T | Awaitable[T]],
        *,
        return_exceptions: Literal[False] = False,
        **options: Any,
    ) -> list[T]: ...

    @overload
    async def aget_many(
        self,
        keys: Iterable[K],
        fetch: Callable[[K], T | Awaitable[T]],
        *,
        return_exceptions: Literal[True],
        **options: Any,
    ) -> list[T | Exception]: ...

    async def aget_many(
        self,
        keys: Iterable[K],
        fetch: Callable[[K], T | Awaitable[T]],
        *,
        return_exceptions: bool = False,
        **options: Any,
    ) -> Any:
        """Do what `get_many` does, from asyncio, but compute what is missing at the same time.

        Coroutine functions all run at once, plain ones in as many threads of the process as `aget` has for them: 32.
        """
        memo = self._for(options)
        return await memo.arun(memo.fetch_many([(key, partial(fetch, key)) for key in keys], return_exceptions))

    def peek(self, key: K) -> T | Missing:
        """Return the value if it is stored, else `MISS`, without computing or waiting."""
        return self._memo.run(self._memo.peek((key,), {}))

    async def apeek(self, key: K) -> T | Missing:
        """Do what `peek` does, from asyncio."""
        return await self._memo.arun(self._memo.peek((key,), {}))

    def refresh(self, key: K, fetch: Callable[[], T | Awaitable[T]], **options: Any) -> bool:
        """Have the value computed anew in the background of this process. The old one is served until then.

        Returns:
            True if this call began to, False if it joined what is under way.
        """
        memo = self._for(options).override(_BESIDE)
        return memo.run(memo.refresh((key, fetch), {}))

    async def arefresh(self, key: K, fetch: Callable[[], T | Awaitable[T]], **options: Any) -> bool:
        """Do what `refresh` does, from asyncio."""
        memo = self._for(options).override(_BESIDE)
        return await memo.arun(memo.refresh((key, fetch), {}))

    def set(self, key: K, value: T, **options: Any) -> None:
        """Store a value. Whoever waits gets it; what is being computed meanwhile is refused."""
        memo = self._for(options)
        memo.run(memo.put(value, (key,), {}))

    async def aset(self, key: K, value: T, **options: Any) -> None:
        """Do what `set` does, from asyncio."""
        memo = self._for(options)
        await memo.arun(memo.put(value, (key,), {}))

    def set_many(
        self, values: Iterable[tuple[K, T]], *, return_exceptions: bool = False, **options: Any
    ) -> list[Exception | None]:
        """Do what `set` does for several keys, in one trip.

        Args:
            values: each key and its value, such as a dict's ``items()``.
            return_exceptions: put an error in its key's place instead of raising the first; the others are done.
            options: for this call.

        Returns:
            None for each value that was stored, in the order of the keys.
        """
        memo = self._for(options)
        return memo.run(memo.put_many([((key,), value) for key, value in values], return_exceptions))

    async def aset_many(
        self, values: Iterable[tuple[K, T]], *, return_exceptions: bool = False, **options: Any
    ) -> list[Exception | None]:
        """Do what `set_many` does, from asyncio."""
        memo = self._for(options)
        return await memo.arun(memo.put_many([((key,), value) for key, value in values], return_exceptions))

    def invalidate(self, key: K) -> bool:
        """Drop the value: no later call sees it, nor one that is being computed from older data right now.

        Returns:
            Whether a value was stored.
        """
        return self._memo.run(self._memo.invalidate((key,), {}))

    async def ainvalidate(self, key: K) -> bool:
        """Do what `invalidate` does, from asyncio."""
        return await self._memo.arun(self._memo.invalidate((key,), {}))

    @overload
    def invalidate_many(self, keys: Iterable[K], *, return_exceptions: Literal[False] = False) -> list[bool]: ...

    @overload
    def invalidate_many(self, keys: Iterable[K], *, return_exceptions: Literal[True]) -> list[bool | Exception]: ...

    def invalidate_many(self, keys: Iterable[K], *, return_exceptions: bool = False) -> Any:
        """Do what `invalidate` does for several keys, in one trip.

        Args:
            keys: what names the values.
            return_exceptions: put an error in its key's place instead of raising the first; the others are done.

        Returns:
            Whether a value was stored, in the order of the keys.
        """
        return self._memo.run(self._memo.invalidate_many([(key,) for key in keys], return_exceptions))

    @overload
    async def ainvalidate_many(self, keys: Iterable[K], *, return_exceptions: Literal[False] = False) -> list[bool]: ...

    @overload
    async def ainvalidate_many(
        self, keys: Iterable[K], *, return_exceptions: Literal[True]
    ) -> list[bool | Exception]: ...

    async def ainvalidate_many(self, keys: Iterable[K], *, return_exceptions: bool = False) -> Any:
        """Do what `invalidate_many` does, from asyncio."""
        return await self._memo.arun(self._memo.invalidate_many([(key,) for key in keys], return_exceptions))

    def expire(self, key: K, **options: Any) -> bool:
        """Let the value be stale from now on: the next call has it refreshed, and gets it as `stale_ttl` allows.

        Returns:
            Whether a value was stored.
        """
        memo = self._for(options, computes=False)
        return memo.run(memo.expire((key,), {}))

    async def aexpire(self, key: K, **options: Any) -> bool:
        """Do what `expire` does, from asyncio."""
        memo = self._for(options, computes=False)
        return await memo.arun(memo.expire((key,), {}))

    def invalidate_all(self, *, on_progress: Callable[[int], None] | None = None) -> int:
        """Invalidate all values of this client; see `CallerMethods.invalidate_all`.

        Args:
            on_progress: is called with the number of values dropped so far, after each batch.

        Returns:
            How many values were dropped.
        """
        return self._memo.run(self._memo.invalidate_all(on_progress))

    async def ainvalidate_all(self, *, on_progress: Callable[[int], None] | None = None) -> int:
        """Do what `invalidate_all` does, from asyncio."""
        return await self._memo.arun(self._memo.invalidate_all(on_progress))

    def invalidate_tag(self, tag: str, *, on_progress: Callable[[int], None] | None = None) -> int:
        """Invalidate whatever bears a tag, here and wherever else it is used on this server.

        Args:
            tag: as the option `tags` names it.
            on_progress: is called with the number of values dropped so far, after each batch.

        Returns:
            How many values were dropped.
        """
        return self._memo.run(self._memo.invalidate_tag(tag, on_progress))

    async def ainvalidate_tag(self, tag: str, *, on_progress: Callable[[int], None] | None = None) -> int:
        """Do what `invalidate_tag` does, from asyncio."""
        return await self._memo.arun(self._memo.invalidate_tag(tag, on_progress))

    def _for(self, options: Mapping[str, Any], *, computes: bool = True) -> Memo[Any, T]:
        memo = self._with(**options) if options else self._memo
        if computes and not self._has_ttl and "ttl" not in options:
            raise OptionError(
                f"memolock option ttl is missing: say for how many seconds a value of {self._name!r} may be served, "
                f"here or where its MemoLock or client is made"
            )
        return memo

    def _override(self, **overrides: Any) -> Memo[Any, T]:
        _refuse_messages(overrides)
        if callable(overrides.get("tags")):
            overrides["tags"] = _first("tags", overrides["tags"])
        return self._memo.override(overrides)


class MemoLock(Client[str, Any]):
    """A cache whose callers, in any process, wait for the one among them that computes what is missing.

    It needs a Redis or Valkey server, and neither a queue nor a worker.

    Args:
        redis: a URL, or a `redis.Redis` whose connection settings are taken over. Default: the environment variable
            MEMOLOCK_REDIS_URL.
        name: what the keys of this object's own values begin with, after the prefix. Default "memo".
        eager: do without a server where none is named or it is away: all is computed in the caller. For tests.
        defaults: the fields of `Options`, for all that is made with this object, over what the environment says.

    Raises:
        OptionError: an option is unknown, or has a value that makes no sense.
        ConfigurationError: `redis` is something else, such as a client for asyncio. One of the plain kind serves both.
    """

    def __init__(
        self, redis: str | Redis | None = None, *, name: str = "memo", eager: bool = False, **defaults: Any
    ) -> None:
        if not isinstance(redis, str | Redis | None):
            raise ConfigurationError(
                f"MemoLock takes a URL or a redis.Redis, not a {type(redis).__module__}.{type(redis).__qualname__}"
            )
        defaults = {**environment.defaults(without=("typed", *_OF_MESSAGES)), **defaults}
        server = _Server(redis, defaults.get("prefix", "memolock"), eager)
        super().__init__(server, name, None, None, {}, defaults)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def close(self) -> None:
        """Close the connections and end the threads of this object. It makes new ones if it is used again.

        What is computed in the background of this process is waited for, at most five seconds, and after that is left
        to whoever asks next, in whichever process. So it is at the normal end of the interpreter.

        Calls that wait for a value get `StoreUnavailable`. What they compute is not interrupted: its value is stored,
        but for a run that lasts on for longer than its lease, as that is renewed no more.
        """
        self._server.close()

    async def aclose(self) -> None:
        """Do what `close` does, from asyncio."""
        await self._server.aclose()

    @overload
    def client(self, name: str, *, key: Callable[[K], str], of: type[V], **options: Any) -> Client[K, V]: ...

    @overload
    def client(self, name: str, *, key: Callable[[K], str], of: None = None, **options: Any) -> Client[K, Any]: ...

    @overload
    def client(self, name: str, *, key: None = None, of: type[V], **options: Any) -> Client[str, V]: ...

    @overload
    def client(self, name: str, *, key: None = None, of: None = None, **options: Any) -> Client[str, Any]: ...

    def client(self, name: str, *, key: Any = None, of: Any = None, **options: Any) -> Any:
        """Return a client for values of one kind, with a way to make keys, a stored form and defaults of its own.

        Args:
            name: what its keys begin with, after the prefix.
            key: makes the key as text of what a caller names a value with. Default: that is text already.
            of: the type of the values, such as a pydantic model, a dataclass or an attrs class. Default: plain data.
            options: over the defaults of this object.

        Raises:
            OptionError: as for `MemoLock`.
        """
        return Client(self._server, name, key, of, options, self._defaults)

    def memoize(self, misplaced: None = None, /, *, name: str | None = None, **options: Any) -> _Decorate:
        """Make a function whose result is cached, and computed once for all who call it with the same arguments.

        To call it is `get_cached`, or of a coroutine function `aget_cached`; it has all of `CallerMethods` beside.
        A method's object is an argument like others: leave it out of the key with ``ignore=("self",)``, or say with
        `key` what of it counts. The decorators staticmethod and classmethod go above this one; from Python 3.13 on the
        methods of `CallerMethods` of a class method take the class as their first argument.

        Args:
            name: what its keys begin with, after the prefix. Default: its module and qualified name.
            options: fields of `Options`, over the defaults of this object.

        Raises:
            OptionError: an option is unknown, has a value that makes no sense, or `ttl` is nowhere given.
        """
        if misplaced is not None:
            raise OptionError("write @memo.memoize(ttl=5), with all options by name")

        def decorate(function: Any, /) -> Any:
            if isinstance(function, staticmethod | classmethod):
                raise OptionError(f"memoize goes below {type(function).__name__}, which is to decorate what it makes")
            if name is None and not hasattr(function, "__qualname__"):
                raise OptionError(
                    f"memoize(name=...) is missing: a {type(function).__qualname__} has no name of its own"
                )
            named = name or f"{function.__module__}.{function.__qualname__}"
            memo: Memo[Any, Any] = _memo(
                self._server, named, function, options, self._defaults, lambda _: is_async(function)
            )
            return (AsyncMemoized if is_async(function) else Memoized)(function, memo)

        return decorate


class _Decorate(Protocol):
    """What `memoize` returns."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a coroutine function is a function, too
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncMemoized[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R], /) -> Memoized[P, R]: ...


class _BoundMemo(Memo[Any, Any]):
    """The memo of a method, with what it is bound to."""

    def __init__(self, memo: Memo[Any, Any], instance: object) -> None:
        vars(self).update(vars(memo))
        self._of_class = memo
        self.instance = instance

    def override(self, overrides: Mapping[str, Any]) -> Memo[Any, Any]:
        return _BoundMemo(self._of_class.override(overrides), self.instance)

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], described: bool = False) -> Call:
        return self._of_class.call((self.instance, *args), kwargs, described)

    def kept(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self._of_class.kept((self.instance, *args), kwargs)


class _Memoized(CallerMethods[P, R]):
    __wrapped__: Callable[..., Any]

    def __init__(self, function: Callable[P, Any], memo: Memo[P, R]) -> None:
        wrapper: Any = self
        functools.update_wrapper(wrapper, function)
        self._memo = memo

    @property
    def memo(self) -> Memo[P, R]:
        """What the methods work on."""
        return self._memo

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Be a method of a class as a function is one: what it is bound to is the first argument of each call."""
        return self if instance is None else type(self)(self.__wrapped__, _BoundMemo(self._memo, instance))

    def __reduce__(self) -> Any:
        """Be pickled as functions are: by its name, as a method with what it is bound to."""
        if isinstance(self._memo, _BoundMemo):
            return getattr, (self._memo.instance, self.__wrapped__.__name__)
        return self.__wrapped__.__qualname__


class Memoized(_Memoized[P, R]):
    """A function whose results are cached; see `MemoLock.memoize`.

    Attributes:
        __wrapped__: the function itself, which computes each time.
    """

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the cached result, or compute it, or wait for whoever does; see `get_cached`."""
        return self.get_cached(*args, **kwargs)


class AsyncMemoized(_Memoized[P, R]):
    """A coroutine function whose results are cached; see `MemoLock.memoize`.

    Attributes:
        __wrapped__: the function itself, which computes each time.
    """

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the cached result, or compute it, or wait for whoever does; see `aget_cached`."""
        return await self.aget_cached(*args, **kwargs)


# ---- how they are made -----------------------------------------------------------------------------------------


def _memo(
    server: _Server,
    name: str,
    function: Callable[..., Any],
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    starts_loop: Callable[[tuple[Any, ...]], bool],
    shape: Shape | None = None,
) -> Memo[Any, Any]:
    _refuse_messages({**defaults, **given})
    options = Options.build(given, defaults)
    if options.typed:
        shape = Shape.of(name, function)
    engine = _Engine(server, function, starts_loop)
    maker = KeyMaker(name, function, options)
    engine.memo = Memo(name, engine, options, maker, Codec(name, options, shape))
    return engine.memo


def _refuse_messages(given: Mapping[str, Any]) -> None:
    for name in _OF_MESSAGES:
        if name in given:
            raise OptionError(f"memolock option {name} is for queues, and here nothing is sent to one")


def _compute(key: Any, fetch: Callable[[], Any] | None = None) -> Any:
    assert fetch is not None
    return fetch()


def _fetches_async(args: tuple[Any, ...]) -> bool:
    fetch = args[1]
    return is_async(fetch.func if isinstance(fetch, partial) else fetch)


def _first(option: str, function: Callable[[Any], Any]) -> Callable[..., Any]:
    """Make an option's function of a key one of all that `_compute` takes."""
    refuse_async(option, function)
    return lambda key, fetch=None: function(key)


def _as_it_is(key: Any) -> Any:
    return key
