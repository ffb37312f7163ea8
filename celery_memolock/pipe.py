"""The data connection of one event loop to one server: the commands of all its callers travel over it at once."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

import hiredis
import redis
from redis.asyncio import connection as asynchronous
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError

from .connections import Packed
from .errors import ConfigurationError

__all__ = ["Pipe", "orphans", "retrieve"]

T = TypeVar("T")

#: The asyncio twin of each of the client's connections.
_TWINS: Final[dict[type, type]] = {
    redis.UnixDomainSocketConnection: asynchronous.UnixDomainSocketConnection,
    redis.SSLConnection: asynchronous.SSLConnection,
    redis.Connection: asynchronous.Connection,
}

#: Of two connections with different classes these settings mean different things, or nothing.
_OWN: Final = frozenset(["retry", "retry_on_error", "retry_on_timeout", "parser_class", "event_dispatcher"])

_NOT_YET: Final = object()


class Pipe:
    """One connection; replies come in the order of the commands.

    Args:
        pool: the thread client's, for the class and the settings of its connections.
        pack: makes the bytes of a command.
    """

    def __init__(self, pool: Any, pack: Callable[..., Packed]) -> None:
        self._pack = pack
        kind = next(twin for sync, twin in _TWINS.items() if issubclass(pool.connection_class, sync))
        known: set[str] = set()
        for base in kind.__mro__:
            known |= set(inspect.signature(base.__init__).parameters)  # type: ignore[misc]
        settings = {
            name: value
            for name, value in pool.connection_kwargs.items()
            if name in known - _OWN and not name.startswith(("maint", "orig_", "oss_", "himport"))
        }
        for name, value in pool.connection_kwargs.items():
            if name.startswith("ssl_") and value and name not in known:  # to leave it out would be less safe
                raise ConfigurationError(f"the client library knows {name} for threads alone, not for asyncio")
        self._timeout: float = settings.pop("socket_timeout")
        self._settings = {**settings, "retry": Retry(NoBackoff(), 0), "socket_timeout": self._timeout}
        self._kind = kind
        self._under_way: set[str] = set()
        self._due: dict[str, list[asyncio.Future[Any]]] = {}
        self._link: _Link | None = None
        self._connecting: asyncio.Task[_Link] | None = None
        self._closed = False

    async def ask(self, packed: Packed, replies: int, patience: float | None = None) -> list[Any]:
        """Send commands, and return their replies; see `Connections.ask`, which does the same for threads.

        Raises:
            redis.TimeoutError, redis.ConnectionError, OSError: the server did not answer.
        """
        if patience is None:
            patience = math.inf
        link = self._link
        if link is None or not link.alive:
            link = await self._connect(patience)
        try:
            return await link.ask(packed, replies, patience)
        except redis.ConnectionError:
            pass  # it was closed, or the reply lost: a command may be run twice, so once more
        link = await self._connect(patience)
        return await link.ask(packed, replies, patience)

    async def get(self, key: str, patience: float) -> Any:
        """GET a key; of each one at most one GET is under way and one is due, however many ask.

        Whoever comes while one is under way waits for the next: the answer to a command that was sent before a call
        began could be older than an invalidation that its caller knows of.

        Raises:
            redis.TimeoutError, redis.ConnectionError, OSError, redis.ResponseError: as `ask` does, or finds.
        """
        if key in self._under_way:
            return await self._share(key, patience)
        self._under_way.add(key)
        try:
            (answer,) = await self.ask(self._pack("GET", key), 1, patience)
        finally:
            others = self._next(key)
        if others:
            await asyncio.sleep(0)  # theirs goes first: on a miss, one look is then for them, too
        return answer

    async def _share(self, key: str, patience: float) -> Any:
        loop = asyncio.get_running_loop()
        shared: asyncio.Future[Any] = loop.create_future()
        self._due.setdefault(key, []).append(shared)
        timer = loop.call_later(patience, _late, shared)
        try:
            return await shared
        finally:
            timer.cancel()

    def _next(self, key: str) -> bool:
        due = self._due.pop(key, None)
        if due is None:
            self._under_way.discard(key)
            return False
        asyncio.get_running_loop().create_task(self._get_for(key, due))
        return True

    async def _get_for(self, key: str, callers: list[asyncio.Future[Any]]) -> None:
        error: Exception | None = None
        answer: Any = None
        try:
            (answer,) = await self.ask(self._pack("GET", key), 1)
        except (redis.RedisError, OSError) as failed:
            error = failed
        finally:
            self._next(key)
        for caller in callers:
            if caller.done():
                continue
            if error is None:
                caller.set_result(answer)
            else:
                caller.set_exception(type(error)(*error.args))  # one for each: they would share its traceback

    def close(self) -> None:
        """Close the connection, for good. Call it in the loop's own thread, unless the loop is closed."""
        self._closed = True
        if self._link is not None:
            self._link.fail(redis.ConnectionError("the connection was closed"))

    async def _connect(self, patience: float) -> _Link:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(patience, self._timeout)
        while not self._closed:
            if self._link is not None and self._link.alive:
                return self._link
            begun = self._connecting
            if begun is None or begun.done():
                begun = None
                self._connecting = loop.create_task(self._open())
                self._connecting.add_done_callback(retrieve)
            # Others may wait for the same connection, with more patience.
            connecting = self._connecting
            assert connecting is not None
            await asyncio.wait([connecting], timeout=deadline - loop.time())
            if not connecting.done():
                raise redis.TimeoutError("the connection was not made in time")
            if begun is None or connecting.exception() is None:
                return connecting.result()
            # What somebody else had begun failed; that may have been long ago.
        raise redis.ConnectionError("the connection was closed")

    async def _open(self) -> _Link:
        connection: Any = self._kind(**self._settings)
        try:
            await connection.connect()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._link = _Link(connection, self._timeout)
        if self._closed:
            self.close()
        return self._link


