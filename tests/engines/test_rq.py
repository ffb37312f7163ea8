"""What is RQ's own: its workers, retries, callbacks, serializers and time-outs; and Django's way to it."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
import rq
from rq.command import send_stop_job_command
from rq.job import Job

from celery_memolock import (
    MISS,
    ArgumentError,
    ConfigurationError,
    DispatchError,
    FlightFailed,
    OptionError,
    WaitTimeout,
)
from celery_memolock.engines.rq import on_failure, on_success
from celery_memolock.rq import memolocked_job
from celery_memolock.server import Server
from tests.engines import rq_jobs
from tests.workers.conftest import ROOT, Worker, in_background, until

Start = Callable[..., Worker]


@pytest.fixture
def jobs(server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The jobs of a module, on a queue of this test's own."""
    monkeypatch.setenv("RQ_JOBS_URL", server.url)
    monkeypatch.setenv("RQ_JOBS_QUEUE", prefix)
    return rq_jobs.fresh()


@pytest.fixture
def start(server: Server, prefix: str, tmp_path: Path) -> Iterator[Start]:
    """Start a worker of RQ's command line."""
    started: list[Worker] = []

    def run(*flags: str, url: str = server.url) -> Worker:
        environment = {"RQ_JOBS_URL": url, "RQ_JOBS_QUEUE": prefix, "PYTHONPATH": str(ROOT)}
        command = ["-m", "rq.cli", "worker", "--url", url, *flags, prefix]
        process = Worker(command, environment, tmp_path / f"{len(started)}.log", "Listening on")
        started.append(process)
        process.await_ready()
        return process

    yield run
    for process in started:
        process.stop()


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--worker-class", "rq.SimpleWorker"),
        ("--worker-class", "rq.worker.SpawnWorker"),
        ("--worker-class", "celery_memolock.rq.MemoLockWorker"),
    ],
    ids=["Worker", "SimpleWorker", "SpawnWorker", "MemoLockWorker"],
)
def test_each_worker_class(jobs: Any, start: Start, key: str, flags: tuple[str, ...]) -> None:
    """A value, a failure, a retry, a coroutine function and a run that outlasts its lease, in each kind of worker."""
    start(*flags)
    assert jobs.stock.get_cached(key) == [key, "stock"]
    with pytest.raises(rq_jobs.Sold):
        jobs.failing.get_cached(key)
    assert jobs.flaky.get_cached(key, 2) == 3
    assert jobs.later.get_cached(key) == f"{key} later"
    assert jobs.slow.get_cached(key, 2.0) == key
    assert rq_jobs.ran(jobs, f"slow {key}") == 1


@pytest.mark.parametrize("named", [True, False])
def test_first_use_by_many_threads(server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """Threads that ask at once before all others have one connection, and one listener, in common."""
    connect, barrier = redis.Redis.from_url, threading.Barrier(4)
    url = f"{server.url}?client_name={prefix}"

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return connect(*args, **options)

    def found(_: int) -> Any:
        barrier.wait(10)
        return job.memo._engine.store

    monkeypatch.setattr(redis.Redis, "from_url", slowly)
    queue = prefix if named else lambda: rq.Queue(prefix, connection=slowly(url))
    job = memolocked_job(queue, connection=url, ttl=5)(rq_jobs.child_of)
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(found, range(4)))) == 1


def test_retries_keep_the_flight(jobs: Any, start: Start, key: str) -> None:
    """RQ's `Retry`, given to the job or returned by it: one flight, whose waiters wait on; in the end the error."""
    start("--worker-class", "rq.SimpleWorker")
    waiters = [in_background(jobs.flaky.get_cached, key, 2) for _ in range(3)]
    assert [waiter.result(30) for waiter in waiters] == [3] * 3
    assert rq_jobs.ran(jobs, f"flaky {key}") == 3
    with pytest.raises(rq_jobs.Sold):
        jobs.flaky.get_cached(f"sold {key}", 5)
    assert rq_jobs.ran(jobs, f"flaky sold {key}") == 3
    assert jobs.returning.get_cached(key, 1) == 2
    with pytest.raises(FlightFailed, match="more often than its max=2"):
        jobs.returning.get_cached(f"sold {key}", 5)


