"""Links between callers, workers and servers that are cut, slow, or deaf in one direction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_memolock import StoreUnavailable, WaitTimeout
from celery_memolock.server import Server
from celery_memolock.testing import Link
from celery_memolock.wire import load
from tests.workers.conftest import in_background, until
from tests.workers.shop import Shop, make

Start = Callable[..., Any]
Measured = Callable[[str], Any]


@pytest.fixture
def link(server: Server) -> Iterator[Link]:
    """The way to the server of flights for one side alone."""
    with Link(server.url) as found:
        yield found


@pytest.fixture
def made(server: Server, link: Link, start_worker: Start) -> Shop:
    """A shop whose callers, not whose worker, use the link."""
    found, _ = start_worker(server.url, server.url, "--concurrency", "2")
    return make(server.url, link.url, found.app.conf.memolock_prefix, server.url)


def test_cut_for_a_moment(made: Shop, link: Link, key: str, measured: Measured) -> None:
    """A caller whose connections break while it waits finds its way back, and gets its value."""
    waiter = in_background(made.gated.get_cached, key)
    made.await_start(key)
    with measured("a caller's connections break while it waits"):
        link.drop()
        made.open_gate(key)
        assert waiter.result(20) == "open"
    assert made.ran(key) == 1


def test_cut(made: Shop, link: Link, key: str, measured: Measured) -> None:
    """Without a way to the server callers hear so; with one again, the value that was computed meanwhile is there."""
    waiter = in_background(made.gated.get_cached, key)
    made.await_start(key)
    with link.cut():
        with measured("no way to the server: the error of a new call"), pytest.raises(StoreUnavailable):
            made.stock.get_cached(key)
        with pytest.raises(StoreUnavailable):
            waiter.result(20)
        made.open_gate(key)
    with measured("the way to the server is back: the next value"):
        assert made.gated.get_cached(key) == "open"
    assert made.ran(key) == 1


@pytest.mark.parametrize("direction", ["replies", "commands", "both"])
def test_deaf(made: Shop, link: Link, key: str, direction: Any, measured: Measured) -> None:
    """A link that carries nothing holds nobody beyond the time they gave, and what comes late does no harm."""
    waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
    made.await_start(key)
    with link.deaf(direction):
        began = time.monotonic()
        with pytest.raises((StoreUnavailable, WaitTimeout)):
            made.stock.with_options(wait_timeout=0.5).get_cached(f"other {key}")
        assert time.monotonic() - began < 4  # of the five seconds of a connection's own time-out
    with measured(f"a caller's link was deaf ({direction}) for half a second"):
        made.open_gate(key)
        assert waiter.result(20) == "open"
    assert made.stock.get_cached(f"other {key}") == [f"other {key}", "stock"]
    assert made.ran(key) == 1


def test_deaf_listener(made: Shop, link: Link, key: str, measured: Measured) -> None:
    """A caller that hears no notice, and no reply until its connections break, looks as soon as it can."""
    waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
    made.await_start(key)
    with measured("a caller hears nothing for a second, and its connections break"), link.deaf("replies"):
        made.open_gate(key)
        until(lambda: not made.records.exists(made.gated.memo.call((key,), {}).keys.all[1]))
        time.sleep(1)
        link.drop()
    assert waiter.result(20) == "open"


def test_slow(made: Shop, link: Link, key: str, measured: Measured) -> None:
    """A link of 400 ms for a round trip costs its round trips, and nothing else."""
    with link.slow(0.2), measured("a round trip takes 0.4 s: a cold key"):
        assert made.stock.get_cached(key) == [key, "stock"]
    assert made.ran(key) == 1


@pytest.mark.parametrize("script", ["acquire", "confirm", "leave"])
def test_cut_replies(made: Shop, link: Link, key: str, script: str, measured: Measured) -> None:
    """When the server ran a caller's script and the reply was lost, the repeat gets the same answer: one run."""
    made.stock.get_cached(f"warm {key}")
    with link.cut_reply(containing=load(script).sha.encode()) as lost:
        if script == "leave":
            with pytest.raises(WaitTimeout):
                made.gated.with_options(wait_timeout=0.5).get_cached(key)
            made.open_gate(key)
        else:
            with measured(f"the reply of {script} is lost"):
                assert made.stock.get_cached(key) == [key, "stock"]
        assert lost.wait(1)
    assert made.ran(key) == 1


