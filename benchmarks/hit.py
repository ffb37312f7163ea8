"""What a hit costs: beside the client's own GET and JSON decoding, beside other caches, and beside a bare socket.

Each lane (a way to the server, and a number of threads or tasks) has its contenders measured in one process,
interleaved, round after round; a ratio is formed within its round.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from aiocache import cached as aiocached  # type: ignore[import-untyped]
from aiocache.backends.redis import RedisCache  # type: ignore[import-untyped]
from aiocache.serializers import JsonSerializer  # type: ignore[import-untyped]
from cashews import Cache
from celery import Celery
from dogpile.cache import make_region

from benchmarks.harness import arguments, record, spread
from celery_memolock import memolocked_task
from celery_memolock.server import Server

VALUE = {"queue": "q1", "waiting": 5500, "names": ["ada", "grace", "edsger"]}
Get = Callable[[], Any]


def memolocked(url: str) -> Any:
    """Return a task whose value is stored already."""
    app = Celery("benchmarks.hit")
    app.conf.memolock_redis_url = url

    @memolocked_task(ttl=600, app=app)
    def queue_size(queue_id: str) -> dict[str, object]:
        return dict(VALUE)

    queue_size.set_cached(dict(VALUE), "q1")
    return queue_size


def bare_socket(url: str) -> Get:
    """Return a function that sends a ready-made GET over a socket and reads the answer: the limit."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        link = socket.socket(socket.AF_UNIX)
        link.connect(parts.path)
    else:
        link = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 6379))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get() -> object:
        link.sendall(b"*2\r\n$3\r\nGET\r\n$4\r\nbare\r\n")
        return link.recv(65536)

    return get


def dogpile(url: str) -> Get:
    """Return dogpile.cache's decorated function, with its value stored."""
    region = make_region().configure(
        "dogpile.cache.redis",
        expiration_time=600,
        arguments={"url": url, "distributed_lock": True, "thread_local_lock": False},
    )

    @region.cache_on_arguments()
    def queue_size(queue_id: str) -> dict[str, object]:
        return dict(VALUE)

    queue_size("q1")
    return lambda: queue_size("q1")


def in_threads(url: str) -> dict[str, Get]:
    """Return the contenders of a lane of threads."""
    client = redis.Redis.from_url(url)
    client.set("bare", json.dumps(VALUE))
    task = memolocked(url)
    contenders: dict[str, Get] = {
        "redis.Redis.get + json.loads": lambda: json.loads(client.get("bare")),  # type: ignore[arg-type]
        "get_cached": lambda: task.get_cached("q1"),
    }
    if url.startswith("redis"):
        contenders["dogpile.cache"] = dogpile(url)
    return contenders


async def in_tasks(url: str) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Return the contenders of a lane of asyncio tasks."""
    client = redis.asyncio.Redis.from_url(url)
    await client.set("bare", json.dumps(VALUE))
    task = memolocked(url)
    cashews = Cache()
    cashews.setup(url)
    parts = urlsplit(url)

    @cashews(ttl="10m", key="cashews:{queue_id}")
    async def of_cashews(queue_id: str) -> dict[str, object]:
        return dict(VALUE)

    @aiocached(ttl=600, cache=RedisCache, endpoint=parts.hostname, port=parts.port, serializer=JsonSerializer())
    async def of_aiocache(queue_id: str) -> dict[str, object]:
        return dict(VALUE)

    async def of_client() -> Any:
        return json.loads(await client.get("bare"))

    return {
        "redis.asyncio.Redis.get + json.loads": of_client,
        "aget_cached": lambda: task.aget_cached("q1"),
        "cashews": lambda: of_cashews("q1"),
        "aiocache": lambda: of_aiocache("q1"),
    }


def threaded(get: Get, threads: int, calls: int) -> float:
    """Return microseconds per call, with all threads together."""
    start = threading.Barrier(threads + 1)

    def ask() -> None:
        start.wait()
        for _ in range(calls // threads):
            get()

    crowd = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in crowd:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in crowd:
        thread.join()
    return (time.perf_counter() - began) / calls * 1e6


async def tasked(get: Callable[[], Awaitable[Any]], tasks: int, calls: int) -> float:
    """Return microseconds per call, with all tasks together."""

    async def ask() -> None:
        for _ in range(calls // tasks):
            await get()

    began = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(tasks)))
    return (time.perf_counter() - began) / calls * 1e6


def figures(rounds: list[dict[str, float]], ours: str) -> dict[str, Any]:
    """Return the spread of each contender, and of what ours is a multiple of within a round."""
    return {
        "microseconds": {name: spread([each[name] for each in rounds]) for name in rounds[0]},
        f"{ours} as a multiple of": {
            name: spread([each[ours] / each[name] for each in rounds]) for name in rounds[0] if name != ours
        },
    }


def thread_lane(url: str, threads: int, rounds: int, calls: int) -> dict[str, Any]:
    contenders = in_threads(url)
    if threads == 1:
        contenders["bare socket GET"] = bare_socket(url)
    for get in contenders.values():
        threaded(get, threads, calls // 4)
    found = []
    for _ in range(rounds):
        order = random.sample(sorted(contenders), len(contenders))
        found.append({name: threaded(contenders[name], threads, calls) for name in order})
    return figures(found, "get_cached")


def task_lane(url: str, tasks: int, rounds: int, calls: int) -> dict[str, Any]:
    async def main() -> list[dict[str, float]]:
        contenders = await in_tasks(url)
        for get in contenders.values():
            await tasked(get, tasks, calls // 4)
        found = []
        for _ in range(rounds):
            order = random.sample(sorted(contenders), len(contenders))
            found.append({name: await tasked(contenders[name], tasks, calls) for name in order})
        return found

    return figures(asyncio.run(main()), "aget_cached")


def main() -> None:
    args = arguments(__doc__, rounds=15, calls=3200)
    with ExitStack() as stack:
        tcp = stack.enter_context(Server()).url
        unix = stack.enter_context(Server(unix_socket=True)).url
        results = {
            "1 thread, TCP": thread_lane(tcp, 1, args.rounds, args.calls),
            "1 thread, unix socket": thread_lane(unix, 1, args.rounds, args.calls),
            "16 threads, TCP": thread_lane(tcp, 16, args.rounds, args.calls),
            "asyncio, 1 task, TCP": task_lane(tcp, 1, args.rounds, args.calls),
            "asyncio, 100 tasks, TCP": task_lane(tcp, 100, args.rounds, args.calls),
        }
        record("hit", tcp, results, args)


if __name__ == "__main__":
    main()
