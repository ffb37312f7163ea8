"""The ways in which Celery ends a task without a value: those who wait hear so, typed and at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from celery_memolock import MISS, FlightFailed
from celery_memolock.server import Server
from tests.workers.conftest import BROKERS, in_background, until
from tests.workers.shop import Shop, make

AnyShop = tuple[Shop, str, str]


@pytest.mark.parametrize(
    ("how", "text"),
    [("ignore", "Ignore: enough"), ("reject", "Reject: .*no"), ("replace", "Ignore: Replaced by new task")],
)
def test_no_value(any_shop: AnyShop, key: str, how: str, text: str) -> None:
    """`Ignore`, `Reject` and `replace` fail the flight, and leave the key free."""
    made, *_ = any_shop
    for count in (1, 2):
        with pytest.raises(FlightFailed, match=f"'shop.ending' ended without a value: {text}"):
            made.ending.get_cached(key, how)
        assert made.ran(key) == count


def test_replaced_by_itself(any_shop: AnyShop, key: str) -> None:
    """What a task is replaced by is no flight's, and runs as it would for any task."""
    made, *_ = any_shop
    with pytest.raises(FlightFailed, match="Ignore: Replaced by new task"):
        made.ending.get_cached(key, "replace by itself")
    until(lambda: made.ran(f"{key} anew") == 1)


def test_reject_and_requeue(any_shop: AnyShop, key: str) -> None:
    """`Reject(requeue=True)` puts the flight back into the queue, and its waiters keep waiting."""
    made, *_ = any_shop
    assert made.ending.get_cached(key, "requeue") == "of the second run"
    assert made.ran(key) == 2


def test_reject_what_was_acknowledged(any_shop: AnyShop, key: str) -> None:
    """With early acknowledgement nothing comes back: the flight fails, and the error names the cure."""
    made, *_ = any_shop
    with pytest.raises(FlightFailed, match="set acks_late=True"):
        made.early.get_cached(key)


def test_a_run_that_goes_on_after_its_retry(any_shop: AnyShop, key: str) -> None:
    """With `retry(throw=False)` the first to settle wins, and the other one's outcome is refused."""
    made, *_ = any_shop
    assert made.ending.get_cached(key, "go on") == "of the run that went on"
    assert made.ending.get_cached(key, "go on") == "of the run that went on"


def test_soft_time_limit(any_shop: AnyShop, key: str) -> None:
    """A soft time limit is an error of the task like any other."""
    made, *_ = any_shop
    with pytest.raises(SoftTimeLimitExceeded):
        made.soft.get_cached(key)
    assert made.soft.peek(key) is MISS


def test_revoked_in_the_queue(any_shop: AnyShop, key: str, sent: list[str]) -> None:
    """A message that is revoked before a worker takes it fails its flight as soon as one does."""
    made, *_ = any_shop
    busy = [in_background(made.gated.get_cached, f"{key}-{number}") for number in range(4)]
    for number in range(4):
        made.await_start(f"{key}-{number}")
    stock = made.stock.with_options(error_ttl=30)
    waiter = in_background(stock.get_cached, key)
    until(lambda: len(sent) == 5)
    made.app.control.revoke(sent[-1])
    until(lambda: all(sent[-1] in revoked for revoked in (made.app.control.inspect().revoked() or {"": []}).values()))
    for number in range(4):
        made.open_gate(f"{key}-{number}")
    with pytest.raises(FlightFailed, match=r"the message of task 'shop\.stock' was revoked"):
        waiter.result(30)
    with pytest.raises(FlightFailed, match="was revoked"):  # for its `error_ttl`
        stock.get_cached(key)
    assert [future.result(30) for future in busy] == ["open"] * 4
    assert made.ran(key) == 0


def test_expired_in_the_queue(any_shop: AnyShop, sent: list[str], key: str) -> None:
    """A task with Celery's own `expires` fails its flight when its message comes too late."""
    made, *_ = any_shop
    busy = [in_background(made.gated.get_cached, f"{key}-{number}") for number in range(4)]
    for number in range(4):
        made.await_start(f"{key}-{number}")
    waiter = in_background(made.expiring.get_cached, key)
    until(lambda: len(sent) == 5)
    threading.Event().wait(0.3)
    for number in range(4):
        made.open_gate(f"{key}-{number}")
    with pytest.raises(FlightFailed, match="was expired"):
        waiter.result(30)
    assert [future.result(30) for future in busy] == ["open"] * 4


@BROKERS
def test_expired_before_a_worker_came(
    any_shop: AnyShop, start_worker: Callable[..., Any], sent: list[str], key: str
) -> None:
    """What expired where no worker saw it is told by the first that comes: no broker drops it unseen."""
    _, broker, store = any_shop
    made = make(broker, store, f"late-{key}")
    waiter = in_background(made.expiring.with_options(wait_timeout=60).get_cached, key)
    until(lambda: sent)
    threading.Event().wait(0.5)
    start_worker(broker, store, prefix=f"late-{key}")
    with pytest.raises(FlightFailed, match="was expired"):
        waiter.result(90)
    assert made.expiring.get_cached(key) == key


def test_errors_that_are_cached(any_shop: AnyShop, key: str) -> None:
    """`cache_errors` keeps the chosen errors, and only those, for their time."""
    made, *_ = any_shop
    for kind, runs in ((f"sold {key}", 1), (f"unknown {key}", 2)):
        for _ in range(2):
            with pytest.raises(Exception, match=key):
                made.missing.get_cached(kind)
        assert made.ran(kind) == runs


def test_abandoned_in_the_queue(server: Server, prefix: str, key: str, start_worker: object) -> None:
    """With `skip_abandoned` a worker does not run what nobody waits for any more; what is wanted it runs."""
    made = make(server.url, server.url, prefix)
    hurried = made.stock.with_options(wait_timeout=0.3, skip_abandoned=True)
    with pytest.raises(TimeoutError):
        hurried.get_cached(key)
    wanted = in_background(made.stock.with_options(skip_abandoned=True).get_cached, f"wanted {key}")
    assert callable(start_worker)
    _, worker = start_worker(server.url, server.url, prefix=prefix)
    assert wanted.result(30) == [f"wanted {key}", "stock"]
    until(lambda: "nobody waits for it any more" in worker.log.read_text())
    assert made.ran(key) == 0
