"""The connection of an event loop: many callers' commands at once, each with its own patience."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from celery_memolock import MemoLock
from celery_memolock.pipe import Pipe
from celery_memolock.server import Server
from celery_memolock.testing import Link


@pytest.fixture
def link(server: Server) -> Iterator[Link]:
    """A link to the server."""
    with Link(server.url) as found:
        yield found


packed: Any = redis.Connection().pack_command


def pipe_to(url: str, **settings: Any) -> Pipe:
    pool = redis.ConnectionPool.from_url(url, **{"socket_timeout": 5.0, "socket_connect_timeout": 2.0, **settings})
    return Pipe(pool, packed)


async def ask(pipe: Pipe, *command: Any, patience: float | None = None) -> Any:
    (answer,) = await pipe.ask(packed(*command), 1, patience)
    return answer


def test_many_at_once(server: Server, prefix: str) -> None:
    """A thousand callers share one connection, and each gets its own answer, in whatever loop."""

    async def main() -> None:
        pipe = pipe_to(server.url)
        answers = await asyncio.gather(*(ask(pipe, "SETEX", f"{prefix}:{n}", 60, n) for n in range(1000)))
        assert answers == [b"OK"] * 1000
        answers = await asyncio.gather(*(ask(pipe, "GET", f"{prefix}:{n}") for n in range(1000)))
        assert answers == [str(n).encode() for n in range(1000)]
        clients = await ask(pipe, "CLIENT", "LIST", "TYPE", "NORMAL")
        assert clients.count(b"cmd=client|list") == 1

    for _ in range(2):
        asyncio.run(main())
    gc.collect()  # a connection that was not closed would complain here


def test_refusals_and_several_replies(server: Server, prefix: str) -> None:
    """Each command has its reply, be it a refusal."""

    async def main() -> None:
        pipe = pipe_to(server.url)
        commands = [*packed("SETEX", prefix, 60, "text"), *packed("INCR", prefix), *packed("GET", prefix)]
        first, second, third = await pipe.ask(commands, 3)
        assert (first, third) == (b"OK", b"text")
        assert isinstance(second, redis.ResponseError)

    asyncio.run(main())


def test_one_get_under_way_and_one_due(prefix: str) -> None:
    """Whoever asks while a GET is under way shares the next one, and never sees what was there before its call."""

    async def main(link: Link) -> None:
        pipe = pipe_to(link.url)
        await ask(pipe, "SETEX", prefix, 60, "old")
        stats = await ask(pipe, "INFO", "commandstats")
        before = int(stats.partition(b"cmdstat_get:calls=")[2].partition(b",")[0] or 0)
        with link.slow(0.05):
            first = asyncio.create_task(pipe.get(prefix, 5))
            await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)  # its answer is on the way back, or here
            second = asyncio.create_task(pipe.get(prefix, 5))
            await asyncio.sleep(0.01)
            with redis.Redis.from_url(link.url) as other:
                await asyncio.to_thread(other.set, prefix, "new", 60)
            late = [asyncio.create_task(pipe.get(prefix, 5)) for _ in range(100)]
            late[0].cancel()
            hurried = asyncio.create_task(pipe.get(prefix, 0.001))
            assert await first == b"old"
            assert await second in (b"old", b"new")
            assert await asyncio.gather(*late[1:]) == [b"new"] * 99
            with pytest.raises(redis.TimeoutError):
                await hurried
        stats = await ask(pipe, "INFO", "commandstats")
        assert int(stats.partition(b"cmdstat_get:calls=")[2].partition(b",")[0]) - before <= 4
        link.drop()
        assert await pipe.get(prefix, 5) == b"new"
        with link.cut():
            asked = [asyncio.create_task(pipe.get(prefix, 5)) for _ in range(3)]
            errors = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(error, redis.ConnectionError) for error in errors)
        assert len({id(error) for error in errors}) == 3
        assert await pipe.get(prefix, 5) == b"new"

    with Server() as own, Link(own.url) as link:  # nobody else's GETs are counted
        asyncio.run(main(link))


def test_cancelled_caller(link: Link, prefix: str) -> None:
    """A caller that is cancelled while its command travels takes no reply from the next one."""

    async def main() -> None:
        pipe = pipe_to(link.url)
        await ask(pipe, "SETEX", prefix, 60, "mine")
        with link.slow(0.05):
            waiting = asyncio.create_task(ask(pipe, "INCR", f"{prefix}:n"))
            await asyncio.sleep(0.01)
            other = asyncio.create_task(ask(pipe, "GET", prefix))
            await asyncio.sleep(0.01)
            waiting.cancel()
            assert await other == b"mine"
        assert waiting.cancelled()
        await ask(pipe, "DEL", f"{prefix}:n")

    asyncio.run(main())


def test_lost_reply_and_lost_connection(link: Link, prefix: str) -> None:
    """A command whose reply was lost is run again, and so is one for which the connection had been closed."""

    async def main() -> None:
        pipe = pipe_to(link.url)
        await ask(pipe, "SETEX", prefix, 60, 0)
        with link.cut_reply(containing=b"INCR") as lost:
            assert await ask(pipe, "INCR", prefix) == 2
            assert lost.count == 1
        link.drop()
        assert await ask(pipe, "GET", prefix) == b"2"
        with link.cut(), pytest.raises(redis.ConnectionError):
            await ask(pipe, "GET", prefix)
        assert await ask(pipe, "GET", prefix) == b"2"

    asyncio.run(main())


@pytest.mark.parametrize("connected", [True, False])
def test_patience(link: Link, prefix: str, connected: bool) -> None:
    """Each caller waits as long as it said; a server that is silent for too long costs the connection."""

    async def main() -> None:
        pipe = pipe_to(link.url, socket_timeout=3.0)
        if connected:
            await ask(pipe, "SETEX", prefix, 60, "here")
        with link.deaf():
            began = time.monotonic()
            patient = asyncio.create_task(ask(pipe, "GET", prefix))
            with pytest.raises(redis.TimeoutError):
                await ask(pipe, "GET", prefix, patience=0.2)
            assert time.monotonic() - began < 2
            with pytest.raises(redis.TimeoutError):
                await patient
            assert 2.5 < time.monotonic() - began < 20
        assert await ask(pipe, "SETEX", prefix, 60, "again") == b"OK"

    asyncio.run(main())


def test_given_up_write_is_not_sent_later(link: Link, server: Server, prefix: str) -> None:
    """Of a command that failed the rest is not sent when the link recovers: it would undo what was done meanwhile."""

    async def main() -> None:
        pipe = pipe_to(link.url, socket_timeout=0.3)
        await ask(pipe, "PING")
        with redis.Redis.from_url(server.url) as other:
            with link.deaf("commands"):
                with pytest.raises(redis.TimeoutError):
                    await ask(pipe, "SETEX", prefix, 60, b"older" * 8_000_000)  # more than any socket takes
                other.set(prefix, "newer", 60)
            while link.connections:
                await asyncio.sleep(0.01)
            assert other.get(prefix) == b"newer"

    asyncio.run(main())


def test_patience_behind_a_large_write(link: Link, prefix: str) -> None:
    """Nobody waits any longer as somebody else's write fills the socket of a server that is frozen."""

    async def main() -> None:
        pipe = pipe_to(link.url)
        await ask(pipe, "PING")
        with link.deaf("commands"):
            large = asyncio.create_task(ask(pipe, "SETEX", prefix, 60, b"large" * 8_000_000))
            await asyncio.sleep(0.1)
            large.cancel()
            with pytest.raises(redis.TimeoutError):
                await asyncio.wait_for(ask(pipe, "GET", prefix, patience=0.2), 4)

    asyncio.run(main())


