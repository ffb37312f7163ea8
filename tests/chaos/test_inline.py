"""Callers that compute, and are killed, frozen, interrupted or cut off while they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis

from celery_memolock import MISS, MemoLock, StoreUnavailable
from celery_memolock.server import Server
from celery_memolock.testing import Link
from tests.engines.conftest import Asked, environment_of
from tests.engines.tasks import make
from tests.workers.conftest import ROOT, in_background, until

Measured = Callable[[str], Any]

CALLER = """
import asyncio, os, sys
from tests.engines.tasks import place
task, arguments = place.tasks[sys.argv[1]], [sys.argv[2], *map(float, sys.argv[3:])]
task = task.with_options(wait_timeout=60)
try:
    if os.environ.get("MEMOLOCK_DRIVER") == "asyncio":
        print(asyncio.run(task.aget_cached(*arguments)), flush=True)
    else:
        print(task.get_cached(*arguments), flush=True)
except BaseException as error:
    print(type(error).__name__, flush=True)
    raise
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def shop(server: Server, own_server: Server, prefix: str) -> Asked:
    """The tasks as memoized functions; their values are on a server of this test's own."""
    place = make("inline", own_server.url, prefix)
    place.records.server = redis.Redis.from_url(server.url, socket_timeout=60)
    return Asked(place, os.environ.get("MEMOLOCK_DRIVER", "threads"), own_server.url, [])


