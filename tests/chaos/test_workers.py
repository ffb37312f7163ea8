"""Workers that are killed, frozen or stopped, and messages that get lost or come twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from billiard.exceptions import TimeLimitExceeded

from celery_memolock import FlightFailed
from celery_memolock.server import Server
from celery_memolock.testing import Link
from tests.workers.conftest import in_background, until
from tests.workers.shop import Shop, make

Start = Callable[..., Any]
Measured = Callable[[str], Any]


def another(start_worker: Start, made: Shop, broker: str, store: str, *flags: str, **settings: str) -> Any:
    """Start one more worker of a shop."""
    return start_worker(broker, store, *flags, prefix=made.app.conf.memolock_prefix, **settings)[1]


def test_child_killed(server: Server, start_worker: Start, key: str, acks: str, measured: Measured) -> None:
    """When the pool's process is killed the worker's main process tells: a caller takes over long before the lease."""
    made, _ = start_worker(server.url, server.url, "--concurrency", "2", acks=acks)
    gated = made.gated.with_options(lease=20)
    waiter = in_background(gated.get_cached, key)
    with measured("a process of a worker's pool is killed"):
        os.kill(made.await_start(key), signal.SIGKILL)
        made.await_start(key)
        made.open_gate(key)
        assert waiter.result(50) == "open"
    assert made.ran(key) == 2


def test_main_killed(server: Server, start_worker: Start, key: str, acks: str, measured: Measured) -> None:
    """When a worker's main process is killed its children die with it or end their run; either way the value comes."""
    made, worker = start_worker(server.url, server.url, acks=acks)
    waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
    made.await_start(key)
    another(start_worker, made, server.url, server.url, acks=acks)
    with measured("a worker's main process is killed (lease 1 s)"):
        worker.process.kill()
        until(lambda: waiter.done() or made.open_gate(key))  # a child that dies may still take one
    assert waiter.result() == "open"
    assert made.ran(key) <= 2


def test_tree_killed(server: Server, start_worker: Start, key: str, acks: str, measured: Measured) -> None:
    """When the whole worker is killed nobody can tell, and a caller takes over when the lease has passed."""
    made, worker = start_worker(server.url, server.url, acks=acks)
    waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
    made.await_start(key)
    another(start_worker, made, server.url, server.url, acks=acks)
    with measured("a whole worker is killed (lease 1 s)"):
        worker.kill()
        made.await_start(key)
        made.open_gate(key)
        assert waiter.result(50) == "open"
    assert made.ran(key) == 2


@pytest.mark.rabbitmq
def test_tree_killed_with_rabbitmq(
    server: Server, amqp: str, start_worker: Start, key: str, acks: str, measured: Measured
) -> None:
    """RabbitMQ delivers a late-acknowledged message again at once; it never runs beside another attempt."""
    made, worker = start_worker(amqp, server.url, acks=acks)
    waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
    made.await_start(key)
    another(start_worker, made, amqp, server.url, acks=acks)
    with measured("a whole worker is killed (lease 1 s), RabbitMQ"):
        worker.kill()
        made.await_start(key)
        made.open_gate(key)
        assert waiter.result(50) == "open"
    assert made.ran(key) == 2


@pytest.mark.one_driver
@pytest.mark.rabbitmq
def test_redelivered_during_the_run(server: Server, amqp: str, start_worker: Start, key: str) -> None:
    """A worker that loses its broker while it runs: its message comes again, and is deferred until the run is over."""
    with Link(amqp) as link:
        made, worker = start_worker(link.url, server.url, acks="late")
        waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
        made.await_start(key)
        second = another(start_worker, made, amqp, server.url, acks="late")
        link.drop()
        logs = (worker.log, second.log)
        until(lambda: any("memolock defers a message" in log.read_text() for log in logs))
        made.open_gate(key)
        assert waiter.result(50) == "open"
        until(lambda: any("memolock skips a message" in log.read_text() for log in logs))
    assert made.ran(key) == 1


