"""Other ways to share one computation, as `herd` and `miss` ask: each at the settings that serve it best here."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from hashlib import sha1
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
import redis_lock  # type: ignore[import-untyped]
from aiocache import cached_stampede  # type: ignore[import-untyped]
from aiocache.backends.redis import RedisCache  # type: ignore[import-untyped]
from aiocache.serializers import JsonSerializer  # type: ignore[import-untyped]
from cashews import Cache
from dogpile.cache import make_region
from rq import Queue
from rq.exceptions import DuplicateJobError
from rq.job import Job

__all__ = [
    *("Tasked", "Threaded", "of_aiocache", "of_cashews", "of_dogpile", "of_redis_lock", "of_rq", "of_rq_unique"),
    *("the_least", "the_least_in_loop"),
]

Threaded = Callable[[str], Any]
Tasked = Callable[[str], Awaitable[Any]]

LONG = 600
LOCK_SECONDS = 60


def of_rq_unique(queue: Queue, function: Threaded) -> Threaded:
    """Send a job whose id is the key's; who comes second asks for the result of the first."""

    def ask(key: str) -> Any:
        name = sha1(key.encode()).hexdigest()
        try:
            job = queue.enqueue(function, key, job_id=name, unique=True, result_ttl=LONG)
        except DuplicateJobError:
            job = Job.fetch(name, connection=queue.connection)
        return _result_of(job)

    return ask


def of_rq(queue: Queue, function: Threaded) -> Threaded:
    """Send a job for each call."""
    return lambda key: _result_of(queue.enqueue(function, key))


def _result_of(job: Job) -> Any:
    result = job.latest_result(timeout=30)
    assert result is not None
    return result.return_value


def of_dogpile(url: str, function: Threaded, lock_sleep: float = 0.1) -> Threaded:
    region = make_region().configure(
        "dogpile.cache.redis",
        expiration_time=LONG,
        arguments={"url": url, "distributed_lock": True, "thread_local_lock": False, "lock_sleep": lock_sleep},
    )
    return region.cache_on_arguments()(function)


def of_redis_lock(url: str, function: Threaded) -> Threaded:
    """Look, and once more under the lock. Those who wait for it sleep in BLPOP, and get it one after the other."""
    client = redis.Redis.from_url(url, socket_timeout=2 * LOCK_SECONDS)

    def ask(key: str) -> Any:
        found: Any = client.get(key)
        if found is None:
            with redis_lock.Lock(client, key, expire=LOCK_SECONDS):
                found = client.get(key)
                if found is None:
                    found = json.dumps(function(key))
                    client.set(key, found, ex=LONG)
        return json.loads(found)

    return ask


def of_cashews(url: str, function: Tasked) -> Tasked:
    cache = Cache()
    cache.setup(url)
    return cache(ttl=LONG, key="{key}", lock=True)(function)


def of_aiocache(url: str, function: Tasked) -> Tasked:
    parts = urlsplit(url)
    where = {"cache": RedisCache, "endpoint": parts.hostname, "port": parts.port, "serializer": JsonSerializer()}
    ask: Tasked = cached_stampede(lease=LOCK_SECONDS, ttl=LONG, key_builder=lambda _, key: key, **where)(function)
    return ask


def the_least(url: str, function: Threaded) -> Threaded:
    """Send the four commands that no lock around a cache does without. Nobody can wait for this one."""
    client = redis.Redis.from_url(url)

    def ask(key: str) -> Any:
        found: Any = client.get(key)
        assert found is None
        assert client.set(f"lock:{key}", "1", nx=True, ex=LOCK_SECONDS)
        value = function(key)
        client.set(key, json.dumps(value), ex=LONG)
        client.delete(f"lock:{key}")
        return value

    return ask


def the_least_in_loop(url: str, function: Tasked) -> Tasked:
    """Do what `the_least` does, from asyncio."""
    client = redis.asyncio.Redis.from_url(url)

    async def ask(key: str) -> Any:
        assert await client.get(key) is None
        assert await client.set(f"lock:{key}", "1", nx=True, ex=LOCK_SECONDS)
        value = await function(key)
        await client.set(key, json.dumps(value), ex=LONG)
        await client.delete(f"lock:{key}")
        return value

    return ask