def test_what_no_run_tells(jobs: Any, start: Start, key: str) -> None:
    """A run that ends by no error, a job that is none of ours in its worker, tickets that are spoilt: nobody waits."""
    worker = start("--worker-class", "rq.SimpleWorker")
    for ticket in ("garbage", 5, {}, {"entry": "no key", "fence": 5}, {"entry": f"{jobs.QUEUE}:1:e:{{k}}"}):
        jobs.queue.enqueue(f"{rq_jobs.__name__}.stock", f"{key} spoilt", meta={"memolock": ticket})
    with pytest.raises(FlightFailed, match="ended by CancelledError: by a library"):
        jobs.leaving.get_cached(key)
    with pytest.raises(FlightFailed, match="ended by Silent: <unprintable Silent>"):
        jobs.leaving.get_cached(f"silent {key}")
    with pytest.raises(FlightFailed, match=r"without a run of its flight: .*replaced is no memolocked job"):
        jobs.replaced.get_cached(key)
    assert jobs.stock.get_cached(key) == [key, "stock"]
    assert rq_jobs.ran(jobs, f"leaving {key}") == 1
    assert rq_jobs.ran(jobs, f"stock {key} spoilt") == 0
    assert worker.log.read_text().count("tickets that it cannot read") == 1


def every_job(queue: rq.Queue) -> list[Job]:
    """Return the jobs that a worker has, and those that wait for one."""
    ids = [*queue.job_ids, *queue.started_job_registry.get_job_ids()]
    return [job for job in map(queue.fetch_job, ids) if job is not None]


def test_a_job_that_had_to_wait_has_its_retries_left(jobs: Any, start: Start, key: str) -> None:
    """That its job was put back, as another run of the key was alive, is no retry of the function's own."""
    for _ in range(2):
        start("--worker-class", "rq.SimpleWorker")
    first = in_background(jobs.alone.get_cached, key)
    rq_jobs.await_start(jobs, key)
    jobs.alone.invalidate(key)
    second = in_background(jobs.alone.with_options(wait_timeout=30).get_cached, key)
    until(lambda: any(job.latest_result() for job in every_job(jobs.queue)))
    rq_jobs.open_gate(jobs, key)
    assert second.result(40) == 3
    assert first.result(30) == 1


def test_time_out_of_a_retry(jobs: Any, start: Start, key: str) -> None:
    """It says that a worker took the job, and not how many there are."""
    start("--worker-class", "rq.SimpleWorker")
    with pytest.raises(WaitTimeout, match=r"QUEUED for .* \(a worker took it and sent it back"):
        jobs.patient.with_options(wait_timeout=2.0).get_cached(key)
    assert rq_jobs.ran(jobs, f"patient {key}") == 1


def test_an_invalidated_flight_is_not_retried(jobs: Any, start: Start, key: str) -> None:
    """Its waiters look again instead, and get a value from after the invalidation."""
    start("--worker-class", "rq.SimpleWorker")
    waiter = in_background(jobs.gated_flaky.get_cached, key)
    rq_jobs.await_start(jobs, key)
    jobs.gated_flaky.invalidate(key)
    rq_jobs.open_gate(jobs, key)  # it fails, and has retries left
    rq_jobs.await_start(jobs, key)
    rq_jobs.open_gate(jobs, key)
    assert waiter.result(30) == 2


def test_stopped(jobs: Any, start: Start, key: str) -> None:
    """A job that is stopped on request fails for all who wait at once, in RQ's own worker; the user's callback runs."""
    start()
    gated = jobs.gated.with_options(error_ttl=30, lease=30)
    waiter = in_background(gated.get_cached, key)
    rq_jobs.await_start(jobs, key)
    (job_id,) = jobs.queue.started_job_registry.get_job_ids()
    send_stop_job_command(jobs.queue.connection, job_id)
    with pytest.raises(FlightFailed, match="was stopped"):  # a lease that ran out would say otherwise
        waiter.result(30)
    with pytest.raises(FlightFailed, match="was stopped"):  # for its `error_ttl`
        gated.get_cached(key)
    until(lambda: jobs.queue.connection.get(f"stopped:{key}"))


