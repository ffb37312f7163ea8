"""One Redis or Valkey server as this process uses it: connections, scripts, the inbox and the heartbeat."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry

from .connections import MOST_CONNECTIONS, Busy, Connections, Packed
from .errors import ConfigurationError, StoreUnavailable
from .inbox import Inbox
from .keys import Keys, entry_prefix
from .local import Local
from .options import Options
from .pipe import Pipe
from .protocol import Acquire, Hold, Leave, Renew, Run, Script
from .tracker import Tracker
from .wire import arguments, reply, script_of

__all__ = ["Store"]

logger = logging.getLogger("celery_memolock")

#: What a connection is made with unless the URL or the given client says otherwise. A second attempt is safe: every
#: script that changes something gives a repeated call the same answer.
CONNECTION: Final[dict[str, Any]] = {"socket_connect_timeout": 2.0, "socket_timeout": 5.0}

#: Seconds that giving up a registration may take. It goes with its flight in any case, and the caller's time is over.
LEAVE_PATIENCE: Final = 0.25

#: The least that a look is given, however little time its caller has left.
LOOK_PATIENCE: Final = 0.05


class Store:
    """A server, its connections, and what listens and beats over them in this process.

    Safe to use from many threads, and after a fork: the child gets an inbox and connections of its own.

    Args:
        client: a client to take the connection settings from. Its own pool stays untouched.
        prefix: the first part of the name of the process's channel.
    """

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self._client: Any = _own_client(client)  # Any: half of the client is untyped
        self._prefix = prefix
        self.address = _address(self._client)
        self._troubles = _Troubles(self.address)
        kwargs = self._client.connection_pool.connection_kwargs
        self._patience: float = kwargs["socket_connect_timeout"] + kwargs["socket_timeout"]
        self._begin()
        _stores.add(self)

    @classmethod
    def from_url(cls, url: str, prefix: str) -> Store:
        """Use the server that a URL names: redis://, rediss://, unix:// or kombu's redis+socket://.

        Time-outs and other settings of the client may be given in the query, such as ``?socket_timeout=2``.

        Raises:
            ConfigurationError: the URL cannot be used.
        """
        try:
            return cls(redis.Redis.from_url(_plain_url(url)), prefix)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"memolock_redis_url cannot be used: {error}") from None

    @property
    def inbox(self) -> Inbox:
        """What this process listens with."""
        return self._inbox

    def get(self, keys: Keys, patience: float | None = None) -> bytes | None:
        """Read the entry."""
        links = self._connections
        with self._troubles:
            return _checked(links.ask(links.pack("GET", keys.entry), 1, patience))  # type: ignore[no-any-return]

    async def aget(self, keys: Keys, patience: float) -> bytes | None:
        """Do what `get` does, from asyncio."""
        with self._troubles:
            return _checked([await self._pipe().get(keys.entry, patience)])  # type: ignore[no-any-return]

    def get_all(self, keys: Sequence[Keys], patience: float) -> list[bytes | None]:
        """Read several entries in one trip."""
        with self._troubles:
            return _all_checked(self._connections.ask(self._packed_gets(keys), len(keys), patience))

    async def aget_all(self, keys: Sequence[Keys], patience: float) -> list[bytes | None]:
        """Do what `get_all` does, from asyncio."""
        with self._troubles:
            return _all_checked(await self._pipe().ask(self._packed_gets(keys), len(keys), patience))

    def run(self, effect: Script) -> Any:
        """Run an effect's script and return its reply.

        Raises:
            StoreUnavailable: the server cannot be reached, or refused.
        """
        patience = _patience(effect)
        with self._troubles:
            try:
                raw = _checked(self._connections.ask(self._packed(effect), 1, patience))
            except NoScriptError:
                raw = _checked(self._connections.ask(self._packed(effect, by_text=True), 1, patience))
        return reply(effect, raw)

    async def arun(self, effect: Script) -> Any:
        """Do what `run` does, from asyncio."""
        patience = _patience(effect)
        with self._troubles:
            pipe = self._pipe()
            try:
                raw = _checked(await pipe.ask(self._packed(effect), 1, patience))
            except NoScriptError:
                raw = _checked(await pipe.ask(self._packed(effect, by_text=True), 1, patience))
        return reply(effect, raw)

    def run_all(self, effects: Sequence[Script]) -> list[Any]:
        """Run scripts in one trip → their replies, or `StoreUnavailable` in the place of one that failed.

        Raises:
            StoreUnavailable: the server cannot be reached.
        """
        with self._troubles:
            raw = self._connections.ask(self._all_packed(effects), len(effects), _least_patience(effects))
        replies = []
        for effect, each in zip(effects, raw, strict=True):
            try:
                replies.append(self.run(effect) if isinstance(each, NoScriptError) else self._reply_to(effect, each))
            except StoreUnavailable as error:
                replies.append(error)
        return replies

    async def arun_all(self, effects: Sequence[Script]) -> list[Any]:
        """Do what `run_all` does, from asyncio."""
        with self._troubles:
            raw = await self._pipe().ask(self._all_packed(effects), len(effects), _least_patience(effects))
        replies = []
        for effect, each in zip(effects, raw, strict=True):
            try:
                lost = isinstance(each, NoScriptError)
                replies.append(await self.arun(effect) if lost else self._reply_to(effect, each))
            except StoreUnavailable as error:
                replies.append(error)
        return replies

    def _reply_to(self, effect: Script, raw: Any) -> Any:
        with self._troubles:
            return reply(effect, _checked([raw]))

    def _all_packed(self, effects: Sequence[Script]) -> Packed:
        return [part for effect in effects for part in self._packed(effect)]

    def _packed_gets(self, keys: Sequence[Keys]) -> Packed:
        # Not MGET: in a cluster it would have to be split by slots, and one trip it is either way.
        return [part for each in keys for part in self._connections.pack("GET", each.entry)]

    def _packed(self, effect: Script, by_text: bool = False) -> Packed:
        source = script_of(effect)
        how = ("EVAL", source.text) if by_text else ("EVALSHA", source.sha)
        return self._connections.pack(*how, 4, *effect.keys.all, *arguments(effect, self._inbox.channel))

    def _pipe(self) -> Pipe:
        loop = asyncio.get_running_loop()
        pipe = self._pipes.get(loop)
        if pipe is None:
            pipe = self._pipes[loop] = Pipe(self._client.connection_pool, self._connections.pack)
        return pipe

    def listen(self, timeout: float) -> None:
        """Return when notices to this process can arrive, within `timeout` seconds or the connection's own time-outs.

        Raises:
            StoreUnavailable: the subscription was not acknowledged in time.
        """
        patience = min(timeout, self._patience)
        if not self._inbox.listen(patience):
            raise StoreUnavailable(f"Redis at {self.address} did not acknowledge a subscription in {patience:g} s")

    def local(self, task: str, options: Options) -> Local:
        """Return what this process keeps of a task's values, made at the first use."""
        found = self._locals.get(task)
        if found is None:
            with self._start:
                found = self._locals.get(task)
                if found is None:
                    found = Local(
                        options.local_ttl,
                        options.local_max_entries,
                        options.local_max_bytes,
                        options.local_lease,
                        time.monotonic,
                    )
                    self._tracker.follow(entry_prefix(options.prefix, task), found, options.local_lease)
                    self._locals[task] = found
        return found

    def hold(self, hold: Hold) -> None:
        """Renew the lease of a run until `release`."""
        self._heart.hold(hold)

    def release(self, run: Run) -> None:
        """Renew the lease of a run no more."""
        self._heart.release(run)

    def close(self) -> None:
        """Stop the listener and close all connections."""
        self._tracker.close()
        self._inbox.close()
        self._heart.close()
        self._connections.close()
        for loop, pipe in list(self._pipes.items()):
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(pipe.close)
        self._client.connection_pool.disconnect()
        _stores.discard(self)

    def _begin(self) -> None:
        self._connections = Connections(self._client.connection_pool)
        self._pipes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Pipe] = weakref.WeakKeyDictionary()
        self._locals: dict[str, Local] = {}
        self._start = threading.Lock()
        self._tracker = Tracker(self._client.connection_pool)
        self._inbox = Inbox(self._client, self._prefix)
        self._heart = _Heart(self)

    def _after_fork(self) -> None:
        # Threads do not survive a fork, locks may be held for ever, and channel and connections are the
        # parent's.
        self._inbox.abandon()
        self._begin()


