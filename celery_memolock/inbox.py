"""The one listener of a process: it hears the notices of all flights and keeps the time of all rooms."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from .keys import inbox_channel
from .rooms import Rooms
from .wire import parse_notice

__all__ = ["Inbox"]

logger = logging.getLogger("celery_memolock")

_QUIET: Final = 15.0  # seconds without a word after which the link has to prove that it is alive
_SHORTEST_BACKOFF: Final = 0.05
_LONGEST_BACKOFF: Final = 2.0

#: Seconds that the listener sleeps at most just after a time to look was set: less than until the next one is due, as a
#: rule, so that not each of many misses has to wake it.
_DOZE: Final = 0.5
_NOT_YET: Final = object()

#: What a server goes on to say until somebody changes its settings or ours.
_REFUSALS: Final = (redis.ResponseError, redis.AuthenticationError)


class Inbox:
    """A channel of its own, and the thread that listens to it from the first miss on.

    A notice may get lost at any time, so it never matters whether one came, only how soon: whoever waits also
    looks by itself when its room's time has come, and after a lost link all look again.

    Args:
        pool: the client's, for the class and the settings of its connections.
        prefix: the first part of the channel's name.
    """

    def __init__(self, pool: Any, prefix: str) -> None:
        self.channel = inbox_channel(prefix, secrets.token_hex(8))
        self.rooms = Rooms(random.random, self._alarm, time.monotonic)
        # Of RESP2 or RESP3, as the others are: by one of them a server may take a password that the other has refused.
        settings = {**pool.connection_kwargs, "retry": Retry(NoBackoff(), 0)}
        self._make: Callable[[], Any] = lambda: pool.connection_class(**settings)
        self._backoff = _SHORTEST_BACKOFF
        self._ready = threading.Event()
        self._trouble: Exception | None = None
        self._start = threading.Lock()
        self._expectant: set[Callable[[], Any]] = set()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._asleep_until = 0.0
        self._alarmed = False
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)

    @property
    def listening(self) -> bool:
        """Whether notices can arrive right now."""
        return self._ready.is_set()

    @property
    def trouble(self) -> Exception | None:
        """Why notices cannot arrive, if that is known.

        If the server refuses the log-in, a `redis.AuthenticationError`; if it refuses a subscription, a
        `redis.ResponseError`.
        """
        return self._trouble

    @contextlib.contextmanager
    def expecting(self, tell: Callable[[], Any]) -> Iterator[None]:
        """Listen from now on, and `tell`, from any thread, when notices can arrive, or are refused.

        To subscribe is tried again and again. So it may be told at any time, more than once, or never.
        """
        with self._start:
            self._expectant.add(tell)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="memolock-inbox", daemon=True)
                self._thread.start()
        if self.listening or isinstance(self._trouble, _REFUSALS):
            tell()
        try:
            yield
        finally:
            with self._start:
                self._expectant.discard(tell)

    def close(self, wait: bool = True) -> None:
        """Stop listening, for good, and wait until the thread has ended."""
        self._closed = True
        self._ring_listener()
        if self._thread is None:
            self.abandon()
        elif wait and self._thread is not threading.current_thread():
            self._thread.join()

    def abandon(self) -> None:
        """Close what a listener that has ended needs no more, or a forked child has inherited, where none runs."""
        self._selector.close()
        self._wake.close()
        self._woken.close()

    def _alarm(self, due: float) -> None:
        self._alarmed = True
        if due < self._asleep_until:
            self._ring_listener()

    def _ring_listener(self) -> None:
        with contextlib.suppress(OSError):  # full: it is being woken already
            self._wake.send(b"!")

    def _run(self) -> None:
        while not self._closed:
            try:
                self._attend()
            except (redis.RedisError, OSError, hiredis.ProtocolError) as error:
                logger.debug("memolock inbox lost its link: %s", type(error).__name__)
                self._trouble = error
            except Exception as error:
                logger.exception("memolock inbox failed and starts anew")
                self._trouble = error
            finally:
                self._ready.clear()
            if isinstance(self._trouble, _REFUSALS):
                self._tell()
            if not self._closed:
                self._sleep(time.monotonic() + self._backoff * (0.5 + random.random()))
                # Without a link too: the server may be there, and only this connection refused.
                self.rooms.tick(time.monotonic())
                self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF)
        self.abandon()

    def _attend(self) -> None:
        """Listen until closed. Raises when the link is lost."""
        link = self._make()
        link.connect()
        try:
            link.send_command("SUBSCRIBE", self.channel)
            # From here on the socket is ours: the client library's own listening takes twice as long.
            sock = link._sock
            self._selector.register(sock, selectors.EVENT_READ)
            try:
                self._hear(link, sock)
            finally:
                self._selector.unregister(sock)
        finally:
            link.disconnect()

    def _hear(self, link: Any, sock: Any) -> None:
        messages = hiredis.Reader(notEnoughData=_NOT_YET)
        heard = time.monotonic()
        asked = False
        while not self._closed:
            now = time.monotonic()
            if now - heard > _QUIET:
                if asked or not self._ready.is_set():
                    raise redis.TimeoutError("no answer on the inbox's link")
                link.send_command("PING")
                heard, asked = now, True
            self._asleep_until = math.inf  # from here on an alarm rings
            due = self.rooms.tick(now)
            if due is None and self._alarmed:
                due = now + _DOZE
                self._alarmed = False
            if not self._sleep(heard + _QUIET if due is None else min(due, heard + _QUIET)):
                continue
            data = sock.recv(65536)
            while data and hasattr(sock, "pending") and sock.pending():  # TLS hides what it has read from a selector
                data += sock.recv(65536)
            if not data:
                raise redis.ConnectionError("closed by the server")
            heard, asked = time.monotonic(), False
            messages.feed(data)
            while (message := messages.gets()) is not _NOT_YET:
                self._handle(message)

    def _handle(self, message: Any) -> None:
        match message:
            case [b"message", _, bytes(data)]:
                notice = parse_notice(data)
                if notice is not None and notice[1].startswith(b"P"):
                    self.rooms.progressed(notice[0], notice[1][1:])
                elif notice is not None:
                    self.rooms.notice(*notice)
            case [b"subscribe", _, _]:
                self._backoff = _SHORTEST_BACKOFF
                self._trouble = None
                self._ready.set()
                self._tell()
                self.rooms.ring_all()  # what was published before, over an earlier link, may be lost
            case hiredis.ReplyError():
                raise redis.ResponseError(str(message))

    def _tell(self) -> None:
        with self._start:
            for tell in self._expectant:
                tell()

    def _sleep(self, until: float) -> bool:
        """Sleep until a room's time is set anew, the time has come, or the link has something to read: True."""
        self._asleep_until = until
        found = self._selector.select(max(0.0, until - time.monotonic()))
        self._asleep_until = 0.0
        readable = False
        for key, _ in found:
            if key.fileobj is self._woken:
                with contextlib.suppress(BlockingIOError):  # it is empty
                    while self._woken.recv(64):
                        pass
            else:
                readable = True
        return readable
