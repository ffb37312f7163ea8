"""The link: every fault with a real server behind it, and nothing left over afterwards."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_memolock.errors import ConfigurationError, OptionError
from celery_memolock.server import Server
from celery_memolock.testing import Link, LinkClosed

DEADLINE = 10.0


@contextmanager
def client_of(url: str, retries: int = 0, timeout: float = DEADLINE) -> Iterator[Any]:
    """Have a client; Any, because half of it is untyped."""
    patience: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    retry: Any = Retry(NoBackoff(), retries)
    with redis.Redis.from_url(url, retry=retry, retry_on_error=[redis.ConnectionError], **patience) as client:
        yield client


def connected(link: Link) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(link.url).port or 0), DEADLINE)


def command(*words: str) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words)


def wait_for_connections(link: Link, number: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while link.connections != number:
        assert time.monotonic() < deadline, f"{link.connections} connections, not {number}"
        time.sleep(0.002)


@pytest.fixture
def link(server: Server) -> Iterator[Link]:
    """A link to the server."""
    with Link(server.url) as started:
        yield started


@pytest.fixture
def direct(server: Server) -> Iterator[Any]:
    """A client beside the link."""
    with client_of(server.url) as client:
        yield client


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for clients that a fault holds up."""
    with ThreadPoolExecutor(8) as threads:
        yield threads