@pytest.fixture
def start(shop: Asked, server: Server) -> Iterator[Start]:
    """Start another process that asks for a key."""
    with ExitStack() as stack:

        def run(task: str, *arguments: Any, url: str = shop.url) -> subprocess.Popen[str]:
            environment = {**os.environ, **environment_of(shop.place, url), "PLACE_RECORDS": server.url}
            process = subprocess.Popen(
                [sys.executable, "-c", CALLER, task, *map(str, arguments)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield run


def patient(shop: Asked, **options: Any) -> Any:
    return shop.gated.with_options(wait_timeout=60, **options)


def test_killed(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """A caller that is killed while it computes is taken over when its lease has passed."""
    winner = start("gated", key)
    shop.await_start(key)
    waiter = in_background(patient(shop).get_cached, key)
    with measured("inline: the caller that computes is killed (lease 1 s)"):
        winner.kill()
        shop.await_start(key)
        shop.open_gate(key)
        assert waiter.result(20) == "open"
    assert shop.ran(key) == 2


def test_interrupted(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """One that is interrupted (Ctrl-C) hands over at once, from a loop's thread after 5 s; that counts as no crash."""
    winner = start("gated", key)
    shop.await_start(key)
    waiter = in_background(patient(shop, lease=20).get_cached, key)
    until(lambda: shop.waiting("gated", key) == 2)
    with measured("inline: the caller that computes is interrupted"):
        winner.send_signal(signal.SIGINT)
        shop.await_start(key)
        assert shop.server.hget(shop.flight("gated", key), "crashes") == b"0"
        assert "KeyboardInterrupt" in winner.communicate(timeout=20)[0]
        shop.open_gate(key)
        assert waiter.result(20) == "open"
    assert shop.ran(key) == 2


def test_frozen(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """One that freezes past its lease is taken over; what it settles after it woke up is refused, and it gets ours."""
    winner = start("slow", key, 1.5)
    until(lambda: shop.ran(key))
    waiter = in_background(shop.slow.with_options(wait_timeout=60).get_cached, key, 1.5)
    with measured("inline: the caller that computes is frozen (lease 1 s; the run takes 1.5 s)"):
        winner.send_signal(signal.SIGSTOP)
        assert waiter.result(20) == key
    assert shop.ran(key) == 2
    shop.slow.set_cached("kept", key, 1.5)
    winner.send_signal(signal.SIGCONT)
    assert winner.communicate(timeout=20)[0] == "kept\n"
    assert shop.slow.peek(key, 1.5) == "kept"


def test_poison(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """What costs its process twice fails for all who wait, and does not take the third."""
    processes = [start("gated", key) for _ in range(3)]
    with measured("inline: what is computed kills its process twice (lease 1 s)"):
        killed = []
        for _ in range(2):
            killed.append(shop.await_start(key))
            os.kill(killed[-1], signal.SIGKILL)
        (last,) = [each for each in processes if each.pid not in killed]
        told, trace = last.communicate(timeout=20)
    assert told == "FlightFailed\n"
    assert "lost its worker 2 times" in trace


def test_emptied(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """When the server loses everything in mid-run another begins anew, and the first run's value is refused."""
    winner = start("gated", key)
    shop.await_start(key)
    waiter = in_background(patient(shop).get_cached, key)
    until(lambda: shop.waiting("gated", key) == 2)
    with measured("inline: FLUSHALL in mid-run"):
        shop.server.flushall()
        shop.await_start(key)
        shop.open_gate(key, "first")
        shop.open_gate(key, "second")
        assert waiter.result(20) == "second"
    assert winner.communicate(timeout=20)[0] == "second\n"
    assert shop.gated.peek(key) == "second"


def test_dead(shop: Asked, start: Start, own_server: Server, key: str, measured: Measured) -> None:
    """While the server is dead who waits hears so; who computes keeps what it computed."""
    winner = start("gated", key)
    shop.await_start(key)
    waiter = in_background(patient(shop).get_cached, key)
    until(lambda: shop.waiting("gated", key) == 2)
    own_server.kill()
    with measured("inline: the server is dead: the error of who waits"), pytest.raises(StoreUnavailable):
        waiter.result(10)
    shop.open_gate(key)
    with measured("inline: the server is dead: the value of who computes (lease 1 s)"):
        assert winner.communicate(timeout=20)[0] == "open\n"
    own_server.restart()
    with measured("inline: the server is back: the next value"):
        assert until(lambda: _value_of(shop, key)) == [key, "stock"]


def _value_of(shop: Asked, key: str) -> Any:
    try:
        return shop.stock.get_cached(key)
    except StoreUnavailable:
        return None


def test_cut_off(shop: Asked, start: Start, own_server: Server, key: str, measured: Measured) -> None:
    """One that computes, and is cut off from the server, is taken over after its lease, and keeps its own value."""
    with Link(own_server.url) as link:
        winner = start("gated", key, url=link.url)
        shop.await_start(key)
        waiter = in_background(patient(shop).get_cached, key)
        with link.cut():
            with measured("inline: the caller that computes is cut off (lease 1 s)"):
                shop.await_start(key)
                shop.open_gate(key, "of the first")
                shop.open_gate(key, "of the second")
                assert waiter.result(20) == "of the second"
            assert winner.communicate(timeout=20)[0] == "of the first\n"
    assert shop.gated.peek(key) == "of the second"


def test_notices_lost(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """A caller whose listener's link is cut while it waits gets its value all the same."""
    start("gated", key)
    shop.await_start(key)
    waiter = in_background(patient(shop).get_cached, key)
    until(lambda: shop.waiting("gated", key) == 2)
    with measured("inline: the listener's link is cut, and the notice lost"):
        shop.server.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        shop.open_gate(key)
        assert waiter.result(20) == "open"
    assert shop.ran(key) == 1


@pytest.mark.one_driver
def test_computed_without_a_server(own_server: Server, prefix: str) -> None:
    """With `on_redis_error="compute"` a caller computes for itself while the server is away."""
    with MemoLock(own_server.url, prefix=prefix, ttl=60, on_redis_error="compute") as memo:
        assert memo.get("k", lambda: 1) == 1
        own_server.kill()
        assert memo.get("k", lambda: 2) == 2
        own_server.restart()
        assert memo.peek("k") is MISS
        assert memo.get("k", lambda: 3) == 3
        assert memo.peek("k") == 3
