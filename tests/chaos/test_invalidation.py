"""An invalidation from another process, at every step of a flight: no later call gets data from before it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from celery_memolock import MISS
from celery_memolock.server import Server
from celery_memolock.testing import Link
from tests.workers.conftest import in_a_process, in_background, until
from tests.workers.shop import Shop, Sold, make

AnyShop = tuple[Shop, str, str]

INVALIDATE = """
import sys
from tests.workers.shop import shop

print(shop.sourced.invalidate(*sys.argv[1:]))
"""


def state_of(made: Shop, *arguments: str) -> bytes | None:
    """Return the state of a flight as the server has it."""
    flight = made.sourced.memo.call(arguments, {}).keys.all[1]
    return made.records.hget(flight, "state")  # type: ignore[return-value]


def reach(step: str, made: Shop, key: str) -> Future[Any] | None:
    """Bring a flight to a step, with somebody who waits for it."""
    if step == "nothing":
        return None
    then = {"retrying": "retry", "running": "gate", "detached": "gate"}.get(step, "")
    waiter = in_background(made.sourced.get_cached, key, then)
    made.await_start(key)
    if step in ("stored", "expired"):
        waiter.result(30)
    if step == "expired":
        made.records.delete(made.sourced.memo.call((key, then), {}).keys.entry)
    if step == "retrying":
        until(lambda: state_of(made, key, then) == b"Q")
    if step == "detached":
        made.sourced.invalidate(key, then)
    return waiter


@pytest.mark.parametrize("step", ["nothing", "running", "detached", "retrying", "stored", "expired"])
def test_at_each_step_of_a_run(any_shop: AnyShop, key: str, step: str) -> None:
    """Whoever calls after it sees what the source has been changed to; whoever called before gets an answer, too."""
    made, *_ = any_shop
    made.records.set(f"source:{key}", 1)
    waiter = reach(step, made, key)
    made.records.set(f"source:{key}", 2)
    then = {"retrying": "retry", "running": "gate", "detached": "gate"}.get(step, "")
    done = in_a_process(any_shop, INVALIDATE, key, then)
    assert done.stdout == f"{step == 'stored'}\n", done.stderr
    assert made.sourced.peek(key, then) is MISS
    asked = in_background(made.sourced.get_cached, key, then)
    if then == "gate":
        made.await_start(key)
        for _ in range(2):
            made.open_gate(key)
    assert asked.result(30) == 2
    assert made.sourced.get_cached(key, then) == 2
    if waiter is not None:
        assert waiter.result(30) == (2 if step == "retrying" else 1)


@pytest.mark.parametrize("step", [b"P", b"Q"])
def test_before_a_run(server: Server, prefix: str, key: str, start_worker: Callable[..., Any], step: bytes) -> None:
    """A flight whose message is on its way, or waits, reads the source later, and goes on."""
    with Link(server.url) as link:
        made = make(link.url, server.url, prefix)
        made.records.set(f"source:{key}", 1)
        patient = made.sourced.with_options(dispatch_lease=10, wait_timeout=30)
        if step == b"P":
            made.app.connection_for_write().ensure_connection()
            with link.deaf():
                waiter = in_background(patient.get_cached, key)
                until(lambda: state_of(made, key) == step)
                made.records.set(f"source:{key}", 2)
                done = in_a_process((made, server.url, server.url), INVALIDATE, key)
        else:
            waiter = in_background(patient.get_cached, key)
            until(lambda: state_of(made, key) == step)
            made.records.set(f"source:{key}", 2)
            done = in_a_process((made, server.url, server.url), INVALIDATE, key)
        assert done.stdout == "False\n", done.stderr
        start_worker(server.url, server.url, prefix=prefix)
        assert waiter.result(30) == 2
        assert made.ran(key) == 1


def test_in_the_back_off_after_a_failure(any_shop: AnyShop, key: str) -> None:
    """An invalidation clears the record of an error as well."""
    made, *_ = any_shop
    for count in (1, 1, 2):
        if count == 2:
            made.failing.invalidate(key)
        with pytest.raises(Sold):
            made.failing.get_cached(key)
        assert made.ran(key) == count
