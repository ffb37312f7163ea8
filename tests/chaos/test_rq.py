"""RQ's workers that are killed, frozen or stopped, its jobs that get lost or come twice, and its Redis that fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
import rq
from rq.command import send_stop_job_command

from celery_memolock import DispatchError, FlightFailed, StoreUnavailable
from celery_memolock.rq import memolocked_job
from celery_memolock.server import Server
from celery_memolock.testing import Link
from tests.engines.conftest import Asked, workers
from tests.engines.tasks import make
from tests.workers.conftest import Worker, in_background, until
from tests.workers.shop import FromAsyncio

Measured = Callable[[str], Any]
Start = Callable[..., list[Worker]]

WORKER = (
    "import rq, tests.engines.tasks as tasks; from celery_memolock.rq import *; "
    "{}([tasks.app], connection=tasks.app.connection).work()"
)
PLAIN, OURS = ["-c", WORKER.format("rq.Worker")], ["-c", WORKER.format("MemoLockWorker")]


@pytest.fixture
def shop(server: Server, prefix: str) -> Asked:
    """The tasks as RQ jobs, on a queue of this test's own."""
    return Asked(make("rq", server.url, prefix), os.environ.get("MEMOLOCK_DRIVER", "threads"), server.url, [])


@pytest.fixture
def start(shop: Asked, tmp_path: Path) -> Iterator[Start]:
    """Start workers."""
    with ExitStack() as stack:
        yield lambda *commands: stack.enter_context(workers(tmp_path, shop.place, shop.url, list(commands)))


def patient(shop: Asked, **options: Any) -> Any:
    return shop.gated.with_options(wait_timeout=60, **options)


@pytest.mark.parametrize("worker", [PLAIN, OURS], ids=["Worker", "MemoLockWorker"])
def test_horse_killed(shop: Asked, start: Start, key: str, worker: list[str], measured: Measured) -> None:
    """RQ's own worker leaves it to the lease (1 s); ours tells at once, whatever the lease (20 s)."""
    start(worker)
    ours = worker is OURS
    waiter = in_background(patient(shop, lease=20 if ours else 1).get_cached, key)
    horse = shop.await_start(key)
    with measured(f"rq: a work-horse is killed, {'MemoLockWorker' if ours else 'lease 1 s'}"):
        os.kill(horse, signal.SIGKILL)
        assert shop.await_start(key) != horse
        shop.open_gate(key)
        assert waiter.result(15) == "open"
    assert shop.ran(key) == 2


