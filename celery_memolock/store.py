"""One Redis or Valkey server as this process uses it: connections, scripts, the inbox and the heartbeat."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import math
import os
import re
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from urllib.parse import parse_qs, urlencode, urlsplit

import redis
from kombu.utils.imports import symbol_by_name
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, NoScriptError
from redis.retry import Retry
from redis.sentinel import SentinelManagedConnection

from .clock import Clock
from .connections import MOST_CONNECTIONS, Busy, Connections, Packed
from .effects import Acquire, Attempts, Hold, Leave, Query, Renew, Run, Script
from .errors import ConfigurationError, StoreUnavailable
from .inbox import Inbox
from .keys import Keys, entry_prefix
from .local import Local
from .options import Options
from .pipe import Pipe, orphans
from .rooms import Broken
from .tracker import Tracker
from .wire import answer, arguments, command, reply, script_of

__all__ = ["NO_SENTINEL", "Store", "Stores", "client_in_environment", "client_of", "first_url", "tried", "usable"]

logger = logging.getLogger("celery_memolock")

#: What a connection is made with unless the URL or the given client says otherwise. A second attempt is safe: every
#: script that changes something gives a repeated call the same answer.
CONNECTION: Final[dict[str, Any]] = {"socket_connect_timeout": 2.0, "socket_timeout": 5.0}

#: Seconds that giving up a registration may take. It goes with its flight in any case, and the caller's time is over.
LEAVE_PATIENCE: Final = 0.25

#: It would be the wrong server for some calls: only the client library's own pool asks a Sentinel.
NO_SENTINEL: Final = "memolock does not know Redis Sentinel: name the primary itself, by its URL or with a redis.Redis"

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
        """Use the server that a URL names; see `client_of`."""
        return cls(client_of(url, "the URL of memolock's Redis"), prefix)

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

    def ask(self, query: Query) -> Any:
        """Send a query's command and return its answer.

        Raises:
            StoreUnavailable: the server cannot be reached, or refused.
        """
        with self._troubles:
            packed = self._connections.pack(*command(query))
            return answer(query, _checked(self._connections.ask(packed, 1, _patience(query))))

    async def aask(self, query: Query) -> Any:
        """Do what `ask` does, from asyncio."""
        with self._troubles:
            packed = self._connections.pack(*command(query))
            return answer(query, _checked(await self._pipe().ask(packed, 1, _patience(query))))

    def forget(self, entry: str) -> None:
        """Drop what this process keeps of an entry, whichever task it is of."""
        for local in list(self._locals.values()):
            local.drop(entry)

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
        keys = effect.keys.all
        return self._connections.pack(*how, len(keys), *keys, *arguments(effect, self._inbox.channel))

    def _pipe(self) -> Pipe:
        loop = asyncio.get_running_loop()
        pipe = self._pipes.get(loop)
        if pipe is None:
            for orphan in orphans(self._pipes):
                orphan.close()
            pipe = self._pipes[loop] = Pipe(self._client.connection_pool, self._connections.pack)
        return pipe

    def listen(self, timeout: float) -> None:
        """Return when notices to this process can arrive, within `timeout` seconds or the connection's own time-outs.

        Raises:
            StoreUnavailable: the subscription was refused, or not acknowledged in time.
        """
        if self._inbox.listening:
            return
        patience = min(timeout, self._patience)
        told = threading.Event()
        with self._inbox.expecting(told.set):
            told.wait(patience)
        self._listens(patience)

    async def alisten(self, timeout: float) -> None:
        """Do what `listen` does, from asyncio."""
        patience = min(timeout, self._patience)
        loop = asyncio.get_running_loop()
        told = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(told.set)

        timer = loop.call_later(patience, told.set)
        try:
            with self._inbox.expecting(tell):
                await told.wait()
        finally:
            timer.cancel()
        self._listens(patience)

    def _listens(self, patience: float) -> None:
        if self._inbox.listening:
            return
        why = self._inbox.trouble
        if isinstance(why, redis.AuthenticationError):
            raise StoreUnavailable(f"Redis at {self.address} {_trouble(why)}")
        if isinstance(why, redis.ResponseError):
            raise StoreUnavailable(
                f"Redis at {self.address} refused a subscription: {why}; "
                f"of an access control list the user needs the channels &{self._prefix}:*, too"
            )
        raise StoreUnavailable(
            f"Redis at {self.address} did not acknowledge a subscription in {patience:.3g} s{f': {why}' if why else ''}"
        )

    def local(self, task: str, options: Options) -> Local:
        """Return what this process keeps of a task's values, made at the first use."""
        prefix = entry_prefix(options.prefix, task)
        limits = (options.local_ttl, options.local_max_entries, options.local_max_bytes, options.local_lease)
        found = self._locals.get((prefix, limits))
        if found is None:
            with self._start:
                found = self._locals.get((prefix, limits))
                if found is None:
                    found = Local(*limits, time.monotonic)
                    self._tracker.follow(prefix, found, options.local_lease)
                    self._locals[prefix, limits] = found
        return found

    def hold(self, hold: Hold, alive: Callable[[], bool] = lambda: True) -> None:
        """Renew the lease of a run until `release`; while `alive` says no it is not renewed."""
        self._heart.hold(hold, alive)

    def lost(self, run: Run) -> bool:
        """Whether a renewal found that a run that is held has lost its flight."""
        return self._heart.lost(run)

    def release(self, run: Run) -> None:
        """Renew the lease of a run no more."""
        self._heart.release(run)

    def close(self, wait: bool = True) -> None:
        """Stop the listener and close all connections. Calls that wait get `StoreUnavailable`.

        Args:
            wait: until all threads have ended. What collects garbage must not: it may be any thread, amid anything, and
                those threads may be amid what takes a silent server's time-outs. Then no call waits, either.
        """
        self._leave_locals()
        self._tracker.close(wait)
        self._inbox.close(wait)
        if wait:
            why = f"the connections to Redis at {self.address} were closed while the call waited"
            self._inbox.rooms.close(Broken(StoreUnavailable, (why,)))
        self._heart.close(wait)
        self._connections.close()
        for loop, pipe in list(self._pipes.items()):
            try:
                loop.call_soon_threadsafe(pipe.close)
            except RuntimeError:  # the loop is closed already
                pipe.close()
        self._client.connection_pool.disconnect()
        _stores.discard(self)

    def _begin(self) -> None:
        self._connections = Connections(self._client.connection_pool)
        self._pipes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Pipe] = weakref.WeakKeyDictionary()
        self._locals: dict[tuple[str, tuple[float, ...]], Local] = {}
        self.clock = Clock(time.monotonic)
        self._start = threading.Lock()
        self._tracker = Tracker(self._client.connection_pool)
        self._inbox = Inbox(self._client.connection_pool, self._prefix)
        self._heart = _Heart(self)

    def _after_fork(self) -> None:
        # Threads do not survive a fork, locks may be held for ever, and channel and connections are the
        # parent's.
        self._leave_locals()
        self._inbox.abandon()
        _inherited.append(self._pipes)
        self._begin()

    def _leave_locals(self) -> None:
        for local in list(self._locals.values()):
            local.over = True


