"""Faults with handles: a link to Redis or a broker that a test can cut, deafen, slow down or rob of a reply.

with Link(server.url) as link:
    client = redis.Redis.from_url(link.url)
    with link.cut():
        ...  # the server is there, but cannot be reached
    with link.cut_reply(containing=b"INCR") as lost:
        client.incr("n")  # is run, its reply is lost, and the client's own retry runs it again
        assert lost.count == 1
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Coroutine
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar
from urllib.parse import urlsplit

from .errors import ConfigurationError, MemoLockError, OptionError

__all__ = ["Fault", "Link", "LinkClosed"]

T = TypeVar("T")
F = TypeVar("F", bound="Fault")

#: The ports of URLs that name none.
PORTS: Final = MappingProxyType({"redis": 6379, "rediss": 6379, "amqp": 5672, "pyamqp": 5672, "amqps": 5671})

#: The most bytes that are forwarded at once.
CHUNK: Final = 65536


class LinkClosed(MemoLockError):
    """A `Link` is used before its `start`, after its `stop`, or in a child that was forked meanwhile."""


class Fault:
    """What a `Link` does wrong: from the call that made it until `end`, or to the end of a with block.

    Several may be in force at once, and end in any order.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._struck = threading.Condition()
        self._count = 0

    def __enter__(self: F) -> F:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    @property
    def count(self) -> int:
        """How often it has struck: connections closed by `cut`, chunks held back or delayed, replies cut."""
        return self._count

    def wait(self, count: int = 1, timeout: float = 10.0) -> bool:
        """Wait until it has struck `count` times in all → whether it did so within `timeout` seconds."""
        with self._struck:
            return self._struck.wait_for(lambda: self._count >= count, timeout)

    def end(self) -> None:
        """Restore the link; does nothing when that is done already."""
        with suppress(LinkClosed):  # its faults are over, too
            self._link._do(self._end())

    # What follows runs in the link's thread.

    async def _begin(self) -> None:
        self._over = asyncio.get_running_loop().create_future()
        self._link._faults.add(self)

    async def _end(self) -> None:
        if self in self._link._faults:
            self._link._faults.discard(self)
            self._over.set_result(None)

    async def _hold(self, direction: str) -> None:
        """Return when a chunk, or the end of a connection, may go on its way."""

    def _strike(self, times: int = 1) -> None:
        with self._struck:
            self._count += times
            self._struck.notify_all()


class _Cut(Fault):
    async def _begin(self) -> None:
        await super()._begin()
        self._link._refuse()
        self._strike(await self._link._hang_up())

    async def _end(self) -> None:
        await super()._end()
        if not any(isinstance(fault, _Cut) for fault in self._link._faults):
            await self._link._listen()


class _Hold(Fault):
    def __init__(self, link: Link, direction: str, seconds: float | None) -> None:
        super().__init__(link)
        self._direction = direction
        self._seconds = seconds

    async def _hold(self, direction: str) -> None:
        if self._direction in (direction, "both"):
            self._strike()
            await asyncio.wait([self._over], timeout=self._seconds)


class _CutReply(Fault):
    def __init__(self, link: Link, count: int, containing: bytes) -> None:
        super().__init__(link)
        self._left = count
        self._containing = containing
        self._tails: dict[_Wire, bytes] = {}  # of what was sent: chunks may cut in two what is looked for

    def _fits(self, wire: _Wire, data: bytes) -> bool:
        sent = self._tails.get(wire, b"") + data
        self._tails[wire] = sent[max(0, len(sent) + 1 - len(self._containing)) :]
        return self._containing in sent

    def _take(self) -> bool:
        if self._over.done() or not self._left:
            return False
        self._left -= 1
        return True


