"""Several values at once: hits and misses in a trip each, and every call with its own outcome."""

from __future__ import annotations

from dataclasses import replace

import pytest

from celery_memolock import ArgumentError, WaitTimeout
from celery_memolock.engines.celery_settings import store_of
from celery_memolock.server import Server
from tests.conftest import commands_run
from tests.workers.conftest import in_background, until
from tests.workers.shop import Shop, Sold, make

AnyShop = tuple[Shop, str, str]


def test_hits_and_misses(any_shop: AnyShop, key: str) -> None:
    """Stored values, missing ones, and one key twice come back in the order of the calls, from one run each."""
    made, *_ = any_shop
    for number in range(0, 50, 2):
        made.stock.set_cached("stored", f"{key}-{number}")
    calls = [(f"{key}-{number}",) for number in range(50)]
    found = made.stock.get_cached_many([*calls, (f"{key}-1",)])
    assert found == ["stored" if n % 2 == 0 else [f"{key}-{n}", "stock"] for n in range(50)] + [[f"{key}-1", "stock"]]
    assert [made.ran(f"{key}-{number}") for number in range(50)] == [0, 1] * 25
    assert made.stock.get_cached_many(calls) == found[:50]
    assert made.stock.get_cached_many([]) == []
    assert len(store_of(made.app).inbox.rooms) == 0


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_hits_run_no_script(own_server: Server, prefix: str, key: str, driver: str) -> None:
    """100 hits are 100 GETs, and no script; tests/unit/test_weave.py shows that they are sent together."""
    made = replace(make(own_server.url, own_server.url, prefix), driver=driver)
    calls = [(f"{key}-{number}",) for number in range(100)]
    made.stock.set_cached_many([(call, "stored") for call in calls])
    gets, scripts = (commands_run(made.records, name) for name in ("get", "evalsha"))
    made.stock.get_cached_many(calls)
    assert commands_run(made.records, "get") == gets + 100
    assert commands_run(made.records, "evalsha") == scripts


def test_each_its_own_outcome(any_shop: AnyShop, key: str) -> None:
    """A failing call spoils no other: with `return_exceptions` its error stands in its place, else it is raised."""
    made, *_ = any_shop
    missing = made.missing
    calls = [(f"sold {key}",), ({1, 2}, 3, 4), (f"unknown {key}",)]
    found = missing.get_cached_many(calls, return_exceptions=True)
    assert [type(each) for each in found] == [Sold, TypeError, KeyError]
    with pytest.raises(Sold):
        missing.get_cached_many(calls)
    with pytest.raises(ArgumentError, match="cannot become part of a key"):
        made.stock.get_cached_many([(object(),)])


def test_time_out_of_some(any_shop: AnyShop, key: str) -> None:
    """Who comes in time has its value, who does not has a time-out, and leaves no registration."""
    made, *_ = any_shop
    asked = made.gated.with_options(wait_timeout=1.5)
    work = in_background(asked.get_cached_many, [(f"{key}-1",), (f"{key}-2",)], return_exceptions=True)
    made.await_start(f"{key}-2")
    made.open_gate(f"{key}-2")
    found = work.result(20)
    assert found[1] == "open"
    assert isinstance(found[0], WaitTimeout)
    flight = made.tasks["gated"].memo.call((f"{key}-1",), {}).keys.all[1]
    assert not [field for field in made.records.hkeys(flight) if field.startswith(b"w:")]  # type: ignore[union-attr]
    made.open_gate(f"{key}-1")
    until(lambda: not made.records.exists(flight))


def test_joins_what_others_began(any_shop: AnyShop, key: str) -> None:
    """A call that finds its flight under way waits for it, beside others that start theirs."""
    made, *_ = any_shop
    alone = in_background(made.gated.get_cached, f"{key}-1")
    made.await_start(f"{key}-1")
    many = in_background(made.gated.get_cached_many, [(f"{key}-1",), (f"{key}-2",)])
    made.await_start(f"{key}-2")
    for number in (1, 2):
        made.open_gate(f"{key}-{number}", f"open {number}")
    assert many.result(20) == ["open 1", "open 2"]
    assert alone.result(20) == "open 1"
    assert made.ran(f"{key}-1") == 1