@pytest.mark.one_driver
def test_warm_shutdown(server: Server, start_worker: Start, key: str, acks: str, measured: Measured) -> None:
    """A worker that is asked to end ends its run first."""
    made, worker = start_worker(server.url, server.url, acks=acks)
    waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
    made.await_start(key)
    worker.process.terminate()
    until(lambda: "Warm shutdown" in worker.log.read_text())
    with measured("a worker shuts down warm; it ends its run"):
        made.open_gate(key)
        assert waiter.result(50) == "open"
    assert worker.process.wait(30) == 0
    assert made.ran(key) == 1


def test_cold_shutdown(server: Server, start_worker: Start, key: str, acks: str, measured: Measured) -> None:
    """A worker that ends at once drops its run, and a caller takes over when the lease has passed."""
    made, worker = start_worker(server.url, server.url, acks=acks)
    waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
    made.await_start(key)
    another(start_worker, made, server.url, server.url, acks=acks)
    with measured("a worker shuts down cold (lease 1 s)"):
        worker.process.send_signal(signal.SIGQUIT)
        made.await_start(key)
        made.open_gate(key)
        made.open_gate(key)
        assert waiter.result(50) == "open"
    assert made.ran(key) == 2


def test_revoked_while_it_runs(
    server: Server, start_worker: Start, key: str, sent: list[str], measured: Measured
) -> None:
    """Who revokes a run and kills its process ends the flight: all who wait hear so at once."""
    made, _ = start_worker(server.url, server.url, "--concurrency", "2")
    waiters = [in_background(made.gated.with_options(lease=20).get_cached, key) for _ in range(3)]
    made.await_start(key)
    with measured("a run is revoked and killed"):
        made.app.control.revoke(sent[0], terminate=True, signal="SIGKILL")
        for waiter in waiters:
            with pytest.raises(FlightFailed, match="was terminated"):
                waiter.result(10)
    assert made.ran(key) == 1


def test_hard_time_limit(server: Server, start_worker: Start, key: str, measured: Measured) -> None:
    """A run that is killed at its hard time limit fails its flight at once, with Celery's own error."""
    made, _ = start_worker(server.url, server.url, "--concurrency", "2")
    hard = made.hard.with_options(lease=20, error_ttl=20)
    waiters = [in_background(hard.get_cached, key) for _ in range(3)]
    until(lambda: made.ran(key))
    with measured("a run is killed at its hard time limit of 1 s (that second included)"):
        for waiter in waiters:
            with pytest.raises(TimeLimitExceeded):
                waiter.result(10)
    with pytest.raises(TimeLimitExceeded):  # for its `error_ttl`
        hard.get_cached(key)
    assert made.ran(key) == 1


def test_poison(server: Server, start_worker: Start, key: str, measured: Measured) -> None:
    """A task that costs its worker twice fails for all who wait."""
    made, _ = start_worker(server.url, server.url, "--concurrency", "2")
    waiters = [in_background(made.gated.with_options(wait_timeout=60).get_cached, key) for _ in range(3)]
    with measured("a task kills its worker twice"):
        for _ in range(2):
            os.kill(made.await_start(key), signal.SIGKILL)
        for waiter in waiters:
            with pytest.raises(FlightFailed, match="lost its worker 2 times"):
                waiter.result(50)


def test_killed_before_it_began(server: Server, start_worker: Start, key: str) -> None:
    """A class's own hook that costs its worker before the run fails for all who wait, as a task does."""
    made, _ = start_worker(server.url, server.url, "--concurrency", "1")
    with pytest.raises(FlightFailed, match="lost its worker 2 times before it began"):
        made.hooked.get_cached(f"killed:{key}")
    assert made.ran(f"killed:{key}") == 0


