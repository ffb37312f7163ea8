"""The connection of an event loop: many callers' commands at once, each with its own patience."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

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


def test_one_get_under_way_and_one_due(link: Link, prefix: str) -> None:
    """Whoever asks while a GET is under way shares the next one, and never sees what was there before its call."""

    async def main() -> None:
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

    asyncio.run(main())


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
        pipe = pipe_to(link.url, socket_timeout=1.0)
        if connected:
            await ask(pipe, "SETEX", prefix, 60, "here")
        with link.deaf():
            began = time.monotonic()
            patient = asyncio.create_task(ask(pipe, "GET", prefix))
            with pytest.raises(redis.TimeoutError):
                await ask(pipe, "GET", prefix, patience=0.2)
            assert time.monotonic() - began < 0.8
            with pytest.raises(redis.TimeoutError):
                await patient
            assert 0.8 < time.monotonic() - began < 5
        assert await ask(pipe, "SETEX", prefix, 60, "again") == b"OK"

    asyncio.run(main())


def test_unix_socket(prefix: str) -> None:
    """It takes the client's settings, whatever the way."""

    async def main(url: str) -> None:
        assert await ask(pipe_to(url), "SETEX", prefix, 60, 1) == b"OK"

    with Server(unix_socket=True) as server:
        asyncio.run(main(server.url))
