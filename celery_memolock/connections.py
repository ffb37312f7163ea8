"""The data connections of one process to one server: each carries one round trip at a time, for whoever needs it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

__all__ = ["MOST_CONNECTIONS", "Busy", "Connections", "Packed"]

#: Of one process to one server, beside the inbox. Each is held for one round trip, so many more callers share them.
MOST_CONNECTIONS: Final = 100

#: A command, or several, as the client's connections pack them.
Packed = list[bytes]


class Busy(Exception):
    """All connections were in use for all of the time that there was."""


class Connections:
    """Connections of the client library, without its pool.

    Its pool refuses the next caller when all are in use, looks at each connection before it gives it out, and has a
    time-out for all commands alike. Here the next caller waits, a connection that the server has closed meanwhile
    is noticed by using it, and who has little time left passes that on.

    Args:
        pool: the client's, for the class and the settings of its connections.
    """

    def __init__(self, pool: Any) -> None:
        settings = {**pool.connection_kwargs, "retry": Retry(NoBackoff(), 0)}
        self._make: Callable[[], Any] = lambda: pool.connection_class(**settings)
        self._timeout: float = settings["socket_timeout"]
        self._connect_timeout: float = settings["socket_connect_timeout"]
        self._idle: deque[Any] = deque()
        self._returned = threading.Condition()
        self._made = 0
        self._hungry = 0
        self._closed = False
        self.pack: Callable[..., Packed] = self._make().pack_command

    def ask(self, packed: Packed, replies: int, patience: float | None = None) -> list[Any]:
        """Send commands in one trip, and return their replies; that of a refused command is an exception.

        A trip that fails is made once more, on a new connection: the server may have closed the old one long ago, or
        have lost the reply. So a command must be one that may be run twice.

        Args:
            packed: the commands.
            replies: how many.
            patience: seconds that the caller has, if that is less than the connection's own time-outs.

        Raises:
            Busy: no connection was free in time.
            redis.TimeoutError, redis.ConnectionError, OSError: the server did not answer.
        """
        link = self._take(patience)
        try:
            try:
                if link is None:
                    link = self._connect(patience)
                answers = self._exchange(link, packed, replies, patience)
            except redis.ConnectionError:
                link = self._connect(patience)
                answers = self._exchange(link, packed, replies, patience)
        except BaseException:
            if link is not None:
                link.disconnect()
            with self._returned:
                self._made -= 1
                self._returned.notify()
            raise
        self._idle.append(link)
        if self._closed:
            self.close()
        if self._hungry:
            with self._returned:
                self._returned.notify()
        return answers

    def close(self) -> None:
        """Close those that are not in use, and each of the others after its use."""
        self._closed = True
        while self._idle:
            self._idle.pop().disconnect()
            self._made -= 1

    def _take(self, patience: float | None) -> Any:
        """Return a free connection, or None as the permission to make one."""
        try:
            return self._idle.pop()
        except IndexError:
            pass
        deadline = time.monotonic() + (self._timeout if patience is None else min(patience, self._timeout))
        with self._returned:
            self._hungry += 1
            try:
                while True:
                    if self._idle:
                        try:
                            return self._idle.pop()
                        except IndexError:
                            pass  # somebody was quicker
                    if self._made < MOST_CONNECTIONS:
                        self._made += 1
                        return None
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._returned.wait(left):
                        raise Busy
            finally:
                self._hungry -= 1

    def _connect(self, patience: float | None) -> Any:
        link = self._make()
        if patience is not None:
            link.socket_timeout = min(patience, self._timeout)
            link.socket_connect_timeout = min(patience, self._connect_timeout)
        link.connect()
        if patience is not None:
            link.socket_timeout = self._timeout
            link._sock.settimeout(self._timeout)
        return link

    def _exchange(self, link: Any, packed: Packed, replies: int, patience: float | None) -> list[Any]:
        hurried = patience is not None and patience < self._timeout
        if hurried:
            link._sock.settimeout(patience)
        link.send_packed_command(packed, check_health=False)
        answers: list[Any] = []
        for _ in range(replies):
            try:
                answers.append(link.read_response())
            except redis.ResponseError as refused:
                answers.append(refused)
        if hurried:
            link._sock.settimeout(self._timeout)
        return answers
