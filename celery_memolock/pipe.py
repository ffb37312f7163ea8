"""The data connection of one event loop to one server: the commands of all its callers travel over it at once."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from typing import Any, Final

import redis
from redis.asyncio import connection as asynchronous
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from .connections import Packed

__all__ = ["Pipe"]

#: The asyncio twin of each of the client's connections.
_TWINS: Final[dict[type, type]] = {
    redis.UnixDomainSocketConnection: asynchronous.UnixDomainSocketConnection,
    redis.SSLConnection: asynchronous.SSLConnection,
    redis.Connection: asynchronous.Connection,
}

#: Of two connections with different classes these settings mean different things, or nothing.
_OWN: Final = frozenset(["retry", "retry_on_error", "retry_on_timeout", "parser_class", "event_dispatcher"])

#: Bytes that may wait to be sent before whoever adds to them has to wait as well.
_MUCH: Final = 1 << 20


class Pipe:
    """One connection; replies come in the order of the commands.

    Args:
        pool: the thread client's, for the class and the settings of its connections.
    """

    def __init__(self, pool: Any) -> None:
        kind = next(twin for sync, twin in _TWINS.items() if issubclass(pool.connection_class, sync))
        known: set[str] = set()
        for base in kind.__mro__:
            known |= set(inspect.signature(base.__init__).parameters)  # type: ignore[misc]
        settings = {
            name: value
            for name, value in pool.connection_kwargs.items()
            if name in known - _OWN and not name.startswith(("maint", "orig_", "oss_", "himport"))
        }
        self._timeout: float = settings.pop("socket_timeout")
        self._settings = {**settings, "retry": Retry(NoBackoff(), 0), "socket_timeout": self._timeout}
        self._kind = kind
        self._link: _Link | None = None
        self._connecting: asyncio.Task[_Link] | None = None

    async def ask(self, packed: Packed, replies: int, patience: float | None = None) -> list[Any]:
        """Send commands, and return their replies; see `Connections.ask`, which does the same for threads.

        Raises:
            redis.TimeoutError, redis.ConnectionError, OSError: the server did not answer.
        """
        patience = self._timeout if patience is None else min(patience, self._timeout)
        link = self._link
        if link is not None and link.alive:
            try:
                return await link.ask(packed, replies, patience)
            except redis.ConnectionError:
                pass  # it was closed, or the reply lost: a command may be run twice, so once more
        link = await self._connect(patience)
        return await link.ask(packed, replies, patience)

    def close(self) -> None:
        """Close the connection. Call it in the loop's own thread."""
        if self._link is not None:
            self._link.fail(redis.ConnectionError("the connection was closed"))

    async def _connect(self, patience: float) -> _Link:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        while True:
            if self._link is not None and self._link.alive:
                return self._link
            begun = self._connecting
            if begun is None or begun.done():
                begun = None
                self._connecting = loop.create_task(self._open())
                self._connecting.add_done_callback(_retrieve)
            # Others may wait for the same connection, with more patience.
            connecting = self._connecting
            assert connecting is not None
            await asyncio.wait([connecting], timeout=deadline - loop.time())
            if not connecting.done():
                raise redis.TimeoutError("the connection was not made in time")
            if begun is None or connecting.exception() is None:
                return connecting.result()
            # What somebody else had begun failed; that may have been long ago.

    async def _open(self) -> _Link:
        connection: Any = self._kind(**self._settings)
        try:
            await connection.connect()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._link = _Link(connection, self._timeout)
        return self._link


def _retrieve(task: asyncio.Task[Any]) -> None:
    """All who waited may have gone: nobody has to be told that its error was never asked for."""
    if not task.cancelled():
        task.exception()


class _Asked:
    """Commands on their way: what is still to come, and who waits for it."""

    __slots__ = ("answers", "future", "left", "since")

    def __init__(self, replies: int, future: asyncio.Future[list[Any]], since: float) -> None:
        self.answers: list[Any] = []
        self.left = replies
        self.future = future
        self.since = since


class _Link:
    """An open connection, and the task that reads from it."""

    def __init__(self, connection: Any, timeout: float) -> None:
        self.alive = True
        self._connection = connection
        self._timeout = timeout
        self._writer: asyncio.StreamWriter = connection._writer
        self._asked: deque[_Asked] = deque()
        self._loop = asyncio.get_running_loop()
        connection.socket_timeout = None  # to hear nothing for a while is no fault
        self._reader = self._loop.create_task(self._read())

    async def ask(self, packed: Packed, replies: int, patience: float) -> list[Any]:
        if not self.alive:
            raise redis.ConnectionError("the connection was lost")
        now = self._loop.time()
        asked = _Asked(replies, self._loop.create_future(), now)
        self._asked.append(asked)
        self._writer.writelines(packed)
        timer = self._loop.call_at(now + patience, self._too_late, asked)
        try:
            if self._writer.transport.get_write_buffer_size() > _MUCH:
                await self._writer.drain()
            return await asked.future
        except OSError as error:
            raise redis.ConnectionError(f"the connection was lost: {error}") from error
        finally:
            timer.cancel()

    def fail(self, error: Exception) -> None:
        """Give up the connection; whoever waits for a reply gets the error."""
        self.alive = False
        self._reader.cancel()
        self._writer.close()
        self._connection._writer = self._connection._reader = None  # or it would complain that it was not closed
        while self._asked:
            future = self._asked.popleft().future
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may be left to ask for it

    def _too_late(self, asked: _Asked) -> None:
        if not asked.future.done():
            asked.future.set_exception(redis.TimeoutError("no reply in time"))
        # Replies come in order, so the first to wait tells how long the server has been silent.
        if self._asked and self._loop.time() - self._asked[0].since >= self._timeout * 0.99:
            self.fail(redis.TimeoutError("no reply in time"))

    async def _read(self) -> None:
        error: Exception = redis.ConnectionError("the connection was closed")
        try:
            while True:
                try:
                    answer = await self._connection.read_response(disconnect_on_error=False)
                except redis.ResponseError as refused:
                    answer = refused
                if not self._asked:
                    continue  # a push message that the parser let through
                asked = self._asked[0]
                asked.answers.append(answer)
                asked.left -= 1
                if not asked.left:
                    self._asked.popleft()
                    if not asked.future.done():
                        asked.future.set_result(asked.answers)
        except (redis.RedisError, OSError) as lost:
            error = redis.ConnectionError(str(lost))
        finally:
            self.fail(error)