def test_worker_killed(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """A work-horse outlives its worker, goes on giving signs of life, and its value counts."""
    (worker,) = start(PLAIN)
    waiter = in_background(patient(shop).get_cached, key)
    horse = shop.await_start(key)
    worker.process.kill()
    worker.process.wait()
    assert os.getpgid(horse) == horse  # it is alive
    with measured("rq: a worker is killed; its work-horse ends its run"):
        shop.open_gate(key)
        assert waiter.result(15) == "open"
    assert shop.ran(key) == 1


def test_worker_and_horse_killed(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """Nobody can tell, and a caller takes over when the lease has passed."""
    (worker,) = start(OURS)
    waiter = in_background(patient(shop).get_cached, key)
    horse = shop.await_start(key)
    start(OURS)
    worker.process.kill()
    with measured("rq: a worker and its work-horse are killed (lease 1 s)"):
        os.kill(horse, signal.SIGKILL)
        shop.await_start(key)
        shop.open_gate(key)
        assert waiter.result(20) == "open"
    assert shop.ran(key) == 2


def test_frozen(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """A work-horse that freezes past its lease is taken over, and what it settles after it woke up is refused."""
    start(PLAIN, PLAIN)
    slow = shop.slow.with_options(wait_timeout=60)
    waiter = in_background(slow.get_cached, key, 1.5)
    until(lambda: shop.ran(key))
    horse = int(shop.place.records.server.lindex(f"ran:{key}", 0))  # type: ignore[arg-type]
    with measured("rq: a work-horse is frozen (lease 1 s; the run takes 1.5 s)"):
        os.kill(horse, signal.SIGSTOP)
        assert waiter.result(20) == key
    assert shop.ran(key) == 2
    shop.slow.set_cached("kept", key, 1.5)
    os.kill(horse, signal.SIGCONT)
    until(lambda: not _alive(horse))
    assert shop.slow.peek(key, 1.5) == "kept"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_stopped(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """A job that is stopped on request fails for all who wait, at once, with RQ's own worker."""
    start(PLAIN)
    waiters = [in_background(patient(shop, lease=20).get_cached, key) for _ in range(3)]
    shop.await_start(key)
    (job_id,) = shop.place.home.started_job_registry.get_job_ids()
    with measured("rq: a job is stopped"):
        send_stop_job_command(shop.place.home.connection, job_id)
        for waiter in waiters:
            with pytest.raises(FlightFailed, match="was stopped"):
                waiter.result(10)
    assert shop.ran(key) == 1


@pytest.mark.one_driver
def test_warm_shutdown(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """A worker that is asked to end ends its job first."""
    (worker,) = start(PLAIN)
    waiter = in_background(patient(shop).get_cached, key)
    shop.await_start(key)
    worker.process.terminate()
    until(lambda: "warm shut down requested" in worker.log.read_text().lower())
    with measured("rq: a worker shuts down warm; it ends its job"):
        shop.open_gate(key)
        assert waiter.result(20) == "open"
    assert worker.process.wait(20) == 0
    assert shop.ran(key) == 1


def test_cold_shutdown(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """A second signal ends the work-horse, too: a caller takes over when the lease has passed."""
    (worker,) = start(PLAIN)
    waiter = in_background(patient(shop).get_cached, key)
    shop.await_start(key)
    start(PLAIN)
    worker.process.terminate()
    until(lambda: "warm shut down requested" in worker.log.read_text().lower())
    until(lambda: worker.process.poll() is not None or worker.process.terminate())
    with measured("rq: a worker shuts down cold (lease 1 s)"):
        shop.await_start(key)
        shop.open_gate(key)
        assert waiter.result(20) == "open"
    assert shop.ran(key) == 2


def test_poison(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """A job that costs its work-horse twice fails for all who wait."""
    start(OURS)
    waiters = [in_background(patient(shop).get_cached, key) for _ in range(3)]
    with measured("rq: a job kills its work-horse twice"):
        for _ in range(2):
            os.kill(shop.await_start(key), signal.SIGKILL)
        for waiter in waiters:
            with pytest.raises(FlightFailed, match="lost its worker 2 times"):
                waiter.result(20)


def test_emptied_queue(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """When the queue is emptied a caller sends the job anew, after `queue_timeout`."""
    waiter = in_background(shop.stock.with_options(queue_timeout=1, wait_timeout=60).get_cached, key)
    until(lambda: shop.place.home.count)
    with measured("rq: the queue is emptied (queue_timeout 1 s; a worker starts)"):
        shop.place.home.empty()
        start(PLAIN)
        assert waiter.result(30) == [key, "stock"]
    assert shop.ran(key) == 1


@pytest.mark.one_driver
def test_duplicate_job(shop: Asked, start: Start, key: str) -> None:
    """A job that is queued three times runs once."""
    waiter = in_background(patient(shop).get_cached, key)
    (job_id,) = until(lambda: shop.place.home.job_ids)
    for _ in range(2):
        shop.place.home.push_job_id(job_id)
    running = start(PLAIN, PLAIN, PLAIN)
    shop.await_start(key)
    until(lambda: not shop.place.home.count)
    until(lambda: sum(each.log.read_text().count("Job OK") for each in running) > 0)
    shop.open_gate(key)
    assert waiter.result(20) == "open"
    assert shop.ran(key) == 1


def test_backlog(shop: Asked, start: Start, key: str, measured: Measured) -> None:
    """Behind a backlog that is longer than every lease a key is computed once, and the queue hardly grows."""
    for number in range(10):
        shop.place.tasks["slow"].enqueue(f"{key} before {number}", 0.5)
    start(PLAIN)
    with measured("rq: a backlog of 5 s (queue_timeout 0.5 s)"):
        asked = shop.stock.with_options(queue_timeout=0.5, wait_timeout=60)
        waiters = [in_background(asked.get_cached, key) for _ in range(20)]
        most = 0
        while not all(waiter.done() for waiter in waiters):
            most = max(most, shop.place.home.count)
        assert all(waiter.result(60) == [key, "stock"] for waiter in waiters)
    assert shop.ran(key) == 1
    assert most <= 10 + 5


@pytest.mark.parametrize("fault", ["cut", "deaf"])
def test_queue_unreachable(server: Server, prefix: str, key: str, fault: str, measured: Measured) -> None:
    """When RQ's Redis is away or frozen all who wait hear so within the dispatch time-out, and the key is free."""

    def stock(key: str) -> str:
        return key

    stock.__qualname__ = "stock"
    with Link(server.url) as link:
        queue = rq.Queue(prefix, connection=redis.Redis.from_url(link.url))
        job = memolocked_job(queue, ttl=60, redis=server.url, prefix=prefix, dispatch_lease=1)(stock)
        asked: Any = FromAsyncio(job) if os.environ.get("MEMOLOCK_DRIVER") == "asyncio" else job
        with getattr(link, fault)(), measured(f"rq: the queue's Redis is {fault} at dispatch (dispatch_lease 1 s)"):
            waiters = [in_background(asked.get_cached, key) for _ in range(3)]
            for waiter in waiters:
                with pytest.raises(DispatchError):
                    waiter.result(10)
    assert not redis.Redis.from_url(server.url).exists(job.memo.call((key,), {}).keys.all[1])


@pytest.mark.one_driver
def test_values_away_at_the_claim(own_server: Server, server: Server, prefix: str, tmp_path: Path, key: str) -> None:
    """A worker without a way to the values puts the job back for another try, and does not lose it."""
    place = make("rq", server.url, prefix)
    with Link(server.url) as link, ExitStack() as stack:
        environment = {"MEMOLOCK_REDIS_URL": link.url}
        os.environ.update(environment)
        try:
            (worker,) = stack.enter_context(workers(tmp_path, place, server.url, [PLAIN]))
        finally:
            del os.environ["MEMOLOCK_REDIS_URL"]
        with link.cut():
            waiter = in_background(place.tasks["stock"].with_options(wait_timeout=60).get_cached, key)
            until(lambda: "puts the job" in worker.log.read_text())
        assert waiter.result(30) == [key, "stock"]
    assert place.records.ran(key) == 1


@pytest.mark.one_driver
def test_worker_that_its_server_turns_away(server: Server, prefix: str, tmp_path: Path, key: str) -> None:
    """A worker whose values are to be in a database that is not there tells those who wait."""
    place = make("rq", server.url, prefix)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("MEMOLOCK_REDIS_URL", server.url.removesuffix("/0") + "/99")
        stack.enter_context(workers(tmp_path, place, server.url, [PLAIN]))
        patch.undo()
        with pytest.raises(FlightFailed, match=r"failed before it ran: .* DB index is out of range"):
            place.tasks["stock"].with_options(wait_timeout=60).get_cached(key)


def test_everything_restarted_empty(own_server: Server, tmp_path: Path, prefix: str, key: str) -> None:
    """The one server of queue, values and worker is killed in mid-run and comes back without data: all goes on."""
    place = make("rq", own_server.url, prefix)
    asked: Any = place.tasks["slow"]
    if os.environ.get("MEMOLOCK_DRIVER") == "asyncio":
        asked = FromAsyncio(asked)
    with workers(tmp_path, place, own_server.url, [PLAIN]):
        waiter = in_background(asked.with_options(wait_timeout=60).get_cached, key, 1.0)
        until(lambda: place.records.ran(key))
        own_server.kill()
        own_server.restart()
        # Who waits hears of the trouble, or finds the server back; RQ's worker finds its way back by itself.
        try:
            assert waiter.result(60) == key
        except StoreUnavailable:
            assert until(lambda: _value_of(asked, key), 60) == key


def _value_of(asked: Any, key: str) -> Any:
    try:
        return asked.with_options(wait_timeout=20).get_cached(key, 0.1)
    except StoreUnavailable:
        return None