class _Troubles:
    """Tells what the client library's errors mean to a caller."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, redis.RedisError | OSError | Busy):
            return
        raise StoreUnavailable(f"Redis at {self._address} {_trouble(error)}") from error


def _trouble(error: Exception) -> str:
    match error:
        case Busy():
            return f"is slow: all {MOST_CONNECTIONS} connections are busy"
        case redis.TimeoutError():
            return f"did not answer in time: {error}"
        case redis.AuthenticationError():
            return f"refused the log-in: {error}"
        case redis.ConnectionError() | OSError():
            return f"cannot be reached: {error}"
    return f"refused a command: {error}"


def _least_patience(effects: Sequence[Script]) -> float | None:
    return min((each for each in map(_patience, effects) if each is not None), default=None)


def _all_checked(answers: list[Any]) -> list[Any]:
    for answer in answers:
        _checked([answer])
    return answers


def _checked(answers: list[Any]) -> Any:
    """Return the one answer, or raise it if it is a refusal."""
    (answer,) = answers
    if isinstance(answer, redis.ResponseError):
        raise answer
    return answer


def _patience(effect: Script) -> float | None:
    """Return for how many seconds somebody waits for a script's reply; None if for as long as it may take."""
    match effect:
        case Acquire(wanted=wanted, register=int()):
            return max(wanted, LOOK_PATIENCE)
        case Leave():
            return LEAVE_PATIENCE
    return None