def test_reply_that_takes_its_time(link: Link, server: Server, prefix: str) -> None:
    """What counts against the time-out is silence: a reply may take longer to arrive, and so may those behind it."""

    async def main() -> None:
        pipe = pipe_to(link.url, socket_timeout=2.0)
        await ask(pipe, "PING")
        with redis.Redis.from_url(server.url) as other:
            other.set(prefix, b"large" * 400_000, 60)
        with link.slow(0.1):  # each of more than thirty pieces
            began = time.monotonic()
            large = asyncio.create_task(ask(pipe, "GET", prefix, patience=60))
            small = asyncio.create_task(ask(pipe, "ECHO", "small"))
            await asyncio.sleep(0)  # these go first
            with pytest.raises(redis.TimeoutError):
                await ask(pipe, "ECHO", "hurried", patience=0.7)
            assert 0.6 < time.monotonic() - began < 2
            assert len(await large) == 2_000_000
            assert await small == b"small"
            assert time.monotonic() - began > 2.5
        assert await ask(pipe, "ECHO", "next") == b"next"

    asyncio.run(main())


def test_silence_that_nobody_waited_out(link: Link) -> None:
    """A connection is replaced after too long a silence, even if all who waited for a reply were cancelled before."""

    async def main() -> None:
        pipe = pipe_to(link.url, socket_timeout=0.5)
        await ask(pipe, "PING")
        first = pipe._link
        with link.deaf():
            for _ in range(3):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(ask(pipe, "PING"), 0.3)
        assert await ask(pipe, "PING") == b"PONG"
        assert pipe._link is not first

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning")
@pytest.mark.parametrize("how", ["ended", "closed"])
def test_loops_are_not_kept(link: Link, prefix: str, how: str) -> None:
    """Of loops that are over at most the last is kept, and its connection, also of those that were merely closed."""
    memo = MemoLock(link.url, prefix=prefix, ttl=60)
    loops: list[weakref.ref[Any]] = []

    async def main(number: int) -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        assert await memo.aget(f"k{number}", lambda: number) == number

    def run(number: int) -> None:
        if how == "ended":
            asyncio.run(main(number))
        else:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(main(number))
            loop.close()

    most = []
    for number in range(8):
        run(number)
        most.append(link.connections)
    gc.collect()
    assert sum(each() is not None for each in loops) <= 1
    assert most[-1] <= most[1] + 1  # one that was just closed may still be counted
    memo.close()
    gc.collect()
    assert all(each() is None for each in loops)