def test_worker_cut_off(server: Server, link: Link, start_worker: Start, key: str, measured: Measured) -> None:
    """A worker that cannot reach the server is taken over; what it brings when it can again is refused."""
    made, lonely = start_worker(server.url, link.url, records=server.url)
    made = make(server.url, server.url, made.app.conf.memolock_prefix)
    waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
    made.await_start(key)
    made.app.control.cancel_consumer(made.app.conf.memolock_prefix, reply=True)  # the next message is for the other one
    start_worker(server.url, server.url, prefix=made.app.conf.memolock_prefix)
    with link.cut(), measured("a worker is cut off from the server (lease 1 s)"):
        made.await_start(key)
        made.open_gate(key, "late")
        made.open_gate(key, "in time")
        assert waiter.result(20) == "in time"
    until(lambda: "succeeded" in lonely.log.read_text() or "memolock lost the value" in lonely.log.read_text())
    assert made.gated.peek(key) == "in time"


@pytest.mark.one_driver
def test_worker_that_cannot_claim(server: Server, link: Link, start_worker: Start, key: str) -> None:
    """A worker that gets a message, and has no way to the server, puts it back for another one."""
    made, lonely = start_worker(server.url, link.url, "--concurrency", "1", records=server.url)
    made = make(server.url, server.url, made.app.conf.memolock_prefix)
    with link.cut():
        waiter = in_background(made.stock.with_options(wait_timeout=60).get_cached, key)
        until(lambda: "memolock puts the message" in lonely.log.read_text())
        made.app.control.cancel_consumer(made.app.conf.memolock_prefix, reply=True)
        start_worker(server.url, server.url, prefix=made.app.conf.memolock_prefix)
        assert waiter.result(30) == [key, "stock"]
    assert made.ran(key) == 1


@pytest.mark.one_driver
def test_worker_finds_its_way_back(
    server: Server, link: Link, start_worker: Start, key: str, measured: Measured
) -> None:
    """A run that ends while its worker is cut off keeps its value until the lease is over, and brings it then."""
    made, _ = start_worker(server.url, link.url, records=server.url)
    made = make(server.url, server.url, made.app.conf.memolock_prefix)
    waiter = in_background(made.gated.with_options(wait_timeout=60, lease=10).get_cached, key)
    made.await_start(key)
    with link.cut() as cut:
        made.open_gate(key)
        cut.wait(1)
        time.sleep(1)
    with measured("a worker was cut off for a second when its run ended (lease 10 s)"):
        assert waiter.result(20) == "open"
    assert made.ran(key) == 1


@pytest.mark.one_driver
@pytest.mark.parametrize("script", ["claim", "renew", "settle", "requeue"])
def test_worker_loses_replies(
    server: Server, link: Link, start_worker: Start, key: str, script: str, measured: Measured
) -> None:
    """When replies to a worker's scripts are lost their repeats get the same answers: one run, one value."""
    made, _ = start_worker(server.url, link.url, records=server.url)
    made = make(server.url, server.url, made.app.conf.memolock_prefix)
    made.flaky.get_cached(f"warm {key}", 1)
    with link.cut_reply(containing=load(script).sha.encode()) as lost, measured(f"the reply of {script} is lost"):
        if script == "requeue":
            assert made.flaky.get_cached(key, 1) == 1
        else:
            assert made.slow.get_cached(key, 0.8) == key
        assert lost.wait(1)
    assert made.ran(key) == (2 if script == "requeue" else 1)
