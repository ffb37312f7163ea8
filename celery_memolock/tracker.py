"""The link on which a server tells of entries that changed: server-assisted client-side caching, in broadcast mode."""

from __future__ import annotations

import contextlib
import logging
import random
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
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._link: Any = None
        self._lease = 1.0
        self._backoff = _SHORTEST_BACKOFF

    def follow(self, prefix: str, local: Local, lease: float) -> None:
        """Tell a local cache of all changes under a prefix, from now on."""
        with self._lock:
            self._lease = min(self._lease, lease)
            self._locals.setdefault(prefix, weakref.WeakSet()).add(local)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="memolock-tracker", daemon=True)
                self._thread.start()
            else:
                self._hang_up()  # to ask for the new prefix with the next connection

    def close(self) -> None:
        """Stop, for good."""
        with self._lock:
            self._closed.set()
            self._hang_up()
            thread = self._thread
        if thread not in (None, threading.current_thread()):
            thread.join()

    def _hang_up(self) -> None:
        if self._link is not None:
            with contextlib.suppress(Exception):
                self._link._sock.shutdown(2)

    def _run(self) -> None:
        complained = False
        while not self._closed.is_set():
            try:
                self._attend()
            except redis.ResponseError as error:  # no RESP3, or not allowed to
                if not complained:
                    complained = True
                    logger.warning("memolock keeps nothing locally, as the server does not track keys: %s", error)
            except (redis.RedisError, OSError, hiredis.ProtocolError) as error:
                logger.debug("memolock lost the link of its local caches: %s", error)
            finally:
                for local in self._all():
                    local.cut()
                if self._link is not None:
                    self._link.disconnect()
                    self._link = None
            self._closed.wait(self._backoff * (0.5 + random.random()))
            self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF)

    def _attend(self) -> None:
        link = self._make()
        link.connect()
        with self._lock:
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
        while not self._closed.is_set():
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
                        self._changed(message[1])
                elif asked is not None:
                    self._backoff = _SHORTEST_BACKOFF
                    for local in self._all():
                        local.proved(asked)
                    asked = None

    def _changed(self, keys: list[bytes] | None) -> None:
        if keys is None:  # FLUSHALL
            for local in self._all():
                local.drop_all()
            return
        for raw in keys:
            key = raw.decode("utf-8", "replace")
            for local in self._all():
                local.drop(key)

    def _all(self) -> list[Local]:
        with self._lock:
            return [local for locals_ in self._locals.values() for local in locals_]