class Link:
    """A TCP proxy in front of a server, on an ephemeral port of 127.0.0.1, with handles for faults.

    Used as a context manager it is started and stopped; `start` and `stop` do the same. Each handle takes effect
    before it returns, lasts as `Fault` says, and may be used from any thread. `stop` leaves no thread or socket
    behind. A child that is forked from this process has no part in it: there the object is good for its `url` alone.

    Args:
        url: the server's address: redis://, rediss:// (unless the client checks the host name), amqp://, or any
            other scheme if it has a port.

    Raises:
        ConfigurationError: the URL has no TCP address.
    """

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        try:
            port = self._parts.port or PORTS.get(self._parts.scheme)
        except ValueError:
            port = None
        if not self._parts.hostname or port is None:
            raise ConfigurationError(f"a link needs a host and a TCP port: this {self._parts.scheme} URL has not both")
        self._target = (self._parts.hostname, port)
        self._loop: asyncio.SelectorEventLoop | None = None
        self._faults: set[Fault] = set()
        self._wires: set[_Wire] = set()
        self._listener: socket.socket | None = None
        self._url: str | None = None

    def __enter__(self) -> Link:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The server's URL with the proxy's host and port; user, password, database and query are kept.

        Raises:
            LinkClosed: the link is not started.
        """
        if self._url is None:
            raise LinkClosed("the link has no address: it is not started")
        return self._url

    @property
    def connections(self) -> int:
        """How many connections are open, as far as the link has heard by now.

        Raises:
            LinkClosed: the link is not started.
        """
        return self._do(self._count())

    def start(self) -> None:
        """Open the port. The server may be down; clients are then hung up on.

        Raises:
            LinkClosed: it is started already, and has to be stopped first.
            ConfigurationError: the server's host name cannot be resolved.
        """
        if self._loop is not None:
            raise LinkClosed("the link is started already")
        try:
            self._addresses = socket.getaddrinfo(*self._target, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigurationError(f"a link cannot find the host {self._target[0]!r}: {error}") from None
        # Bound as long as the link is started: while it is cut, nobody else can get the port, and no client that
        # tries to connect can be given it as its own and so meet itself.
        self._guard = socket.socket()
        self._guard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._guard.bind(("127.0.0.1", 0))
        self._port: int = self._guard.getsockname()[1]
        login, at, _ = self._parts.netloc.rpartition("@")
        self._url = self._parts._replace(netloc=f"{login}{at}127.0.0.1:{self._port}").geturl()
        self._pid = os.getpid()
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="memolock-link", daemon=True)
        self._thread.start()
        self._do(self._listen())

    def stop(self) -> None:
        """End all faults, close all connections and the port; does nothing when it is not started."""
        if self._loop is None or os.getpid() != self._pid:
            return
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._guard.close()
        self._loop = self._url = None

    def cut(self) -> Fault:
        """Close all connections and refuse new ones.

        Raises:
            LinkClosed: the link is not started.
        """
        return self._have(_Cut(self))

    def drop(self) -> int:
        """Close the connections that are open now, once → how many; new ones are fine.

        Raises:
            LinkClosed: the link is not started.
        """
        return self._do(self._hang_up())

    def deaf(self, direction: Literal["replies", "commands", "both"] = "both") -> Fault:
        """Forward nothing in a direction, as when a network loses all packets. Connections stay open.

        At the end all that was held back is forwarded, in order, as TCP does when a network recovers: the server
        then runs the commands of clients that have given up long ago. New connections are made, and are as deaf.

        Args:
            direction: "replies", what the server sends; "commands", what clients send; "both".

        Raises:
            OptionError: there is no such direction.
            LinkClosed: the link is not started.
        """
        if direction not in ("replies", "commands", "both"):
            raise OptionError(f"direction={direction!r}: must be 'replies', 'commands' or 'both'")
        return self._have(_Hold(self, direction, None))

    def slow(self, seconds: float) -> Fault:
        """Delay each chunk of up to 64 KiB, either way, by so many seconds: a round trip takes twice as long.

        Raises:
            OptionError: the number is negative.
            LinkClosed: the link is not started.
        """
        if seconds < 0:
            raise OptionError(f"seconds={seconds!r}: must not be negative")
        return self._have(_Hold(self, "both", seconds))

    def cut_reply(self, count: int = 1, containing: bytes = b"") -> Fault:
        """Let a command through, and close its connection when the server has run it, before the reply gets out.

        The server has run it when it answers, and whatever else it had been sent on that connection by then it runs,
        too. So a pipeline that is sent at once counts as one command; and a subscription's message as an answer.

        Args:
            count: after so many replies the fault is over.
            containing: only commands with these bytes, as the client sends them. Default: any command, also those
                with which a client library opens a connection.

        Raises:
            OptionError: the count is not positive.
            LinkClosed: the link is not started.
        """
        if count < 1:
            raise OptionError(f"count={count!r}: must be positive")
        return self._have(_CutReply(self, count, containing))

    def _have(self, fault: Fault) -> Fault:
        self._do(fault._begin())
        return fault

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        """Have something done in the link's thread, where all of the link's state belongs."""
        if self._loop is None or os.getpid() != self._pid:
            work.close()
            raise LinkClosed("the link is not started")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # What follows runs in the link's thread.

    async def _close(self) -> None:
        for fault in tuple(self._faults):
            await fault._end()
        self._refuse()
        await self._hang_up()

    async def _count(self) -> int:
        self._accept()
        return len(self._wires)

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self._port), reuse_port=True)
            self._listener.setblocking(False)
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _refuse(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            _close(self._listener)
            self._listener = None

    def _accept(self) -> None:
        with suppress(OSError):  # nobody else is there; or somebody left before we came
            while self._listener is not None:
                client, _ = self._listener.accept()
                self._wires.add(_Wire(self, client))

    async def _hang_up(self) -> int:
        self._accept()
        wires = tuple(self._wires)
        for wire in wires:
            wire.hang_up()
        if wires:
            await asyncio.wait([wire.closed for wire in wires])
        return len(wires)


class _Wire:
    """One client's connection and the one to the server that is made for it. Lives in the link's thread."""

    def __init__(self, link: Link, client: socket.socket) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._client = client
        self._sockets = [client]
        self._pumps: set[asyncio.Task[None]] = set()
        self._marked: list[_CutReply] = []
        _prepare(client)
        self._spawn(self._commands())

    def hang_up(self) -> None:
        """Let both pumps end; then the sockets are closed."""
        for pump in self._pumps:
            pump.cancel()

    def _spawn(self, pump: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(pump)
        self._pumps.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, pump: asyncio.Task[None]) -> None:
        self._pumps.discard(pump)
        if not self._pumps:
            for each in self._sockets:
                _close(each)
            self._link._wires.discard(self)
            self.closed.set_result(None)

    async def _dial(self) -> socket.socket | None:
        for family, kind, protocol, _, address in self._link._addresses:
            server = socket.socket(family, kind, protocol)
            self._sockets.append(server)
            _prepare(server)
            with suppress(OSError):
                await self._loop.sock_connect(server, address)
                return server
        return None

    async def _commands(self) -> None:
        """Forward what the client sends. When it leaves, the server is told, and ends the connection."""
        server = await self._dial()
        if server is None:
            return
        self._spawn(self._replies(server))
        with suppress(OSError):
            while data := await self._read(self._client):
                await self._hold("commands")
                await self._loop.sock_sendall(server, data)
                cuts = [fault for fault in self._link._faults if isinstance(fault, _CutReply)]
                self._marked += [cut for cut in cuts if cut._fits(self, data)]
            await self._hold("commands")
            server.shutdown(socket.SHUT_WR)

    async def _replies(self, server: socket.socket) -> None:
        """Forward what the server sends. When it ends the connection, or a reply is to be cut, all is over."""
        with suppress(OSError):
            while data := await self._read(server):
                cut = next((cut for cut in self._marked if cut._take()), None)
                self._marked.clear()
                if cut is not None:
                    server.shutdown(socket.SHUT_WR)
                    while await self._read(server):
                        pass
                    cut._strike()
                    break
                await self._hold("replies")
                await self._loop.sock_sendall(self._client, data)
            else:
                await self._hold("replies")
        self.hang_up()

    async def _read(self, source: socket.socket) -> bytes:
        try:
            return await self._loop.sock_recv(source, CHUNK)
        except OSError:
            return b""

    async def _hold(self, direction: str) -> None:
        passed: set[Fault] = set()
        while ahead := self._link._faults - passed:  # some may have begun while others held us
            fault = ahead.pop()
            passed.add(fault)
            await fault._hold(direction)


def _prepare(end: socket.socket) -> None:
    end.setblocking(False)
    with suppress(OSError):  # some systems refuse it to a connection that is gone
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _close(end: socket.socket) -> None:
    with suppress(OSError):  # not connected any more
        end.shutdown(socket.SHUT_RDWR)  # else it lives on in children that were forked meanwhile
    end.close()