class _Heart:
    """Renews the leases of this process's runs: one thread for all of them, from the first run on."""

    def __init__(self, store: Store) -> None:
        self._store = weakref.ref(store)
        self._changed = threading.Condition()
        self._holds: dict[Run, tuple[Hold, float, float]] = {}  # with the next and the last time to renew
        self._thread: threading.Thread | None = None
        self._closed = False

    def hold(self, hold: Hold) -> None:
        now = time.monotonic()
        with self._changed:
            self._holds[hold.run] = (hold, now + hold.lease / 3, now + hold.max_run)
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="memolock-heart", daemon=True)
                self._thread.start()
            self._changed.notify()

    def release(self, run: Run) -> None:
        with self._changed:
            self._holds.pop(run, None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()

    def _beat(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                due = [hold for hold, at, _ in self._holds.values() if at <= now]
                if not due:
                    soonest = min((at for _, at, _ in self._holds.values()), default=None)
                    self._changed.wait(None if soonest is None else soonest - now)
                    continue
            lost = self._renew(due)
            now = time.monotonic()
            with self._changed:
                for hold in due:
                    if hold.run in self._holds:
                        last = self._holds[hold.run][2]
                        if hold.run in lost or now >= last:
                            del self._holds[hold.run]
                        else:
                            self._holds[hold.run] = (hold, now + hold.lease / 3, last)

    def _renew(self, due: list[Hold]) -> set[Run]:
        """Renew some leases → the runs that lost theirs for good."""
        store = self._store()
        if store is None:
            return {hold.run for hold in due}
        try:
            answers = store.run_all([Renew(hold.keys, hold.run, hold.lease) for hold in due])
        except StoreUnavailable as error:
            # Until somebody takes over, the next renewal revives the lease.
            logger.warning("memolock could not renew %d leases: %s", len(due), error)
            return set()
        return {hold.run for hold, answer in zip(due, answers, strict=True) if answer == "LOST"}


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _renew_stores() -> None:
    for store in list(_stores):
        store._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_stores)


def _own_client(client: redis.Redis) -> redis.Redis:
    pool = client.connection_pool
    kwargs = {**CONNECTION, **{k: v for k, v in pool.connection_kwargs.items() if v is not None}}
    kwargs.update(decode_responses=False, retry=Retry(NoBackoff(), 1), retry_on_error=[redis.ConnectionError])
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **kwargs))


def _address(client: Any) -> str:
    """Say where a client connects to, without user name or password."""
    kwargs = client.connection_pool.connection_kwargs
    if "path" in kwargs:
        return f"unix://{kwargs['path']}"
    return f"redis://{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}/{kwargs.get('db') or 0}"


def _plain_url(url: str) -> str:
    """Turn kombu's and Celery's spellings of a Redis URL into the client's."""
    url = url.split(";")[0]
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    if parts.scheme in ("redis+socket", "socket"):
        db = (query.get("virtual_host") or query.get("db") or ["0"])[0].strip("/")
        return f"unix://{parts.netloc}{parts.path}?db={db}"
    if "ssl_cert_reqs" in query:
        wanted = query["ssl_cert_reqs"][0]
        return url.replace(wanted, wanted.removeprefix("CERT_").lower())
    return url