def client_of(given: Any, name: str) -> redis.Redis:
    """Return the client that a user gave, or that of a URL: redis://, rediss://, unix:// or kombu's redis+socket://.

    Time-outs and other settings of the client may be given in the query, such as ``?socket_timeout=2``.

    Args:
        given: the client or the URL.
        name: what the user calls it, for the error.

    Raises:
        ConfigurationError: it is neither, such as a client for asyncio, or cannot be used.
    """
    if isinstance(given, redis.Redis):
        return given
    if not isinstance(given, str):
        kind = f"{type(given).__module__}.{type(given).__qualname__}"
        raise ConfigurationError(f"{name} is to be a URL or a redis.Redis, not a {kind}")
    with usable(name):
        return _client_at(given)


def client_in_environment() -> redis.Redis | None:
    """Return the client of the URL that the environment variable MEMOLOCK_REDIS_URL names; None if there is none."""
    url = os.environ.get("MEMOLOCK_REDIS_URL")
    return client_of(url, "MEMOLOCK_REDIS_URL") if url else None


@contextlib.contextmanager
def usable(name: str) -> Iterator[None]:
    """Say what cannot be used if making a client of it fails.

    Raises:
        ConfigurationError: it fails.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:  # whatever those raise that read settings: KeyError, RedisError, ImportError, ...
        kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
        raise ConfigurationError(f"{name} cannot be used: {kind}{str(error).strip()}") from None


def _client_at(url: str) -> redis.Redis:
    found = _clients.get(url)
    if found is None:
        plain, credentials = _plain_url(url)
        if len(_clients) >= _MOST_CLIENTS:
            _clients.pop(next(iter(list(_clients))), None)
        # Of several threads all take what the first has made: what comes of a client ends with it.
        found = _clients.setdefault(url, tried(redis.Redis.from_url(plain, **credentials)))
    return found


_clients: dict[str, redis.Redis] = {}
_MOST_CLIENTS: Final = 256


def tried(client: redis.Redis) -> redis.Redis:
    """Return a client whose settings its connections take: the library itself looks when it connects."""
    pool = client.connection_pool
    pool.connection_class(**pool.connection_kwargs)
    return client


class _Troubles:
    """Tells what the client library's errors mean to a caller."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, redis.RedisError | OSError | Busy):
            return
        raise StoreUnavailable(f"Redis at {self._address} {_trouble(error)}", _is_refusal(error)) from error


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, redis.AuthenticationError | NoPermissionError) or str(error).startswith("DB index is out")


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
    for each in answers:
        _checked([each])
    return answers