@pytest.mark.parametrize("worker", ["rq.Worker", "rq.SimpleWorker"])
def test_timed_out(jobs: Any, start: Start, key: str, worker: str) -> None:
    """RQ's job time-out is an error of the job, for all who wait."""
    start("--worker-class", worker)
    with pytest.raises(rq.timeouts.JobTimeoutException, match="maximum timeout value"):
        jobs.timed.get_cached(key)


def test_timed_out_on_the_way_to_the_server(jobs: Any, start: Start, key: str) -> None:
    """If RQ's time-out strikes while the outcome is brought to the server, those who wait take over at once."""
    start("--worker-class", "rq.SimpleWorker")
    assert in_background(jobs.unsettled.with_options(wait_timeout=60).get_cached, key).result(20) == 2


@pytest.mark.parametrize("values", ["on the queue's server", "elsewhere"])
def test_a_job_that_cannot_be_imported(
    jobs: Any, start: Start, key: str, prefix: str, own_server: Server, values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who wait hear so at once, and the user's `on_failure` does too."""
    if values == "elsewhere":
        monkeypatch.setenv("MEMOLOCK_REDIS_URL", own_server.url)
    start("--worker-class", "rq.SimpleWorker")

    def gone(key: str) -> str:
        return key

    gone.__module__, gone.__qualname__ = "tests.engines.rq_jobs", "gone"
    job = memolocked_job(jobs.queue, ttl=60, prefix=prefix)(gone)
    with pytest.raises(FlightFailed, match=r"failed before it ran: .*\(does its worker run where that can be imported"):
        job.get_cached(key)


def test_callbacks_of_the_user(jobs: Any, start: Start, key: str) -> None:
    """`on_success` and `on_failure` are called as RQ calls them, for flights too."""
    start("--worker-class", "rq.SimpleWorker")
    assert jobs.called.get_cached(key) == key
    until(lambda: jobs.queue.connection.get(f"succeeded:{key}"))
    with pytest.raises(rq_jobs.Sold):
        jobs.called.get_cached(f"sold {key}")
    until(lambda: jobs.queue.connection.get(f"failed:sold {key}"))


def test_a_job_with_nothing_to_run(jobs: Any, start: Start, key: str) -> None:
    """The user's `on_success` hears of results alone, and there is none where the value was set meanwhile."""
    waiter = in_background(jobs.called.get_cached, key)
    until(lambda: jobs.queue.count)
    jobs.called.set_cached("set", key)
    assert waiter.result(20) == "set"
    start("--worker-class", "rq.SimpleWorker")
    assert jobs.called.get_cached(f"last {key}") == f"last {key}"
    until(lambda: jobs.queue.connection.get(f"succeeded:last {key}"))
    assert jobs.queue.connection.get(f"succeeded:{key}") is None


@pytest.mark.parametrize("asking", ["asking", "aasking"])
@pytest.mark.parametrize("worker", ["rq.Worker", "celery_memolock.rq.MemoLockWorker"])
def test_stale_values_in_a_job(jobs: Any, start: Start, key: str, worker: str, asking: str) -> None:
    """A job's process is gone with the job: a refresh is sent by then, and with our worker what it computes is done."""
    jobs.stale.set_cached("old", key)
    jobs.stale.expire(key)
    jobs.memo.set(key, "old")
    jobs.memo.expire(key)
    job = jobs.queue.enqueue(getattr(jobs, asking), key)
    start("--worker-class", worker)
    until(lambda: job.is_finished)
    assert job.return_value() == ["old", "old"]
    until(lambda: jobs.stale.peek(key) == 1)
    if asking == "asking" and "MemoLock" in worker:
        assert jobs.memo.peek(key) == "new"


def test_a_copy_that_fails(jobs: Any, start: Start, key: str) -> None:
    """RQ fails a copy of a job that finds it gone, which says nothing about the one that runs."""
    start("--worker-class", "rq.SimpleWorker")
    waiter = in_background(jobs.gated.get_cached, key)
    rq_jobs.await_start(jobs, key)
    (copy,) = every_job(jobs.queue)
    flight = jobs.gated.memo.call((key,), {}).keys.all[1]
    before = int(jobs.records.hget(flight, "lease_until"))
    gone = ValueError("the job is gone")
    for skipped in (False, True):
        copy.meta["memolock"]["skipped"] = skipped
        on_failure(copy, jobs.queue.connection, ValueError, gone, None)
        assert int(jobs.records.hget(flight, "lease_until")) >= before
    rq_jobs.open_gate(jobs, key)
    assert waiter.result(30) == key
    assert rq_jobs.ran(jobs, f"gated {key}") == 1


def test_a_failure_that_has_no_text(jobs: Any, key: str) -> None:
    """Those who wait hear that there was one."""
    waiter = in_background(jobs.stock.get_cached, key)
    until(lambda: jobs.queue.count)
    (job,) = every_job(jobs.queue)
    on_failure(job, jobs.queue.connection, rq_jobs.Silent, rq_jobs.Silent(), None)
    with pytest.raises(FlightFailed, match="failed before it ran: <unprintable Silent>"):
        waiter.result(20)


@pytest.mark.parametrize("to", ["stock", "handing", "failing", "plain_stock"])
@pytest.mark.parametrize("when", ["during the run", "after it", "before the next"])
def test_meta_that_is_handed_on(jobs: Any, start: Start, key: str, to: str, when: str) -> None:
    """A job that got a flight's meta, and its callbacks, is none of that flight: it runs, and tells nobody."""
    for _ in range(1 + (when == "during the run")):
        start("--worker-class", "rq.SimpleWorker")
    handing = jobs.handing.with_options(wait_timeout=60)
    waiters = [in_background(handing.get_cached, key, to)]
    rq_jobs.await_start(jobs, key)
    child = rq_jobs.child_of(jobs, key)
    if when == "during the run":
        if to == "handing":
            rq_jobs.open_gate(jobs, f"{key} child")
        until(lambda: child.is_finished or child.is_failed)
    if when == "before the next":  # whose job would be done by an older one of the same flight's key
        jobs.handing.invalidate(key, to)
        waiters.append(in_background(handing.get_cached, key, to))
        until(lambda: jobs.queue.count == 2)
    rq_jobs.open_gate(jobs, key)
    if to == "handing":
        rq_jobs.open_gate(jobs, f"{key} child")
    assert waiters[0].result(40) == child.id
    until(lambda: child.is_finished or child.is_failed)
    if when == "before the next":
        rq_jobs.await_start(jobs, key)
        rq_jobs.open_gate(jobs, key)
        assert waiters[1].result(40) not in (child.id, [f"{key} child", "stock"])
    if to == "failing":
        assert child.is_failed
    elif to == "handing":
        assert rq_jobs.ran(jobs, f"handing {key} child") == 1
        assert jobs.queue.fetch_job(child.return_value()) is not None
    else:
        assert child.return_value() == [f"{key} child", "stock"]
        assert jobs.stock.peek(f"{key} child") is MISS
    assert rq_jobs.ran(jobs, f"handing {key}") == len(waiters)


def test_meta_that_is_saved(jobs: Any, start: Start, key: str) -> None:
    """What a user saves in a flight's meta, our ticket with it, is there at the next attempt of that flight."""
    start("--worker-class", "rq.SimpleWorker")
    assert jobs.saving.get_cached(key) == 3
    assert rq_jobs.ran(jobs, f"saving {key}") == 3


def test_meta_that_says_of_an_earlier_attempt_that_it_ran(jobs: Any, key: str) -> None:
    """It says nothing of the next one, which may meet a worker with other code."""
    waiter = in_background(jobs.saving.get_cached, key)
    until(lambda: jobs.queue.count)
    (job,) = every_job(jobs.queue)
    job.meta["memolock"]["ran"] = f"rq/{job.id}/0"
    job.retries_left = 1
    on_success(job, jobs.queue.connection, None)
    with pytest.raises(FlightFailed, match="without a run of its flight"):
        waiter.result(20)


def test_a_ticket_of_an_earlier_version(jobs: Any, start: Start, key: str) -> None:
    """It names no job, and its caller waits for it all the same."""
    waiter = in_background(jobs.stock.get_cached, key)
    until(lambda: jobs.queue.count)
    (job,) = every_job(jobs.queue)
    assert job.meta["memolock"].pop("job") == job.id
    job.save_meta()
    start("--worker-class", "rq.SimpleWorker")
    assert waiter.result(20) == [key, "stock"]


def test_plain_jobs(jobs: Any, start: Start, key: str) -> None:
    """`enqueue`, `delay` and the queue's own `enqueue` run the function as ever, and touch no cache."""
    start("--worker-class", "rq.SimpleWorker")
    for send in (jobs.stock.enqueue, jobs.stock.delay, lambda key: jobs.queue.enqueue(jobs.stock, key)):
        job = send(key)
        assert job.func_name == "tests.engines.rq_jobs.stock"
        until(job.get_status(refresh=True).FINISHED.__eq__ and (lambda job=job: job.is_finished))
        assert job.return_value() == [key, "stock"]
    assert jobs.stock.peek(key) is MISS
    assert jobs.stock.enqueue(key, job_id=f"mine-{key}", at_front=True).id == f"mine-{key}"


def test_json_messages(jobs: Any, start: Start, key: str, server: Server, prefix: str) -> None:
    """With RQ's JSON serializer nothing is pickled; what JSON cannot carry is refused by its name."""
    start("--worker-class", "rq.SimpleWorker", "--serializer", "rq.serializers.JSONSerializer")
    assert jobs.plain.get_cached(key) == key
    with pytest.raises(ArgumentError, match=r"argument 'key' of tests\.engines\.rq_jobs\.plain, a bytes"):
        jobs.plain.get_cached(b"bytes")


def test_no_worker(jobs: Any, key: str) -> None:
    """Without a worker the time-out says that the job is queued."""
    with pytest.raises(WaitTimeout, match=r"QUEUED for 0\.\d s \(no worker is registered for queue"):
        jobs.stock.with_options(wait_timeout=0.5).get_cached(key)


def test_busy_worker(jobs: Any, start: Start, key: str) -> None:
    """Where the only worker is busy the time-out says so, to threads and to asyncio."""
    start("--worker-class", "rq.SimpleWorker")
    runner = in_background(jobs.gated.get_cached, key)
    rq_jobs.await_start(jobs, key)
    impatient = jobs.stock.with_options(wait_timeout=0.5)
    for ask in (impatient.get_cached, lambda key: asyncio.run(impatient.aget_cached(key))):
        with pytest.raises(
            WaitTimeout, match=r"QUEUED for .*workers registered for queue .*: 1, of them busy: 1"
        ) as caught:
            ask(key)
        assert caught.value.state == "QUEUED"
    rq_jobs.open_gate(jobs, key)
    assert runner.result(30) == key


def test_refresh_and_ttl_of_the_job(jobs: Any, start: Start, key: str) -> None:
    """A flight's job leaves nothing behind when it is done: nobody asks for its result by an id."""
    assert jobs.stock.refresh(key) is True
    (job_id,) = jobs.queue.job_ids
    assert jobs.queue.fetch_job(job_id).description == f"tests.engines.rq_jobs.stock('{key}')"
    start("--worker-class", "rq.SimpleWorker")
    until(lambda: jobs.stock.peek(key) == [key, "stock"])
    until(lambda: jobs.queue.fetch_job(job_id) is None)


def test_eager(server: Server, prefix: str, key: str) -> None:
    """With `is_async=False` the caller runs the job, and caches where a server is there."""
    ran: list[str] = []
    with redis.Redis.from_url(server.url) as connection:

        @memolocked_job(rq.Queue(prefix, is_async=False, connection=connection), ttl=60, prefix=prefix)
        def here(key: str) -> str:
            ran.append(key)
            if key.startswith("bad"):
                raise KeyError(key)
            return key

        assert [here.get_cached(key), here.get_cached(key)] == [key] * 2
        assert ran == [key]
        with pytest.raises(KeyError):
            here.get_cached(f"bad {key}")
    with redis.Redis(port=1) as nowhere:

        @memolocked_job(rq.Queue(prefix, is_async=False, connection=nowhere), ttl=60)
        def there(key: str) -> str:
            return key

        assert there.get_cached(key) == key
        assert there.peek(key) is MISS


def test_decorator_that_adds_an_argument(server: Server, prefix: str) -> None:
    """What the job takes its callers give."""

    def with_session(function: Any) -> Any:
        return functools.wraps(function)(lambda *args, **kwargs: function(*args, session="session", **kwargs))

    with redis.Redis.from_url(server.url) as connection:
        queue = rq.Queue(prefix, is_async=False, connection=connection)

        @memolocked_job(queue, ttl=60, prefix=prefix, key="{number}")
        @with_session
        def doubled(number: int, session: str) -> list[Any]:
            return [2 * number, session]

        for number in (3, 4):
            assert doubled.get_cached(number) == doubled.get_cached(number=number) == [2 * number, "session"]
            assert doubled.peek(number) == doubled.peek(number=number) == [2 * number, "session"]
        with pytest.raises(TypeError, match="number"):
            doubled.get_cached()


def test_wrong_options() -> None:
    """A wrong option is refused when the module is imported, by its name; so is a queue without a connection."""
    for wrong, text in (
        ({"ttl": -1}, "ttl"),
        ({"ttl": 1, "wait_timout": 3}, "unknown option 'wait_timout'"),
        ({"ttl": 1, "refresh_every": 3}, "rq cron"),
        ({"ttl": 1, "ignore": ["nope"]}, "ignore names 'nope'"),
        ({"ttl": 1, "compress_over": 100}, "compress_over=100 needs compression"),
    ):
        with pytest.raises(OptionError, match=text):
            memolocked_job(**wrong)(lambda key: key)  # type: ignore[arg-type]

    @memolocked_job(ttl=1)
    def homeless(key: str) -> str:
        return key

    with pytest.raises(ConfigurationError, match="RQ_REDIS_URL"):
        homeless.get_cached("k")


def test_wrong_servers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers are named as for all of memolock, in Celery's spellings too, and what is none is refused by its name."""
    queue = rq.Queue(connection=redis.Redis.from_url(server.url))
    asking: Any = redis.asyncio.Redis.from_url(server.url)
    for how, text in (
        ({"queue": queue, "redis": asking}, r"redis of memolocked_job is to be .* not a redis\.asyncio\.client\.Redis"),
        ({"queue": queue, "redis": "nonsense"}, "redis of memolocked_job cannot be used"),
        ({"connection": asking}, "connection of memolocked_job is to be"),
        ({"connection": "nonsense"}, "connection of memolocked_job cannot be used"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            memolocked_job(**how, ttl=1)(lambda key: key).get_cached("k")  # type: ignore[attr-defined, arg-type]
    for name, how in (("RQ_REDIS_URL", {}), ("MEMOLOCK_REDIS_URL", {"queue": queue})):
        monkeypatch.setenv(name, "http://h")
        with pytest.raises(ConfigurationError, match=f"{name} cannot be used"):
            memolocked_job(**how, ttl=1)(lambda key: key).get_cached("k")  # type: ignore[attr-defined, arg-type]
        monkeypatch.delenv(name)
    with Server(unix_socket=True) as elsewhere:
        monkeypatch.setenv("MEMOLOCK_REDIS_URL", elsewhere.url.replace("unix://", "redis+socket://"))
        job: Any = memolocked_job(queue, ttl=1)(lambda key: key)
        assert job.peek("k") is MISS


def test_a_function_within_a_function(server: Server, prefix: str) -> None:
    """No worker could import it."""

    @memolocked_job(prefix, ttl=1, connection=server.url, prefix=prefix)
    def inner(key: str) -> str:
        return key

    with pytest.raises(DispatchError, match="defined within another function"):
        inner.get_cached("k")


def test_a_function_of_a_script(server: Server, prefix: str) -> None:
    """A worker has another `__main__`, so none could import it; who needs no worker may have it."""

    def size(key: str) -> int:
        return len(key)

    size.__module__, size.__qualname__ = "__main__", "size"
    with redis.Redis.from_url(server.url) as connection:
        queue = rq.Queue(prefix, connection=connection)
        sent = memolocked_job(queue, ttl=5, prefix=prefix)(size)
        with pytest.raises(DispatchError, match=r"^__main__\.size is defined in what is run as a script: put it into"):
            sent.get_cached("tea")
        assert queue.job_ids == []
        here = rq.Queue(prefix, is_async=False, connection=connection)
        assert memolocked_job(here, ttl=5, prefix=prefix)(size).get_cached("coffee") == 6


def test_queue_down(prefix: str, server: Server, key: str) -> None:
    """When RQ's Redis is down all who wait hear so, and the key is free again."""

    def stock(key: str) -> str:
        return key

    stock.__qualname__ = "stock"
    job = memolocked_job(prefix, ttl=1, connection="redis://127.0.0.1:1/0", redis=server.url, prefix=prefix)(stock)
    waiters = [in_background(job.get_cached, key) for _ in range(3)]
    for waiter in waiters:
        with pytest.raises(DispatchError, match=f"could not be sent to queue '{prefix}'"):
            waiter.result(20)


def test_a_queue_that_is_made_later(jobs: Any, key: str) -> None:
    """A function that returns the queue is called at the first use, not at import."""
    called: list[int] = []

    def queue() -> rq.Queue:
        called.append(1)
        return jobs.queue  # type: ignore[no-any-return]

    @memolocked_job(queue, ttl=1)
    def lazy(key: str) -> str:
        return key

    assert not called
    assert lazy.peek(key) is MISS
    assert lazy.peek(key) is MISS
    assert called == [1]


DJANGO = """
import sys
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["django_rq"], DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    RQ_QUEUES={"default": {"URL": sys.argv[1]}, sys.argv[2]: {"URL": sys.argv[1]}}, RQ={"COMMIT_MODE": sys.argv[4]},
)
django.setup()
import django_rq
from tests.engines import django_jobs
django_jobs.NAME = sys.argv[2]
if sys.argv[3] == "work":
    django_rq.get_worker(sys.argv[2], worker_class="rq.SimpleWorker").work()
else:
    print(django_jobs.stock.get_cached(sys.argv[3]), django_jobs.stock.peek(sys.argv[3]))
"""


@contextmanager
def django(server: Server, prefix: str, log: Path) -> Iterator[Worker]:
    """A worker of Django's integration of RQ."""
    process = Worker(["-c", DJANGO, server.url, prefix, "work", "auto"], {}, log, "Listening on")
    try:
        process.await_ready()
        yield process
    finally:
        process.stop()


def test_django_rq(server: Server, prefix: str, key: str, tmp_path: Path) -> None:
    """django-rq's queues and workers, configured by Django's settings. Flights are sent at once, whatever they say."""
    with django(server, prefix, tmp_path / "log"):
        for mode in ("on_db_commit", "request_finished"):
            asked = f"{key} {mode}"
            command = [sys.executable, "-W", "ignore", "-c", DJANGO, server.url, prefix, asked, mode]
            done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
            assert done.stdout == f"{asked} by django {asked} by django\n", done.stderr


def test_imports() -> None:
    """The RQ engine does without Celery, the inline engine without both; and each says which extra is missing."""
    code = "import sys, json, {}; print(json.dumps([name in sys.modules for name in ('celery', 'rq')]))"
    for module, expected in (("celery_memolock", [False, False]), ("celery_memolock.rq", [False, True])):
        done = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == expected
    hidden = "import sys; sys.modules['rq'] = None; import celery_memolock.rq"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert "pip install 'celery-memolock[rq]'" in done.stderr