# ---- the link itself


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("redis://example.test:1234/3?socket_timeout=2", "redis://127.0.0.1:{}/3?socket_timeout=2"),
        ("rediss://:p%40ss@localhost/0", "rediss://:p%40ss@127.0.0.1:{}/0"),
        ("redis://user:a@b@[::1]:1234", "redis://user:a@b@127.0.0.1:{}"),
        ("amqp://guest:guest@localhost//", "amqp://guest:guest@127.0.0.1:{}//"),
    ],
)
def test_url(given: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only host and port of the URL are replaced."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    with Link(given) as link:
        assert link.url == expected.format(urlsplit(link.url).port)
        assert urlsplit(link.url).port not in (None, 1234, 6379, 5672)


@pytest.mark.parametrize(
    "url", ["unix:///tmp/redis.sock?db=0", "nats://:secret@localhost", "redis://:secret@a:99999/0"]
)
def test_url_without_an_address(url: str) -> None:
    """What has no TCP address is refused, and the message keeps the password to itself."""
    with pytest.raises(ConfigurationError, match="host and a TCP port") as raised:
        Link(url)
    assert "secret" not in str(raised.value)


def test_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that cannot be found is said so at the start, which leaves nothing behind."""

    def nobody(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("not known")

    link = Link("redis://nobody.invalid:1234/0")
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    with pytest.raises(ConfigurationError, match=r"nobody\.invalid"):
        link.start()
    link.stop()


def test_wrong_arguments(link: Link) -> None:
    """Arguments that make no sense are errors at the call."""
    with pytest.raises(OptionError, match="direction='up'"):
        link.deaf("up")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="seconds=-1"):
        link.slow(-1)
    with pytest.raises(OptionError, match="count=0"):
        link.cut_reply(0)


def test_not_started(server: Server) -> None:
    """Before its start and after its stop a link says so, and a fault that outlives it ends quietly."""
    link = Link(server.url)
    link.stop()
    for use in (lambda: link.url, lambda: link.connections, link.cut, link.drop):
        with pytest.raises(LinkClosed):
            use()
    with link, pytest.raises(LinkClosed, match="already"):
        link.start()
    with link, link.cut():
        link.stop()
    with link, client_of(link.url) as client:
        assert client.ping()


def test_forwards_much(link: Link, prefix: str) -> None:
    """What is larger than a chunk arrives unharmed, both ways."""
    value = os.urandom(8 * 1024 * 1024)
    with client_of(link.url) as client:
        client.set(prefix, value, px=60_000)
        assert client.get(prefix) == value


def test_connections(link: Link) -> None:
    """It counts the connections that are open, from the moment they are made."""
    assert link.connections == 0
    with connected(link), connected(link):
        assert link.connections == 2
    wait_for_connections(link, 0)


def test_commands_of_a_client_that_leaves_are_run(link: Link, direct: Any, prefix: str) -> None:
    """A client may send and close: what it sent is run before its end reaches the server."""
    with connected(link) as client:
        client.sendall(command("RPUSH", prefix, *"abc") * 1000)
    wait_for_connections(link, 0)
    assert direct.llen(prefix) == 3000


def test_a_server_that_is_away() -> None:
    """While the server is dead clients are hung up on; when it is back the same link leads to it."""
    with Server() as server, Link(server.url) as link, client_of(link.url) as client:
        assert client.ping()
        server.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        wait_for_connections(link, 0)
        server.start()
        assert client.ping()


def test_leaves_nothing(server: Server) -> None:
    """After the stop neither a thread nor a socket is there, whatever was going on."""
    gc.collect()
    before = set(os.listdir("/dev/fd"))  # noqa: PTH208
    for ending in ("idle", "deaf", "slow", "cut", "reply"):
        with Link(server.url) as link, connected(link) as client:
            url = link.url
            if ending == "cut":
                link.cut()
            elif ending != "idle":
                fault = link.deaf() if ending == "deaf" else link.slow(600) if ending == "slow" else link.cut_reply()
                client.sendall(command("PING"))
                assert fault.wait()
            link.stop()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), DEADLINE)
    assert set(os.listdir("/dev/fd")) == before  # noqa: PTH208
    assert "memolock-link" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork(link: Link) -> None:
    """A forked child cannot use the link, and what it inherited keeps no connection of the parent alive."""
    with connected(link) as client:
        assert link.connections == 1
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                link.drop()
            except LinkClosed:
                link.stop()
                os.write(theirs, b"closed")
            signal.pause()
        try:
            os.close(theirs)
            assert os.read(ours, 16) == b"closed"
            with link.cut():
                assert client.recv(1) == b""
                with pytest.raises(ConnectionRefusedError):
                    connected(link)
            with client_of(link.url) as other:
                assert other.ping()
        finally:
            os.close(ours)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


# ---- cut and drop


def test_cut(link: Link) -> None:
    """A cut link closes what is open and refuses what comes, until the end of the block."""
    with client_of(link.url) as client, connected(link) as idle:
        assert client.ping()
        with link.cut() as cut:
            assert (cut.count, link.connections) == (2, 0)
            assert idle.recv(1) == b""
            for _ in range(3):
                with pytest.raises(redis.ConnectionError, match="refused"):
                    client.ping()
        assert client.ping()


def test_cuts_in_each_other(link: Link) -> None:
    """The link is whole again when the last of several cuts has ended, and ending one twice does no harm."""
    first, second = link.cut(), link.cut()
    first.end()
    first.end()
    with pytest.raises(ConnectionRefusedError):
        connected(link)
    second.end()
    with client_of(link.url) as client:
        assert client.ping()


def test_drop(link: Link) -> None:
    """A drop closes every connection once; a client that reconnects hardly notices."""
    with client_of(link.url, retries=1) as client, connected(link) as idle:
        number = client.client_id()
        assert link.drop() == 2
        assert idle.recv(1) == b""
        assert client.client_id() != number
        assert link.drop() == 1
        assert link.drop() == 0


def test_drops_at_all_times(link: Link, pool: ThreadPoolExecutor, prefix: str) -> None:
    """Drops and cuts from several threads under load end the load's connections and nothing else."""
    done = threading.Event()

    def load() -> int:
        errors = 0
        with client_of(link.url) as client:
            while not done.is_set():
                try:
                    client.set(prefix, "x" * 100_000, px=60_000)
                except redis.ConnectionError:
                    errors += 1
        return errors

    def harm() -> None:
        for _ in range(30):
            link.drop()
            with link.slow(0.001), link.cut():
                pass

    loads = [pool.submit(load) for _ in range(4)]
    harms = [pool.submit(harm) for _ in range(3)]
    for each in harms:
        each.result(60)
    done.set()
    assert sum(each.result(60) for each in loads) > 0
    wait_for_connections(link, 0)
    with client_of(link.url) as client:
        assert client.ping()


def test_a_subscriber_is_dropped_and_comes_back(link: Link, direct: Any, prefix: str) -> None:
    """A subscription that lost its connection is made again over the same link."""
    with client_of(link.url, retries=1) as client, client.pubsub() as listener:
        listener.subscribe(prefix)
        assert listener.get_message(timeout=DEADLINE)["type"] == "subscribe"
        link.drop()
        assert listener.get_message(timeout=DEADLINE)["type"] == "subscribe"
        direct.publish(prefix, "again")
        assert listener.get_message(timeout=DEADLINE)["data"] == b"again"


# ---- deaf and slow


def test_deaf_to_replies(link: Link, direct: Any, pool: ThreadPoolExecutor, prefix: str) -> None:
    """The server runs the command, and its reply comes after the block."""
    with client_of(link.url) as client:
        assert client.ping()
        with link.deaf("replies") as fault:
            answer = pool.submit(client.incr, prefix)
            assert fault.wait()
            assert (direct.get(prefix), answer.done(), link.connections) == (b"1", False, 1)
        assert answer.result(DEADLINE) == 1


def test_deaf_to_commands(link: Link, direct: Any, pool: ThreadPoolExecutor, prefix: str) -> None:
    """The command reaches the server after the block."""
    with client_of(link.url) as client:
        assert client.ping()
        with link.deaf("commands") as fault:
            answer = pool.submit(client.incr, prefix)
            assert fault.wait()
            assert (direct.get(prefix), answer.done(), link.connections) == (None, False, 1)
        assert answer.result(DEADLINE) == 1


def test_commands_of_a_client_that_gave_up(link: Link, direct: Any, prefix: str) -> None:
    """What was held back is run even if its client timed out, on its own connection, in order."""
    with link.deaf() as fault:
        with connected(link) as client:
            client.sendall(command("RPUSH", prefix, "late"))
            assert fault.wait()
        assert direct.llen(prefix) == 0
    wait_for_connections(link, 0)
    assert direct.lrange(prefix, 0, -1) == [b"late"]


def test_deaf_to_new_connections(link: Link) -> None:
    """New connections are made, and time out."""
    with link.deaf(), client_of(link.url, timeout=0.05) as client, pytest.raises(redis.TimeoutError):
        client.ping()


def test_deaf_and_then_cut(link: Link, direct: Any, prefix: str) -> None:
    """A cut ends the connections of a deaf link, and what was held back is lost."""
    with link.deaf() as deaf, connected(link) as client:
        client.sendall(command("INCR", prefix))
        assert deaf.wait()
        with link.cut() as cut:
            assert cut.count == 1
            assert client.recv(1) == b""
    with client_of(link.url) as other:
        assert other.get(prefix) is None
    assert direct.get(prefix) is None


def test_slow(link: Link) -> None:
    """Each way takes its time."""
    with client_of(link.url) as client:
        assert client.ping()
        with link.slow(0.05) as fault:
            began = time.monotonic()
            assert client.ping()
            assert time.monotonic() - began >= 0.1
            assert fault.count == 2


def test_slow_ends_with_the_block(link: Link, pool: ThreadPoolExecutor) -> None:
    """What is being delayed goes on at once when the block ends."""
    with client_of(link.url) as client:
        assert client.ping()
        with link.slow(600) as fault:
            answer = pool.submit(client.ping)
            assert fault.wait()
        assert answer.result(DEADLINE)


# ---- cut replies


def test_cut_reply(link: Link, direct: Any, prefix: str) -> None:
    """The command is run, its client gets an error instead of the reply, and the next command is none of it."""
    with client_of(link.url) as client:
        with link.cut_reply(containing=b"INCR") as fault:
            assert client.ping()
            assert fault.count == 0
            with pytest.raises(redis.ConnectionError):
                client.incr(prefix)
            assert fault.count == 1
            assert direct.get(prefix) == b"1"
            assert client.incr(prefix) == 2
        assert fault.count == 1


def test_cut_reply_and_the_clients_retry(link: Link, prefix: str) -> None:
    """The client's own retry runs the command once more."""
    with client_of(link.url, retries=1) as client, link.cut_reply(containing=b"INCR") as fault:
        assert client.incr(prefix) == 2
        assert fault.count == 1


def test_cut_several_replies(link: Link, prefix: str) -> None:
    """As many replies are cut as were asked for, and of any command by default."""
    with client_of(link.url, retries=3) as client, link.cut_reply(3, containing=b"INCR") as fault:
        assert client.incr(prefix) == 4
        assert fault.count == 3
    with connected(link) as raw, link.cut_reply() as fault:
        raw.sendall(command("PING"))
        assert raw.recv(1) == b""
        assert fault.count == 1


def test_cut_reply_ends_with_the_block(link: Link, prefix: str) -> None:
    """A fault that has not struck by its end never does."""
    with client_of(link.url) as client:
        with link.cut_reply(containing=b"INCR") as fault:
            assert client.ping()
        assert client.incr(prefix) == 1
        assert not fault.wait(timeout=0)


def test_cut_reply_of_a_command_in_pieces(link: Link, direct: Any, prefix: str) -> None:
    """What is looked for is found where two chunks meet, too, and the whole command is run."""
    with connected(link) as raw, link.cut_reply(containing=b"INCR") as fault, link.slow(600) as slow:
        whole = command("INCR", prefix)
        middle = whole.index(b"INCR") + 2
        raw.sendall(whole[:middle])
        assert slow.wait()  # the first piece is on its way alone
        raw.sendall(whole[middle:])
        slow.end()
        assert raw.recv(1) == b""
        assert fault.count == 1
        assert direct.get(prefix) == b"1"


def test_cut_reply_of_a_pipeline(link: Link, direct: Any, prefix: str) -> None:
    """All commands of a small pipeline are run, and none of its replies gets out."""
    with client_of(link.url) as client, link.cut_reply(containing=b"INCR") as fault:
        pipeline = client.pipeline(transaction=False)
        for _ in range(100):
            pipeline.incr(prefix)
        with pytest.raises(redis.ConnectionError):
            pipeline.execute()
        assert fault.count == 1
        assert direct.get(prefix) == b"100"


def test_cut_reply_of_a_blocking_command(link: Link, direct: Any, pool: ThreadPoolExecutor, prefix: str) -> None:
    """A message that a blocked client was given by the server is lost with the reply."""
    with client_of(link.url) as client, link.cut_reply(containing=b"BLPOP") as fault:
        popped = pool.submit(client.blpop, prefix, DEADLINE)
        wait_for_connections(link, 1)
        direct.rpush(prefix, "message")
        with pytest.raises(redis.ConnectionError):
            popped.result(DEADLINE)
        assert fault.count == 1
        assert direct.llen(prefix) == 0


def test_cut_replies_of_many_clients(link: Link, direct: Any, pool: ThreadPoolExecutor, prefix: str) -> None:
    """With many clients at once just as many replies are cut as were asked for."""

    def count() -> None:
        with client_of(link.url, retries=3) as client:
            for _ in range(50):
                client.incr(prefix)

    with link.cut_reply(3, containing=b"INCR") as fault:
        for each in [pool.submit(count) for _ in range(8)]:
            each.result(60)
        assert fault.count == 3
    assert direct.get(prefix) == b"403"
