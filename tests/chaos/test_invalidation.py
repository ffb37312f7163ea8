"""An invalidation from another process, at every step of a flight: no later call gets data from before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from celery_memolock import MISS
from celery_memolock.server import Server
from celery_memolock.testing import Link
from tests.workers.conftest import another_process, in_background, until
from tests.workers.shop import Shop, Sold, make

AnyShop = tuple[Shop, str, str]

INVALIDATE = """
import sys
from tests.workers.shop import shop

shop.records.rpush(f"ready:{sys.argv[1]}", 1)
shop.records.blpop([f"go:{sys.argv[1]}"], 60)
print(shop.sourced.invalidate(*sys.argv[1:]))
"""


@contextmanager
def invalidator(of: AnyShop, *arguments: str) -> Iterator[Callable[[], str]]:
    """Start another process, which invalidates a key as soon as it is told to → what it printed."""
    made, key = of[0], arguments[0]
    with another_process(of, INVALIDATE, *arguments) as process:
        made.records.blpop([f"ready:{key}"], 30)  # by then it has imported all that it needs

        def go() -> str:
            made.records.rpush(f"go:{key}", 1)
            out, error = process.communicate(timeout=60)
            assert process.returncode == 0, error
            return out

        yield go


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
    then = {"retrying": "retry", "running": "gate", "detached": "gate"}.get(step, "")
    with invalidator(any_shop, key, then) as invalidate:
        waiter = reach(step, made, key)
        made.records.set(f"source:{key}", 2)
        assert invalidate() == f"{step == 'stored'}\n"
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
        with invalidator((made, server.url, server.url), key) as invalidate, ExitStack() as stack:
            if step == b"P":
                made.app.connection_for_write().ensure_connection()
                stack.enter_context(link.deaf())
            waiter = in_background(patient.get_cached, key)
            until(lambda: state_of(made, key) == step)
            made.records.set(f"source:{key}", 2)
            assert invalidate() == "False\n"
        start_worker(server.url, server.url, prefix=prefix)
        assert waiter.result(30) == 2
        assert made.ran(key) == 1


@pytest.mark.one_driver
def test_in_the_back_off_after_a_failure(any_shop: AnyShop, key: str) -> None:
    """An invalidation clears the record of an error as well."""
    made, *_ = any_shop
    for count in (1, 1, 2):
        if count == 2:
            made.failing.invalidate(key)
        with pytest.raises(Sold):
            made.failing.get_cached(key)
        assert made.ran(key) == count
