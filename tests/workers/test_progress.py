"""A task tells those who wait how far it is."""

from __future__ import annotations

import asyncio

import pytest

from celery_memolock import Progress, current_flight
from tests.workers.conftest import in_background, until
from tests.workers.shop import Shop

AnyShop = tuple[Shop, str, str]
STEPS = [Progress(0.0, "step 0"), Progress(0.5, "step 1"), Progress(1.0, "step 2")]


def test_progress(any_shop: AnyShop, key: str) -> None:
    """Every waiting caller that wants to hears each report, and one that comes later the last of them first."""
    made, *_ = any_shop
    early: list[Progress] = []
    late: list[Progress] = []
    first = in_background(made.reporting.with_options(on_progress=early.append).get_cached, key)
    plain = in_background(made.reporting.get_cached, key)
    made.await_start(key)
    until(lambda: early == STEPS[:1])
    made.open_gate(key)
    made.await_start(key)
    until(lambda: early == STEPS[:2])
    second = in_background(made.reporting.with_options(on_progress=late.append).get_cached, key)
    until(lambda: late == STEPS[1:2])
    made.open_gate(key)
    made.await_start(key)
    until(lambda: (early, late) == (STEPS, STEPS[1:]))
    made.open_gate(key)
    assert [first.result(30), plain.result(30), second.result(30)] == [key] * 3
    assert made.ran(key) == 1


def test_follow(any_shop: AnyShop, key: str) -> None:
    """From asyncio the reports can be iterated over; with a value at hand there are none."""
    made, *_ = any_shop

    async def follow() -> list[Progress]:
        heard = []
        async for progress in made.tasks["reporting"].afollow(key):
            heard.append(progress)
            made.open_gate(key)
        return heard

    assert asyncio.run(follow()) == STEPS
    assert asyncio.run(follow()) == []
    assert made.reporting.peek(key) == key


def test_callback_that_fails(any_shop: AnyShop, key: str) -> None:
    """What `on_progress` raises is the caller's own affair; the others go on to wait."""
    made, *_ = any_shop

    def fail(_: Progress) -> None:
        raise LookupError("of the caller")

    other = in_background(made.reporting.get_cached, key)
    with pytest.raises(LookupError):
        made.reporting.with_options(on_progress=fail).get_cached(key)
    for _ in range(3):
        made.open_gate(key)
    assert other.result(30) == key


@pytest.mark.parametrize("report", [(-0.1, ""), (2, ""), (float("nan"), ""), (0.5, "x" * 1001)])
def test_reports_that_make_no_sense(report: tuple[float, str]) -> None:
    """They are an error where they are made."""
    with pytest.raises(ValueError, match="progress"):
        current_flight.progress(*report)