def _checked(answers: list[Any]) -> Any:
    """Return the one answer, or raise it if it is a refusal."""
    (answer,) = answers
    if isinstance(answer, redis.ResponseError):
        raise answer
    return answer


def _patience(effect: Script | Query) -> float | None:
    """Return for how many seconds somebody waits for the server's reply; None if for as long as it may take."""
    match effect:
        case Acquire(wanted=wanted, register=int()):
            return max(wanted, LOOK_PATIENCE)
        case Leave() | Attempts():
            return LEAVE_PATIENCE
    return None


class _Heart:
    """Renews the leases of this process's runs: one thread for all of them, from the first run on."""

    def __init__(self, store: Store) -> None:
        self._store = weakref.ref(store)
        self._changed = threading.Condition()
        self._holds: dict[Run, tuple[Hold, float, float]] = {}  # with the next and the last time to renew
        self._alive: dict[Run, Callable[[], bool]] = {}
        self._lost: set[Run] = set()  # of those that run here still
        self._thread: threading.Thread | None = None
        self._asleep_until = 0.0
        self._closed = False

    def hold(self, hold: Hold, alive: Callable[[], bool]) -> None:
        now = time.monotonic()
        due = now + hold.lease / 3
        with self._changed:
            self._alive[hold.run] = alive
            self._holds[hold.run] = (hold, due, now + hold.max_run)
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="memolock-heart", daemon=True)
                self._thread.start()
            if due < self._asleep_until:  # to wake it takes longer than all the rest here
                self._changed.notify()

    def lost(self, run: Run) -> bool:
        with self._changed:
            return run in self._lost

    def release(self, run: Run) -> None:
        with self._changed:
            self._holds.pop(run, None)
            self._alive.pop(run, None)
            self._lost.discard(run)

    def close(self, wait: bool = True) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if wait and self._thread not in (None, threading.current_thread()):
            self._thread.join()

    def _beat(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                due = [hold for hold, at, _ in self._holds.values() if at <= now]
                if not due:
                    soonest = min((at for _, at, _ in self._holds.values()), default=math.inf)
                    self._asleep_until = soonest
                    self._changed.wait(None if soonest == math.inf else soonest - now)
                    self._asleep_until = 0.0
                    continue
            lost = self._renew([hold for hold in due if self._alive.get(hold.run, bool)()])
            now = time.monotonic()
            with self._changed:
                for hold in due:
                    if hold.run in self._holds:
                        last = self._holds[hold.run][2]
                        if hold.run in lost or now >= last:
                            del self._holds[hold.run]
                            if hold.run in lost:
                                self._lost.add(hold.run)
                        else:
                            self._holds[hold.run] = (hold, now + hold.lease / 3, last)

    def _renew(self, due: list[Hold]) -> set[Run]:
        """Renew some leases → the runs that lost theirs for good."""
        store = self._store()
        if store is None:
            return {hold.run for hold in due}
        if not due:
            return set()
        try:
            answers = store.run_all([Renew(hold.keys, hold.run, hold.lease) for hold in due])
        except Exception as error:  # of whatever kind: there is one thread for all leases
            # Until somebody takes over, the next renewal revives the lease.
            odd = not isinstance(error, StoreUnavailable)
            logger.warning("memolock could not renew %d leases: %s", len(due), error, exc_info=odd)
            return set()
        return {hold.run for hold, answer in zip(due, answers, strict=True) if answer == "LOST"}


class Stores:
    """The servers of a process, one for each owner, such as an app, that is configured with it."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, Store] = weakref.WeakKeyDictionary()
        self._closers: weakref.WeakKeyDictionary[Any, weakref.finalize[Any, Any]] = weakref.WeakKeyDictionary()
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def of(self, owner: Any, make: Callable[[Any], Store]) -> Store:
        """Return an owner's server, made at the first use, and closed with its owner."""
        store = self._known.get(owner)
        if store is None:
            with self._lock:
                store = self._known.get(owner)
                if store is None:
                    store = make(owner)
                    closer = self._closers[owner] = weakref.finalize(owner, store.close, False)
                    closer.atexit = False  # there the threads are daemons, and nothing is worth waiting for
                    self._known[owner] = store
        return store

    def drop(self, owner: Any) -> None:
        """Close an owner's server, if it was made; the next use makes another."""
        with self._lock:
            closer = self._closers.pop(owner, None)
            store = self._known.pop(owner, None)
        if closer is not None and store is not None:
            closer.detach()
            store.close()

    def _renew(self) -> None:
        self._lock = threading.Lock()


_stores: weakref.WeakSet[Store] = weakref.WeakSet()

#: What a forked child must never close: it shares the selectors of its parent's loops, and would deafen them.
_inherited: list[Any] = []


def _renew_stores() -> None:
    for store in list(_stores):
        store._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_stores)


