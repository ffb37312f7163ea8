"""The server of flights fails: frozen, dead, emptied, full, read-only, or without its scripts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from celery_memolock import StoreUnavailable, WaitTimeout
from celery_memolock.server import Server
from tests.workers.conftest import in_background, until
from tests.workers.shop import Shop

Start = Callable[..., Any]
Measured = Callable[[str], Any]


@pytest.fixture
def made(server: Server, own_server: Server, start_worker: Start) -> Shop:
    """A shop whose worker has its broker and its records on one server, and its flights on another."""
    found, _ = start_worker(server.url, own_server.url, "--concurrency", "2", records=server.url)
    return found  # type: ignore[no-any-return]


def test_notices_lost(made: Shop, own_server: Server, key: str, measured: Measured) -> None:
    """A caller whose listener's link is cut while it waits gets its value all the same."""
    waiter = in_background(made.gated.get_cached, key)
    made.await_start(key)
    client = redis.Redis.from_url(own_server.url)
    with measured("the listener's link is cut, and the notice lost"):
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        made.open_gate(key)
        assert waiter.result(20) == "open"


def test_scripts_flushed(made: Shop, own_server: Server, key: str, measured: Measured) -> None:
    """A server that forgot the scripts is given them again, in mid-run too."""
    waiter = in_background(made.gated.get_cached, key)
    made.await_start(key)
    redis.Redis.from_url(own_server.url).script_flush()
    with measured("SCRIPT FLUSH in mid-run"):
        made.open_gate(key)
        assert waiter.result(20) == "open"


def test_emptied(made: Shop, own_server: Server, key: str, measured: Measured) -> None:
    """When the server loses everything in mid-run the caller starts anew; the first run's value is refused."""
    waiter = in_background(made.gated.get_cached, key)
    made.await_start(key)
    with measured("FLUSHALL in mid-run"):
        redis.Redis.from_url(own_server.url).flushall()
        made.await_start(key)
        made.open_gate(key, "first")
        made.open_gate(key, "second")
        assert waiter.result(20) == "second"
    assert made.gated.peek(key) == "second"


def test_restarted_empty(made: Shop, own_server: Server, key: str, measured: Measured) -> None:
    """The same when it is killed and comes back without data: at most the work is done twice."""
    waiter = in_background(made.gated.get_cached, key)
    made.await_start(key)
    own_server.kill()
    own_server.restart()
    with measured("the server is killed in mid-run, and back without data"):
        made.await_start(key)
        made.open_gate(key, "first")
        made.open_gate(key, "second")
        assert waiter.result(20) == "second"


def test_dead(made: Shop, own_server: Server, key: str, measured: Measured) -> None:
    """While it is dead callers hear so at once, waiting ones too; afterwards all works without a restart."""
    waiter = in_background(made.gated.get_cached, key)
    made.await_start(key)
    own_server.kill()
    with measured("the server is dead: the error of a new call"), pytest.raises(StoreUnavailable):
        made.stock.get_cached(key)
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        waiter.result(5)
    assert made.plain.with_options(on_redis_error="compute").get_cached(key, 7) == 7
    own_server.restart()
    made.open_gate(key)
    with measured("the server is back: the next value"):
        assert until(lambda: _value_of(made, key)) == [key, "stock"]


def _value_of(made: Shop, key: str) -> Any:
    try:
        return made.stock.get_cached(key)
    except StoreUnavailable:
        return None


def test_frozen(made: Shop, own_server: Server, key: str, measured: Measured) -> None:
    """While it is frozen nobody waits longer than they said; when it goes on so do those who still wait."""
    waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
    made.await_start(key)
    own_server.freeze()
    began = time.monotonic()
    with pytest.raises((StoreUnavailable, WaitTimeout)):
        made.stock.with_options(wait_timeout=0.5).get_cached(key)
    assert time.monotonic() - began < 4  # of the five seconds of a connection's own time-out
    own_server.thaw()
    with measured("the server was frozen for half a second in mid-run"):
        made.open_gate(key)
        assert waiter.result(20) == "open"


def test_paused(made: Shop, own_server: Server, key: str, measured: Measured) -> None:
    """CLIENT PAUSE for less than a lease holds everybody up, and no more."""
    waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
    made.await_start(key)
    redis.Redis.from_url(own_server.url).execute_command("CLIENT", "PAUSE", 700, "ALL")
    with measured("CLIENT PAUSE of 0.7 s at the end of a run (lease 1 s)"):
        made.open_gate(key)
        assert waiter.result(20) == "open"
    assert made.ran(key) == 1


@pytest.mark.parametrize("size", [10, 10_000])
def test_full(made: Shop, own_server: Server, key: str, size: int, measured: Measured) -> None:
    """Without memory a run still ends with its value stored, as the last thing that is; new flights are refused."""
    waiter = in_background(made.gated.with_options(wait_timeout=20).get_cached, key)
    made.await_start(key)
    client = redis.Redis.from_url(own_server.url)
    client.config_set("maxmemory", "1")
    with measured(f"the server is full when a value of {size} bytes is settled"):
        made.open_gate(key, "x" * size)
        assert waiter.result(20) == "x" * size
    assert made.gated.peek(key) == "x" * size
    with pytest.raises(StoreUnavailable, match="'maxmemory'"):
        made.stock.get_cached(key)
    client.config_set("maxmemory", "0")
    assert made.stock.get_cached(key) == [key, "stock"]


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
        ("CONFIG SET min-replicas-to-write 1", "CONFIG SET min-replicas-to-write 0"),
    ],
    ids=["read-only", "no replicas"],
)
def test_refuses_writes(made: Shop, own_server: Server, key: str, bad: str, good: str, measured: Measured) -> None:
    """A server that refuses writes when a run ends gets its value when it takes writes again, from the same run."""
    # The lease decides how long a worker tries; the poll, when a waiting caller hears of the trouble.
    patient = made.gated.with_options(lease=20, wait_timeout=60, poll_interval=30, max_poll_interval=30)
    waiter = in_background(patient.get_cached, key)
    made.await_start(key)
    client = redis.Redis.from_url(own_server.url)
    client.execute_command(*bad.split())
    made.open_gate(key)
    with pytest.raises(StoreUnavailable, match=r"read only|replicas"):
        made.stock.get_cached(key)
    threading.Event().wait(0.5)
    client.execute_command(*good.split())
    with measured(f"the server takes writes again after {bad.split()[-2]}"):
        assert waiter.result(20) == "open"
    assert made.ran(key) == 1
    assert made.gated.peek(key) == "open"