def test_closed_loops_are_quiet(server: Server, prefix: str) -> None:
    """A process in which a loop was closed without the end of its tasks has nothing to say at its exit."""
    done = subprocess.run(
        [sys.executable, "-c", _CLOSES_ITS_LOOP, server.url, prefix], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n1\n1\n", "")


_CLOSES_ITS_LOOP = """
import asyncio, gc, sys
from celery_memolock import MemoLock

memo = MemoLock(sys.argv[1], prefix=sys.argv[2], ttl=60)
for _ in range(3):
    loop = asyncio.new_event_loop()
    print(loop.run_until_complete(memo.aget("k", lambda: 1)))
    loop.close()
memo.close()
gc.collect()
"""


def test_close_is_for_good(link: Link) -> None:
    """Whoever waits at the end for a reply, or a connection, is told so, and no other connection is made."""

    async def main() -> None:
        for connected in (True, False):
            pipe = pipe_to(link.url)
            if connected:
                await ask(pipe, "PING")
            with link.deaf() as fault:
                asked = asyncio.create_task(ask(pipe, "PING"))
                while not fault.count:
                    await asyncio.sleep(0.01)
                pipe.close()
                if connected:
                    with pytest.raises(redis.ConnectionError, match="was closed"):
                        await asked
            with pytest.raises(redis.ConnectionError, match="was closed"):
                await asked
            with pytest.raises(redis.ConnectionError, match="was closed"):
                await ask(pipe, "PING")
            while link.connections:
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_unix_socket(prefix: str) -> None:
    """It takes the client's settings, whatever the way."""

    async def main(url: str) -> None:
        assert await ask(pipe_to(url), "SETEX", prefix, 60, 1) == b"OK"

    with Server(unix_socket=True) as server:
        asyncio.run(main(server.url))
