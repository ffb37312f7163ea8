"""Workers that die, freeze or get a message twice; links that break; processes that fork."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from celery_memolock import FlightFailed
from celery_memolock.engines.celery import store_of
from celery_memolock.server import Server
from tests.workers.conftest import ROOT, in_background
from tests.workers.shop import Shop


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server of one test alone, to be struck by its faults."""
    with Server() as started:
        yield started


@pytest.fixture(params=["early", "late"])
def acks(request: pytest.FixtureRequest) -> str:
    """When the worker acknowledges a message."""
    return str(request.param)


def test_killed_child(server: Server, start_worker: Callable[..., Any], key: str, acks: str) -> None:
    """When the pool's process is killed the worker's main process tells: a caller takes over long before the lease."""
    made, _ = start_worker(server.url, server.url, "--concurrency", "2", acks=acks)
    gated = made.gated.with_options(lease=20)
    waiter = in_background(gated.get_cached, key)
    os.kill(made.await_start(key), signal.SIGKILL)
    made.await_start(key)
    made.open_gate(key)
    assert waiter.result(50) == "open"
    assert made.ran(key) == 2


@pytest.mark.chaos
def test_killed_tree(server: Server, start_worker: Callable[..., Any], key: str, acks: str) -> None:
    """When the whole worker is killed nobody can tell, and a caller takes over when the lease has passed."""
    made, worker = start_worker(server.url, server.url, acks=acks)
    waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
    made.await_start(key)
    worker.kill()
    start_worker(server.url, server.url, prefix=made.app.conf.memolock_prefix)
    made.await_start(key)
    made.open_gate(key)
    assert waiter.result(50) == "open"


@pytest.mark.chaos
@pytest.mark.rabbitmq
def test_killed_with_rabbitmq(server: Server, amqp: str, start_worker: Callable[..., Any], key: str, acks: str) -> None:
    """RabbitMQ delivers a late-acknowledged message again at once; it never runs beside another attempt."""
    made, worker = start_worker(amqp, server.url, acks=acks)
    waiter = in_background(made.gated.with_options(wait_timeout=60).get_cached, key)
    made.await_start(key)
    start_worker(amqp, server.url, prefix=made.app.conf.memolock_prefix, acks=acks)
    worker.kill()
    made.await_start(key)
    made.open_gate(key)
    assert waiter.result(50) == "open"
    assert made.ran(key) == 2


@pytest.mark.chaos
def test_poison(server: Server, start_worker: Callable[..., Any], key: str) -> None:
    """A task that costs its worker twice fails for all who wait."""
    made, _ = start_worker(server.url, server.url, "--concurrency", "2")
    waiters = [in_background(made.gated.with_options(wait_timeout=60).get_cached, key) for _ in range(3)]
    for _ in range(2):
        os.kill(made.await_start(key), signal.SIGKILL)
    for waiter in waiters:
        with pytest.raises(FlightFailed, match="lost its worker 2 times"):
            waiter.result(50)


@pytest.mark.chaos
def test_frozen_worker(server: Server, start_worker: Callable[..., Any], key: str) -> None:
    """A worker that freezes past its lease is taken over, and what it settles after it woke up is refused."""
    made, frozen = start_worker(server.url, server.url, "--concurrency", "1")
    slow = made.slow.with_options(wait_timeout=60)
    waiter = in_background(slow.get_cached, key, 1.5)
    while not made.ran(key):
        threading.Event().wait(0.01)
    os.killpg(frozen.process.pid, signal.SIGSTOP)
    start_worker(server.url, server.url, prefix=made.app.conf.memolock_prefix)
    assert waiter.result(50) == key
    assert made.ran(key) == 2
    made.slow.set_cached("kept", key, 1.5)
    os.killpg(frozen.process.pid, signal.SIGCONT)
    while "succeeded" not in frozen.log.read_text():
        threading.Event().wait(0.05)
    assert made.slow.peek(key, 1.5) == "kept"


def test_duplicate_message(server: Server, start_worker: Callable[..., Any], prefix: str, key: str) -> None:
    """A message that is delivered twice runs once."""
    from tests.workers.shop import make

    made = make(server.url, server.url, prefix)
    waiter = in_background(made.gated.get_cached, key)
    while not made.records.llen(prefix):
        threading.Event().wait(0.01)
    message: Any = made.records.lindex(prefix, 0)
    made.records.rpush(prefix, message)
    made.records.rpush(prefix, message)
    _, worker = start_worker(server.url, server.url, "--concurrency", "3", prefix=prefix)
    made.await_start(key)
    while worker.log.read_text().count("memolock skips a message") < 2:
        threading.Event().wait(0.02)
    made.open_gate(key)
    assert waiter.result(30) == "open"
    assert made.ran(key) == 1