def _driver_info() -> dict[str, Any]:
    """Read what the client library says of itself to the server."""
    try:
        module: Any = importlib.import_module("redis.driver_info")
    except ImportError:  # of an older version, which says less
        return {}
    return {"driver_info": module.DriverInfo()}


#: Read once, and before any fork: by itself the library does so for each connection.
_DRIVER_INFO: Final = _driver_info()


def _own_client(client: redis.Redis) -> redis.Redis:
    pool = client.connection_pool
    if issubclass(pool.connection_class, SentinelManagedConnection):
        raise ConfigurationError(NO_SENTINEL)
    kwargs = {**CONNECTION, **_DRIVER_INFO, **{k: v for k, v in pool.connection_kwargs.items() if v is not None}}
    kwargs.update(decode_responses=False, retry=Retry(NoBackoff(), 1), retry_on_error=[redis.ConnectionError])
    # Ours are looked after here: the library would take what the listener hears for the answer to its own PING.
    kwargs.update(health_check_interval=0, retry_on_timeout=False)
    if isinstance(kwargs.get("ssl_cert_reqs"), int):  # asyncio's connections of redis-py 5.2 know it by name only
        kwargs["ssl_cert_reqs"] = ssl.VerifyMode(kwargs["ssl_cert_reqs"]).name.removeprefix("CERT_").lower()
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **kwargs))


def _address(client: Any) -> str:
    """Say where a client connects to, without user name or password."""
    kwargs = client.connection_pool.connection_kwargs
    if "path" in kwargs:
        return f"unix://{kwargs['path']}"
    scheme = "rediss" if issubclass(client.connection_pool.connection_class, redis.SSLConnection) else "redis"
    return f"{scheme}://{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}/{kwargs.get('db') or 0}"


#: What stands between two URLs; a password may have a semicolon, too.
_NEXT_URL: Final = re.compile(r";(?=[a-z][a-z+]*://|$)")


def first_url(urls: Any) -> Any:
    """Return the first of several URLs, which stand there for a failover.

    Raises:
        ValueError: it cannot be told where its user and password end. The error shows none of them.
    """
    url = urls[0] if isinstance(urls, list | tuple) and urls else urls
    if not isinstance(url, str):
        return url
    url = _NEXT_URL.split(url)[0]
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # which raises
        cut = parts.hostname and "@" not in parts.netloc and "@" in parts.path + parts.query + parts.fragment
    except ValueError:
        cut = True
    if cut:
        raise ValueError(
            "its host and port make no sense; if user or password have one of / # ? [ ] it is to be written as %2F, ..."
        )
    return url


def _plain_url(url: str) -> tuple[str, dict[str, Any]]:
    """Turn kombu's and Celery's spellings of a Redis URL into the client's → the URL, and what a URL cannot say."""
    parts = urlsplit(first_url(url))
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    scheme = parts.scheme
    if scheme == "sentinel":
        raise ValueError(NO_SENTINEL)
    if scheme in ("redis+socket", "socket"):
        scheme = "unix"
        query["db"] = query.pop("virtual_host", query.get("db", "0")).strip("/")
    if "ssl_cert_reqs" in query:
        query["ssl_cert_reqs"] = query["ssl_cert_reqs"].removeprefix("CERT_").lower()
    provider = query.pop("credential_provider", None)
    credentials = {"credential_provider": symbol_by_name(provider)()} if provider else {}
    return f"{scheme}://{parts.netloc}{parts.path}?{urlencode(query)}", credentials