def test_frozen_worker(server: Server, start_worker: Start, key: str, measured: Measured) -> None:
    """A worker that freezes past its lease is taken over, and what it settles after it woke up is refused."""
    made, frozen = start_worker(server.url, server.url, "--concurrency", "1")
    slow = made.slow.with_options(wait_timeout=60)
    waiter = in_background(slow.get_cached, key, 1.5)
    until(lambda: made.ran(key))
    with measured("a worker is frozen (lease 1 s; another one starts, and the run takes 1.5 s)"):
        os.killpg(frozen.process.pid, signal.SIGSTOP)
        another(start_worker, made, server.url, server.url)
        assert waiter.result(50) == key
    assert made.ran(key) == 2
    made.slow.set_cached("kept", key, 1.5)
    os.killpg(frozen.process.pid, signal.SIGCONT)
    until(lambda: "succeeded" in frozen.log.read_text())
    assert made.slow.peek(key, 1.5) == "kept"


@pytest.mark.one_driver
def test_duplicate_message(server: Server, start_worker: Start, prefix: str, key: str) -> None:
    """A message that is delivered twice runs once."""
    made = make(server.url, server.url, prefix)
    waiter = in_background(made.gated.get_cached, key)
    until(lambda: made.records.llen(prefix))
    message: Any = made.records.lindex(prefix, 0)
    made.records.rpush(prefix, message)
    made.records.rpush(prefix, message)
    _, worker = start_worker(server.url, server.url, "--concurrency", "3", prefix=prefix)
    made.await_start(key)
    until(lambda: worker.log.read_text().count("memolock skips a message") == 2)
    made.open_gate(key)
    assert waiter.result(30) == "open"
    assert made.ran(key) == 1


def test_lost_message(server: Server, prefix: str, start_worker: Start, key: str, measured: Measured) -> None:
    """When the queue is purged a caller sends the message anew, after `queue_timeout`."""
    made = make(server.url, server.url, prefix)
    waiter = in_background(made.stock.with_options(queue_timeout=1, wait_timeout=60).get_cached, key)
    until(lambda: made.records.llen(prefix))
    with measured("a message is lost (queue_timeout 1 s; a worker starts)"):
        made.records.delete(prefix)
        start_worker(server.url, server.url, prefix=prefix)
        assert waiter.result(30) == [key, "stock"]
    assert made.ran(key) == 1


def test_backlog(server: Server, start_worker: Start, key: str, sent: list[str], measured: Measured) -> None:
    """Behind a backlog that is longer than every lease a key is computed once, and the queue hardly grows."""
    made, worker = start_worker(server.url, server.url, "--concurrency", "1")
    for number in range(16):
        made.slow.delay(f"{key} before {number}", 0.5)
    before = len(sent)
    with measured("a backlog of 8 s (queue_timeout 0.5 s)"):
        asked = made.stock.with_options(queue_timeout=0.5, wait_timeout=60)
        waiters = [in_background(asked.get_cached, key) for _ in range(20)]
        assert all(waiter.result(60) == [key, "stock"] for waiter in waiters)
    assert made.ran(key) == 1
    messages = len(sent) - before
    assert 2 <= messages <= 6  # take-overs after 0.5, 1, 2 and 4 seconds; not one in each half second
    until(lambda: worker.log.read_text().count("memolock skips a message") == messages - 1)


def test_invalidation_storm(server: Server, start_worker: Start, key: str) -> None:
    """Twenty invalidations, each followed by a call: never more than `max_overlap` runs at once, and all get values."""
    made, _ = start_worker(server.url, server.url, "--concurrency", "8")
    asked = made.crowded.with_options(wait_timeout=60)
    waiters = []
    for number in range(20):
        made.crowded.invalidate(key, 0.3)
        waiters.append(in_background(asked.get_cached, key, 0.3))
        until(lambda number=number: made.ran(key) > min(number, 1))
    assert [waiter.result(60) for waiter in waiters] == [key] * 20
    alive = [int(count) for count in made.records.lrange(f"alive:{key}", 0, -1)]
    assert max(alive) == 2
    assert len(alive) < 20