def orphans(known: WeakKeyDictionary[asyncio.AbstractEventLoop, T]) -> list[T]:
    """Take out what loops have left that are closed. It may refer to its loop, and then would keep it for ever."""
    closed = [loop for each in known.keyrefs() if (loop := each()) is not None and loop.is_closed()]
    return [left for loop in closed if (left := known.pop(loop, None)) is not None]


def _late(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(redis.TimeoutError("no reply in time"))


def retrieve(task: asyncio.Future[Any]) -> None:
    """All who waited may have gone: nobody has to be told that its error was never asked for."""
    if not task.cancelled():
        task.exception()


class _Asked:
    """Commands on their way: what is still to come, who waits for it, since when and until when."""

    __slots__ = ("answers", "future", "replies", "since", "timer", "until")

    timer: asyncio.TimerHandle

    def __init__(self, replies: int, future: asyncio.Future[list[Any]], since: float, until: float) -> None:
        self.answers: list[Any] = []
        self.replies = replies
        self.future = future
        self.since = since
        self.until = until


class _Link(asyncio.Protocol):
    """An open connection. It parses what arrives at once, in the loop's callback: no task stands between.

    It is given up when replies are due and not a byte has come for `timeout` seconds. A large reply may take longer.
    """

    def __init__(self, connection: Any, timeout: float) -> None:
        self.alive = True
        self._heard = 0.0
        self._connection = connection
        self._timeout = timeout
        self._asked: deque[_Asked] = deque()
        self._replies = hiredis.Reader(notEnoughData=_NOT_YET)
        self._loop = asyncio.get_running_loop()
        # The client library has connected, logged in and chosen the database; from here on the socket is ours.
        self._transport: asyncio.WriteTransport = connection._writer.transport
        self._transport.set_protocol(self)
        # Nothing else would close the connection when `asyncio.run` ends.
        self._keeper = self._loop.create_task(self._keep())
        # Some close a loop without ending its tasks.
        self._keeper._log_destroy_pending = False  # type: ignore[attr-defined]

    async def ask(self, packed: Packed, replies: int, patience: float) -> list[Any]:
        if not self.alive:
            raise redis.ConnectionError("the connection was lost")
        now = self._loop.time()
        if self._asked and now >= self._given_up_at():  # who waited so long was cancelled, and nobody has noticed
            self.fail(redis.TimeoutError("no reply in time"))
            raise redis.ConnectionError("the connection was lost")
        asked = _Asked(replies, self._loop.create_future(), now, now + patience)
        self._asked.append(asked)
        self._transport.write(packed[0] if len(packed) == 1 else b"".join(packed))
        asked.timer = self._loop.call_at(now + min(patience, self._timeout), self._check, asked)
        try:
            return await asked.future
        finally:
            asked.timer.cancel()

    def fail(self, error: Exception) -> None:
        """Give up the connection; whoever waits for a reply gets the error."""
        self.alive = False
        closed = self._loop.is_closed()
        if closed:
            self._close_socket()
        else:
            self._keeper.cancel()
            self._transport.abort()  # what was not sent must not be: whoever asked for it has been told that it failed
        self._connection._writer = self._connection._reader = None  # or it would complain that it was not closed
        while self._asked and not closed:
            future = self._asked.popleft().future
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may be left to ask for it

    def _close_socket(self) -> None:
        """Close the connection of a closed loop, which calls nothing any more: nobody can be told."""
        with contextlib.suppress(RuntimeError):  # it would call the loop
            self._transport.abort()
        raw = getattr(self._transport.get_extra_info("socket"), "_sock", None)  # uvloop has closed it
        if raw is not None:
            raw.close()

    # ---- what the loop calls. Not `pause_writing`: whoever has written waits for the reply, and only for so long.

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        self._replies.feed(data)
        try:
            while (answer := self._replies.gets()) is not _NOT_YET:
                self._take(answer)
        except hiredis.ProtocolError as error:
            self.fail(redis.ConnectionError(f"the server's answer makes no sense: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(redis.ConnectionError(f"the connection was lost: {exc or 'closed by the server'}"))

    def _take(self, answer: Any) -> None:
        if not self._asked or isinstance(answer, hiredis.PushNotification):
            return
        asked = self._asked[0]
        asked.answers.append(_refusal(answer) if isinstance(answer, hiredis.ReplyError) else answer)
        if len(asked.answers) == asked.replies:
            self._asked.popleft()
            if not asked.future.done():
                asked.future.set_result(asked.answers)

    def _check(self, asked: _Asked) -> None:
        if asked.future.done():
            return
        now, enough = self._loop.time(), self._given_up_at()
        if now >= enough:
            self.fail(redis.TimeoutError("no reply in time"))
        elif now >= asked.until:
            _late(asked.future)
        else:
            asked.timer = self._loop.call_at(min(enough, asked.until), self._check, asked)

    def _given_up_at(self) -> float:
        # Replies come in order, so the first to wait tells how long the server has been silent.
        return max(self._heard, self._asked[0].since) + self._timeout

    async def _keep(self) -> None:
        try:
            await self._loop.create_future()
        finally:
            self.fail(redis.ConnectionError("the connection was closed"))


def _refusal(answer: Exception) -> redis.ResponseError:
    """Return the client library's exception for a server's error."""
    text = str(answer)
    return NoScriptError(text) if text.startswith("NOSCRIPT") else redis.ResponseError(text)