def test_lost_notices(own_server: Server, start_worker: Callable[..., Any], key: str) -> None:
    """A caller whose listener's link is cut while it waits gets its value all the same."""
    made, _ = start_worker(own_server.url, own_server.url)
    waiter = in_background(made.gated.get_cached, key)
    made.await_start(key)
    made.records.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    made.open_gate(key)
    assert waiter.result(20) == "open"


@pytest.mark.chaos
def test_emptied_server(own_server: Server, start_worker: Callable[..., Any], key: str) -> None:
    """When the server loses everything in mid-run the caller starts anew; the first run's value is refused."""
    made, _ = start_worker(own_server.url, own_server.url, "--concurrency", "2")
    waiter = in_background(made.gated.get_cached, key)
    made.await_start(key)
    for found in made.records.scan_iter(f"{made.app.conf.memolock_prefix}:*"):
        made.records.delete(found)
    made.await_start(key)
    made.open_gate(key, "first")
    made.open_gate(key, "second")
    assert waiter.result(20) == "second"
    assert made.gated.peek(key) == "second"


FORK = """
import json, os, sys
from tests.workers.shop import shop

key = sys.argv[1]
before = shop.stock.get_cached(key)          # starts the listener and makes connections
pid = os.fork()
if pid == 0:
    after = shop.stock.get_cached(key + " in the child")
    print(json.dumps(after), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print(json.dumps(shop.stock.get_cached(key + " in the parent")), flush=True)
"""


def in_a_process(of: tuple[Shop, str, str], code: str, key: str) -> subprocess.CompletedProcess[str]:
    """Run some code as another web process of a shop."""
    made, broker, store = of
    environment = {"SHOP_BROKER": broker, "SHOP_STORE": store, "SHOP_PREFIX": made.app.conf.memolock_prefix}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, key],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_fork_after_use(any_shop: tuple[Shop, str, str], key: str) -> None:
    """A process that forks after its first use: parent and child both go on, each with a listener of its own."""
    done = in_a_process(any_shop, FORK, key)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [[f"{key} in the child", "stock"], [f"{key} in the parent", "stock"]], done.stderr


EXIT = """
import sys, threading
from tests.workers.shop import shop

threading.Thread(target=lambda: shop.gated.get_cached(sys.argv[1]), daemon=True).start()
shop.await_start(sys.argv[1])
"""


def test_exit_with_waiters(any_shop: tuple[Shop, str, str], key: str) -> None:
    """A process may end while its threads wait."""
    done = in_a_process(any_shop, EXIT, key)
    any_shop[0].open_gate(key)
    assert (done.returncode, done.stderr) == (0, "")


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import sys
import gevent
from tests.workers.shop import shop

jobs = [gevent.spawn(shop.stock.get_cached, sys.argv[1]) for _ in range(200)]
gevent.joinall(jobs, raise_error=True)
print(len({str(job.value) for job in jobs}))
"""


def test_greenlets(any_shop: tuple[Shop, str, str], key: str) -> None:
    """200 greenlets of one process wait for one run."""
    done = in_a_process(any_shop, GREENLETS, key)
    assert done.stdout.split() == ["1"], done.stderr
    assert any_shop[0].ran(key) == 1


@pytest.mark.chaos
def test_nothing_is_left(own_server: Server, start_worker: Callable[..., Any], key: str) -> None:
    """After 500 keys nothing is left: no room, no thread but the listener's, no key without a time to live."""
    made, _ = start_worker(own_server.url, own_server.url, "--concurrency", "2")
    threads = threading.active_count()
    for _ in range(5):
        futures = [in_background(made.stock.get_cached, f"{key}-{number}") for number in range(100)]
        assert all(future.result(30) for future in futures)
    store = store_of(made.app)
    assert len(store.inbox.rooms) == 0
    left = redis.Redis.from_url(own_server.url)
    for found in left.scan_iter(f"{made.app.conf.memolock_prefix}:*"):
        assert left.pttl(found) > 0
    waiting = threading.Event()
    for _ in range(200):
        if threading.active_count() <= threads + 1:
            break
        waiting.wait(0.02)
    assert threading.active_count() <= threads + 1, threading.enumerate()
