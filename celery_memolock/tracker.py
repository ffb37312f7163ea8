"""The link on which a server tells of entries that changed: server-assisted client-side caching, in broadcast mode."""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from .local import Local

__all__ = ["Tracker"]

logger = logging.getLogger("celery_memolock")

_SHORTEST_BACKOFF: Final = 0.05
_LONGEST_BACKOFF: Final = 2.0
_INVALIDATE: Final = b"invalidate"
_NOT_YET: Final = object()


class Tracker:
    """One connection and one thread for all local caches of a process at one server.

    Redis and Valkey push, over RESP3, the name of each key under a prefix that is written, deleted or expires. Replies
    and pushes come in order, so the reply to a PING proves that all changes before that PING have been told.

    Args:
        pool: the client's, for the class and the settings of its connections.
    """

    def __init__(self, pool: Any) -> None:
        settings = {**pool.connection_kwargs, "protocol": 3, "retry": Retry(NoBackoff(), 0)}
        self._make: Callable[[], Any] = lambda: pool.connection_class(**settings)
        self._locals: dict[str, weakref.WeakSet[Local]] = {}
        self._changed = threading.Condition()  # its lock may be taken twice: `close` may come amid anything
        self._thread: threading.Thread | None = None
        self._closed = False
        self._link: Any = None
        self._lease = 1.0
        self._backoff = _SHORTEST_BACKOFF

    def follow(self, prefix: str, local: Local, lease: float) -> None:
        """Tell a local cache of all changes under a prefix, from now on."""
        with self._changed:
            self._lease = min(self._lease, lease)
            known = prefix in self._locals
            self._locals.setdefault(prefix, weakref.WeakSet()).add(local)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="memolock-tracker", daemon=True)
                self._thread.start()
            elif not known:
                self._hang_up()  # to ask for the new prefix with the next connection

    def close(self, wait: bool = True) -> None:
        """Stop, for good, and wait until the thread has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            self._hang_up()
            thread = self._thread
        if wait and thread not in (None, threading.current_thread()):
            thread.join()

    def _hang_up(self) -> None:
        if self._link is not None:
            # Not that of an SSLSocket: it takes away what its other thread is reading with.
            with contextlib.suppress(Exception):  # it is gone already, or not there yet
                socket.socket.shutdown(self._link._sock, socket.SHUT_RDWR)

    def _run(self) -> None:
        complained = False
        while not self._closed:
            try:
                self._attend()
            except redis.ResponseError as error:  # no RESP3, or not allowed to
                if not complained:
                    complained = True
                    logger.warning("memolock keeps nothing locally, as the server does not track keys: %s", error)
            except (redis.RedisError, OSError, hiredis.ProtocolError) as error:
                logger.debug("memolock lost the link of its local caches: %s", error)
            except Exception:
                logger.exception("memolock's link of its local caches failed and starts anew")
            finally:
                for local in self._all():
                    local.cut()
                if self._link is not None:
                    self._link.disconnect()
                    self._link = None
            with self._changed:
                self._changed.wait_for(lambda: self._closed, self._backoff * (0.5 + random.random()))
            self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF)

    def _attend(self) -> None:
        link = self._make()
        link.connect()
        with self._changed:
            prefixes = [part for prefix in self._locals for part in ("PREFIX", prefix)]
            lease = self._lease
            self._link = link
        link.send_command("CLIENT", "TRACKING", "ON", "BCAST", *prefixes)
        link.read_response()
        # From here on the socket is ours: replies and pushes are told apart by their types.
        sock = link._sock
        reader = hiredis.Reader(notEnoughData=_NOT_YET)
        ping = link.pack_command("PING")
        asked: float | None = None  # when the PING was sent that is not answered yet
        due = 0.0
        while not self._closed:
            now = time.monotonic()
            if now >= due:
                if asked is not None and now - asked > max(5 * lease, 5.0):
                    raise redis.TimeoutError("no answer on the link of the local caches")
                if asked is None:
                    for part in ping:
                        sock.sendall(part)
                    asked = now
                due = now + lease / 3
            sock.settimeout(max(0.001, due - time.monotonic()))
            try:
                data = sock.recv(65536)
            except TimeoutError:
                continue
            if not data:
                raise redis.ConnectionError("closed by the server")
            reader.feed(data)
            while (message := reader.gets()) is not _NOT_YET:
                if isinstance(message, hiredis.PushNotification):
                    if message[0] == _INVALIDATE:
                        self._drop(message[1])
                elif asked is not None:
                    self._backoff = _SHORTEST_BACKOFF
                    for local in self._all():
                        local.proved(asked)
                    asked = None

    def _drop(self, keys: list[bytes] | None) -> None:
        if keys is None:  # FLUSHALL
            for local in self._all():
                local.drop_all()
            return
        for raw in keys:
            key = raw.decode("utf-8", "replace")
            for local in self._all():
                local.drop(key)

    def _all(self) -> list[Local]:
        with self._changed:
            return [local for locals_ in self._locals.values() for local in locals_]
