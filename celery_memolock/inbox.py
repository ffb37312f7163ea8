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
from typing import Any, Final

import redis

from .keys import inbox_channel
from .rooms import Rooms
from .wire import parse_notice

__all__ = ["Inbox"]

logger = logging.getLogger("celery_memolock")

_QUIET: Final = 15.0  # seconds without a word after which the link has to prove that it is alive
_LONGEST_BACKOFF: Final = 2.0


class Inbox:
    """A channel of its own, and the thread that listens to it from the first miss on.

    A notice may get lost at any time, so it never matters whether one came, only how soon: whoever waits also
    looks by itself when its room's time has come, and after a lost link all look again.

    Args:
        client: its connections and their time-outs are used.
        prefix: the first part of the channel's name.
    """

    def __init__(self, client: Any, prefix: str) -> None:
        self.channel = inbox_channel(prefix, secrets.token_hex(8))
        self.rooms = Rooms(random.random, self._alarm)
        self._client = client
        self._ready = threading.Event()
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._asleep_until = 0.0
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)

    @property
    def listening(self) -> bool:
        """Whether notices can arrive right now."""
        return self._ready.is_set()

    def listen(self, timeout: float) -> bool:
        """Return True as soon as the server has acknowledged the subscription, False after `timeout` seconds."""
        if self._ready.is_set():
            return True
        with self._start:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="memolock-inbox", daemon=True)
                self._thread.start()
        return self._ready.wait(timeout)

    def close(self) -> None:
        """Stop listening, for good."""
        self._closed = True
        self._ring_listener()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()
        self.abandon()

    def abandon(self) -> None:
        """Close what a forked child inherited, where no thread runs any more."""
        self._wake.close()
        self._woken.close()

    def _alarm(self, due: float) -> None:
        if due < self._asleep_until:
            self._ring_listener()

    def _ring_listener(self) -> None:
        with contextlib.suppress(OSError):  # full: it is being woken already
            self._wake.send(b"!")

    def _run(self) -> None:
        backoff = 0.05
        while not self._closed:
            pubsub = self._client.pubsub()
            try:
                pubsub.subscribe(self.channel)
                backoff = 0.05 if self._attend(pubsub) else backoff
            except (redis.RedisError, OSError) as error:
                logger.debug("memolock inbox lost its link: %s", type(error).__name__)
            except Exception:
                logger.exception("memolock inbox failed and starts anew")
            finally:
                self._ready.clear()
                with contextlib.suppress(Exception):
                    pubsub.close()
            if not self._closed:
                pause = backoff * (0.5 + random.random())
                self._sleep(None, time.monotonic() + pause)
                # Without a link too: the server may be there, and only this connection refused.
                self.rooms.tick(time.monotonic())
                backoff = min(2 * backoff, _LONGEST_BACKOFF)

    def _attend(self, pubsub: Any) -> bool:
        """Listen until closed. Raises when the link is lost."""
        heard = time.monotonic()
        asked = False
        while not self._closed:
            while (message := pubsub.get_message(timeout=0)) is not None:
                heard, asked = time.monotonic(), False
                self._handle(message)
            now = time.monotonic()
            if now - heard > _QUIET:
                if asked or not self._ready.is_set():
                    raise redis.TimeoutError("no answer on the inbox's link")
                pubsub.ping()
                heard, asked = now, True
            self._asleep_until = math.inf  # from here on an alarm rings
            due = self.rooms.tick(now)
            self._sleep(pubsub.connection, heard + _QUIET if due is None else min(due, heard + _QUIET))
        return True

    def _handle(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            # The first time, or again after the client library has silently connected anew: what was
            # published meanwhile is lost.
            self._ready.set()
            self.rooms.ring_all()
        elif message["type"] == "message":
            notice = parse_notice(message["data"])
            if notice is not None:
                self.rooms.notice(*notice)

    def _sleep(self, connection: Any, until: float) -> None:
        """Sleep until the link has something to read, a room's time is set anew, or the time has come."""
        self._asleep_until = until
        link = getattr(connection, "_sock", None)
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            if link is not None:
                selector.register(link, selectors.EVENT_READ)
            selector.select(max(0.0, until - time.monotonic()))
        self._asleep_until = 0.0
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(64):
                pass
