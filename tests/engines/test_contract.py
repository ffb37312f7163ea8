"""One contract: every engine, asked from threads and from asyncio, over each kind of server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Any

import pytest

from celery_memolock import (
    MISS,
    EncodeError,
    OptionError,
    Progress,
    ReentrantFlight,
    TaskFailed,
    ValueTooLarge,
    WaitTimeout,
)
from celery_memolock.external import fail, settle
from tests.engines.conftest import Asked
from tests.engines.tasks import ODD, Sold, Stock
from tests.workers.conftest import in_background, until

#: Ten callers of another process.
CROWD = """
from concurrent.futures import ThreadPoolExecutor
def ask(_):
    try:
        return place.tasks[args[0]].get_cached(args[1])
    except Exception as error:
        return f"{type(error).__name__} {error}"
with ThreadPoolExecutor(10) as pool:
    answer = list(pool.map(ask, range(10)))
"""


def test_one_run_for_all(shop: Asked, key: str) -> None:
    """Twenty callers here and ten in each of two other processes: one run, forty equal results."""
    with ThreadPoolExecutor(20) as pool:
        here = [pool.submit(shop.gated.get_cached, key) for _ in range(20)]
        for other in shop.others:
            other.tell(CROWD, "gated", key)
        shop.await_start(key)
        until(lambda: shop.waiting("gated", key) == 3)
        shop.open_gate(key)
        assert [each.result(30) for each in here] == ["open"] * 20
        assert [other.answer() for other in shop.others] == [["open"] * 10] * 2
    assert shop.ran(key) == 1


def test_failure_reaches_all(shop: Asked, key: str) -> None:
    """A failed run tells all, here and elsewhere. Not all may ask before it fails, so it is kept for a while."""
    key = f"gated {key}"
    with ThreadPoolExecutor(5) as pool:
        here = [pool.submit(shop.remembered.get_cached, key) for _ in range(5)]
        for other in shop.others:
            other.tell(CROWD, "remembered", key)
        shop.await_start(key)
        until(lambda: shop.waiting("remembered", key) == 3)
        shop.open_gate(key)
        for each in here:
            with pytest.raises(Sold) as caught:
                each.result(30)
            assert caught.value.args == (key, 7)
        assert [other.answer() for other in shop.others] == [[f"Sold ('{key}', 7)"] * 10] * 2
    assert shop.ran(key) == 1


def test_a_failed_key_is_free(shop: Asked, key: str) -> None:
    """The next call runs the task again."""
    for count in (1, 2):
        with pytest.raises(Sold):
            shop.failing.get_cached(key)
        assert shop.ran(key) == count


@pytest.mark.parametrize("value", [None, 0, "", [], False, {"a": [1, 2.5, None]}])
def test_empty_values_are_hits(shop: Asked, key: str, value: Any) -> None:
    """Whatever a task returns is a hit the next time."""
    assert [shop.stock.get_cached(key, value) for _ in range(2)] == [[key, value]] * 2
    assert shop.stock.peek(key, value) == [key, value]
    assert shop.ran(key) == 1


def test_invalidation_in_mid_run(shop: Asked, key: str) -> None:
    """Who waited before an invalidation gets the old run's value; who comes after gets one computed after."""
    before = in_background(shop.gated.get_cached, key)
    shop.await_start(key)
    assert shop.gated.invalidate(key) is False
    after = in_background(shop.gated.get_cached, key)
    shop.await_start(key)
    shop.open_gate(key, "old")
    assert before.result(30) == "old"
    assert shop.gated.peek(key) is MISS
    shop.open_gate(key, "new")
    assert after.result(30) == "new"
    assert shop.gated.peek(key) == "new"


def test_expired_in_mid_run(shop: Asked, key: str) -> None:
    """Where no stale value is kept, to expire is to invalidate: who comes after gets a value computed after."""
    before = in_background(shop.gated.get_cached, key)
    shop.await_start(key)
    assert shop.gated.expire(key) is False
    after = in_background(shop.gated.get_cached, key)
    shop.await_start(key)
    shop.open_gate(key, "old")
    assert before.result(30) == "old"
    shop.open_gate(key, "new")
    assert after.result(30) == "new"
    assert shop.gated.peek(key) == "new"


def test_set_cached_in_mid_run(shop: Asked, key: str) -> None:
    """A value set from outside goes to those who wait, and the run's late value is refused."""
    runner = in_background(shop.gated.get_cached, key)
    shop.await_start(key)
    waiter = in_background(shop.gated.get_cached, key)
    shop.gated.set_cached("set", key)
    assert waiter.result(30) == "set"
    shop.open_gate(key, "late")
    assert runner.result(30) == "set"
    assert shop.gated.peek(key) == "set"


def test_set_cached_in_mid_run_of_what_is_not_stored(shop: Asked, key: str) -> None:
    """It goes to those who wait just so; nothing is stored then, neither what it replaces nor the run's late value."""
    chosen = shop.gated_chosen.with_options(poll_interval=30, max_poll_interval=30)

    def registered() -> list[bytes]:
        fields: Any = shop.server.hgetall(shop.flight("gated_chosen", key))
        return [sequence for field, sequence in fields.items() if field.startswith(b"w:")]

    runner = in_background(chosen.get_cached, key)
    shop.await_start(key)
    before = registered()
    waiter = in_background(chosen.get_cached, key)
    until(lambda: registered() != before)
    chosen.set_cached("no", key)
    assert waiter.result(30) == "no"
    shop.open_gate(key, "late")
    assert runner.result(30) == "no"
    assert chosen.peek(key) is MISS
    chosen.set_cached("yes", key)
    chosen.set_cached("no", key)
    assert chosen.peek(key) is MISS


def test_refresh_in_mid_run(shop: Asked, key: str) -> None:
    """A refresh that is asked for while a run is under way leads to another run after it."""
    waiter = in_background(shop.gated.get_cached, key)
    shop.await_start(key)
    assert shop.gated.with_options(nested="dispatch").refresh(key) is False
    shop.open_gate(key, "first")
    assert waiter.result(30) == "first"
    shop.await_start(key)
    assert shop.gated.get_cached(key) == "first"
    shop.open_gate(key, "second")
    until(lambda: shop.gated.peek(key) == "second")
    assert shop.ran(key) == 2


def test_refresh_and_invalidation_in_mid_run(shop: Asked, key: str) -> None:
    """A refresh that was asked for is not lost because the run is moved aside: the value is there, and no older one."""
    waiter = in_background(shop.gated.get_cached, key)
    shop.await_start(key)
    shop.gated.with_options(nested="dispatch").refresh(key)
    shop.gated.invalidate(key)
    shop.open_gate(key, "first")
    assert waiter.result(30) == "first"
    shop.await_start(key)
    assert shop.gated.peek(key) is MISS
    shop.open_gate(key, "second")
    until(lambda: shop.gated.peek(key) == "second")


def test_force(shop: Asked, key: str) -> None:
    """A forced call never gets a value whose computing began before it."""
    runner = in_background(shop.gated.get_cached, key)
    shop.await_start(key)
    forced = in_background(shop.gated.with_options(force_refresh=True).get_cached, key)
    shop.open_gate(key, "before")
    assert runner.result(30) == "before"
    shop.await_start(key)
    assert not forced.done()
    shop.open_gate(key, "after")
    assert forced.result(30) == "after"


def test_the_next_run_is_wanted_as_this_one(shop: Asked, key: str) -> None:
    """A refresh that is asked for during a run is done with the options of the call that began it."""
    nested = {} if shop.place.engine == "inline" else {"nested": "dispatch"}
    gated = shop.gated.with_options(ttl=1000, **nested)
    waiter = in_background(gated.get_cached, key)
    shop.await_start(key)
    assert gated.refresh(key) is False
    shop.open_gate(key, "first")
    assert waiter.result(30) == "first"
    shop.await_start(key)
    shop.open_gate(key, "second")
    until(lambda: shop.gated.peek(key) == "second")
    assert shop.server.pttl(shop.place.tasks["gated"].memo.call((key,), {}).keys.entry) > 900_000


def test_soft_time_out(shop: Asked, key: str) -> None:
    """With a stale value nobody waits longer than that, not even who would compute the fresh one."""
    gated = shop.gated.with_options(stale_ttl=60, soft_timeout=0.1)
    shop.gated.with_options(stale_ttl=60).set_cached("old", key)
    shop.gated.with_options(stale_ttl=60).expire(key)
    entry = gated.get_cached_entry(key)
    assert (entry.value, entry.state) == ("old", "stale")
    shop.await_start(key)
    shop.open_gate(key, "new")
    until(lambda: gated.peek(key) == "new")


def test_a_run_longer_than_its_lease(shop: Asked, key: str) -> None:
    """Signs of life keep a lease that is shorter than the run."""
    slow = shop.slow.with_options(lease=1)
    waiters = [in_background(slow.get_cached, key, 1.2) for _ in range(2)]
    assert [waiter.result(30) for waiter in waiters] == [key] * 2
    assert shop.ran(key) == 1


def test_time_out(shop: Asked, key: str) -> None:
    """Who gives up leaves no registration behind; the flight goes on."""
    runner = in_background(shop.gated.get_cached, key)
    shop.await_start(key)
    impatient = shop.gated.with_options(wait_timeout=0.5)
    other = shop.others[0]
    other.tell(
        "from celery_memolock import WaitTimeout\n"
        "place.tasks['gated'].peek(args[0])\n"  # its time is for waiting, and not for connecting
        "try: answer = place.tasks['gated'].with_options(wait_timeout=0.5).get_cached(args[0])\n"
        "except WaitTimeout as error: answer = str(error)",
        key,
    )
    assert "RUNNING for" in other.answer()
    assert shop.waiting("gated", key) == 1
    with pytest.raises(WaitTimeout, match="no value of task"):
        impatient.get_cached(key)
    shop.open_gate(key, "late")
    assert runner.result(30) == "late"
    assert shop.gated.get_cached(key) == "late"


def test_remembered_error(shop: Asked, key: str) -> None:
    """With `error_ttl` new callers get the error at once, until an invalidation."""
    for _ in range(2):
        with pytest.raises(Sold):
            shop.remembered.get_cached(key)
    assert shop.ran(key) == 1
    shop.remembered.invalidate(key)
    with pytest.raises(Sold):
        shop.remembered.get_cached(key)
    assert shop.ran(key) == 2


@pytest.mark.parametrize("kind", [*ODD, "ttl", "etag"])
def test_an_outcome_that_cannot_be_told(shop: Asked, key: str, kind: str) -> None:
    """Whatever class an error has, and whatever an option's function does, all hear at once, and the key is free."""
    error = ODD.get(kind) or {"ttl": OptionError, "etag": EncodeError}[kind]
    key, other = f"{kind} {key}", shop.others[0]
    for count in (1, 2):
        here = in_background(shop.odd.get_cached, key)
        shop.await_start(key)
        other.tell(
            "try: place.tasks['odd'].get_cached(args[0])\nexcept Exception as error: answer = type(error).__name__", key
        )
        until(lambda: shop.waiting("odd", key) == 2)
        shop.open_gate(key)
        with pytest.raises(error):
            here.result(30)  # long before its lease is over
        assert other.answer() == error.__name__
        assert shop.ran(key) == count


@pytest.mark.parametrize(("of", "error"), [("set", EncodeError), ("large", ValueTooLarge)])
def test_a_value_that_cannot_be_stored(shop: Asked, key: str, of: str, error: type[Exception]) -> None:
    """It is a typed error, the next time too, and the key is free."""
    for count in (1, 2):
        with pytest.raises(error):
            shop.unencodable.get_cached(key, of)
        assert shop.ran(key) == count


def test_stale_while_revalidate(shop: Asked, key: str) -> None:
    """An expired value is returned at once, and one run refreshes it."""
    assert shop.stale.get_cached(key) == 1
    assert shop.stale.expire(key) is True
    entries = [shop.stale.get_cached_entry(key) for _ in range(3)]
    assert (entries[0].value, entries[0].state) == (1, "stale")
    until(lambda: shop.stale.get_cached(key) == 2)
    assert shop.ran(key) == 2


def test_why_a_stale_value_stays(shop: Asked, key: str) -> None:
    """Who asks what is known of a stale value learns that its refresh failed; nobody waits for that, or for a retry."""
    patient = shop.fallback.with_options(stale_ttl=60, error_ttl=60)
    assert patient.get_cached(key) == 1
    patient.expire(key)
    assert patient.get_cached_entry(key).state == "stale"
    entry = until(lambda: (found := patient.get_cached_entry(key)).state == "error" and found)
    assert (entry.value, type(entry.error)) == (1, Sold)
    assert patient.get_cached(key) == 1
    assert shop.ran(key) == 2


def test_stale_if_error(shop: Asked, key: str) -> None:
    """A refresh that fails leaves the stale value to be served; an invalidated one is never served."""
    assert shop.fallback.get_cached(key) == 1
    shop.fallback.expire(key)
    entry = shop.fallback.get_cached_entry(key)
    assert (entry.value, entry.state) == (1, "error")
    assert isinstance(entry.error, Sold)
    shop.fallback.invalidate(key)
    with pytest.raises(Sold):
        shop.fallback.get_cached(key)


def test_what_is_stored(shop: Asked, key: str) -> None:
    """`cache_if`, `none_ttl` and `ttl` as a function of the value; who waits gets the value anyhow."""
    for value, stored in (("yes", True), ("no", False), (None, False), ({"ttl": 0}, False), ({"ttl": 60}, True)):
        assert shop.chosen.get_cached(key, value) == value
        assert (shop.chosen.peek(key, value) == value) is stored


def test_what_a_task_says(shop: Asked, key: str) -> None:
    """A run sees the stale value and its etag, and may say that it still holds."""
    assert shop.told.get_cached(key, "not modified") == [True, "", 1, True]
    first = shop.told.get_cached_entry(key, "not modified")
    shop.told.expire(key, "not modified")
    shop.told.get_cached(key, "not modified")
    until(lambda: shop.told.get_cached_entry(key, "not modified").state == "fresh")
    again = shop.told.get_cached_entry(key, "not modified")
    assert again.value == first.value
    assert again.fence != first.fence


def test_groups(shop: Asked, key: str) -> None:
    """What bears a tag goes with it, and all of a task with `invalidate_all`."""
    for number in range(3):
        assert shop.tagged.get_cached(f"{key}-{number}", f"{key}-{number % 2}") == 1
    assert shop.tagged.invalidate_tag(f"{key}-0") == 2
    assert shop.tagged.peek(f"{key}-1", f"{key}-1") == 1
    assert shop.tagged.peek(f"{key}-2", f"{key}-0") is MISS
    assert shop.tagged.invalidate_all() >= 1
    assert shop.tagged.peek(f"{key}-1", f"{key}-1") is MISS


def test_many(shop: Asked, key: str) -> None:
    """Several calls at once: hits, misses and failures, each in its place."""
    assert shop.every_other.get_cached_many([(f"{key}-1",)], return_exceptions=True)[0].args == (f"{key}-1",)
    found = shop.every_other.get_cached_many([(f"{key}-{n}",) for n in (1, 2)], return_exceptions=True)
    assert found[0] == 2
    assert isinstance(found[1], Sold)
    shop.every_other.set_cached_many([((f"{key}-2",), 7), ((f"{key}-3",), 8)])
    assert shop.every_other.get_cached_many([(f"{key}-{n}",) for n in (1, 2, 3)]) == [2, 7, 8]
    assert shop.every_other.invalidate_many([(f"{key}-2",), (f"{key}-4",)]) == [True, False]


def test_750_calls_with_every_other_run_failing(shop: Asked, key: str) -> None:
    """A failure frees the key each time: nobody hangs, and all end with the first value."""
    with ThreadPoolExecutor(15) as pool:
        answers = list(pool.map(lambda _: _answer(shop.every_other.get_cached, key), range(750)))
    assert set(answers) <= {2, "Sold"}
    assert answers[-1] == 2
    assert shop.ran(key) == 2


def _answer(call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except Sold:
        return "Sold"


def test_typed_values(shop: Asked, key: str) -> None:
    """A value of a type of its own comes back as one, compressed on its way."""
    for _ in range(2):
        assert shop.typed.get_cached(key) == [Stock(key, datetime(2026, 1, 2, tzinfo=timezone.utc))]
    assert shop.ran(key) == 1


def test_progress(shop: Asked, key: str) -> None:
    """Who waits hears how far the run is."""
    heard: list[Progress] = []
    runner = in_background(shop.reporting.get_cached, key)
    shop.await_start(key)
    waiter = in_background(shop.reporting.with_options(on_progress=heard.append).get_cached, key)
    for step in range(3):
        until(lambda step=step: any(each.message == f"step {step}" for each in heard))  # type: ignore[misc]
        shop.open_gate(key)
    assert waiter.result(30) == key
    assert runner.result(30) == key
    assert [each.fraction for each in heard] == [0.0, 0.5, 1.0]


def test_settled_from_outside(shop: Asked, key: str) -> None:
    """A task hands its flight out, and another process settles it."""
    waiter = in_background(shop.outside.get_cached, key)
    token = shop.place.records.server.blpop([f"token:{key}"], 30)[1]  # type: ignore[index]
    assert settle(shop.place.records.server, token.decode(), {"from": "outside"}) == "OK"
    assert waiter.result(30) == {"from": "outside"}
    shop.outside.invalidate(key)
    waiter = in_background(shop.outside.get_cached, key)
    token = shop.place.records.server.blpop([f"token:{key}"], 30)[1]  # type: ignore[index]
    assert fail(shop.place.records.server, token.decode(), "sold out") == "OK"
    with pytest.raises(TaskFailed, match="sold out"):
        waiter.result(30)


@pytest.mark.parametrize("stale", [0, 60])
def test_refresh_of_what_is_handed_out(shop: Asked, key: str, stale: float) -> None:
    """A refresh that is asked for meanwhile: the outcome is for those who wait, and the next call starts anew."""
    outside, server = shop.outside.with_options(stale_ttl=stale), shop.place.records.server
    waiter = in_background(outside.get_cached, key)
    token = server.blpop([f"token:{key}"], 30)[1]  # type: ignore[index]
    assert outside.refresh(key) is False
    assert settle(server, token.decode(), "old") == "AGAIN"
    assert settle(server, token.decode(), "old") == "AGAIN"
    assert waiter.result(30) == "old"
    following = in_background(outside.get_cached_entry, key)
    token = server.blpop([f"token:{key}"], 30)[1]  # type: ignore[index]
    if stale:
        assert (following.result(30).value, following.result(30).state) == ("old", "stale")
    assert settle(server, token.decode(), "new") == "OK"
    if not stale:
        assert following.result(30).value == "new"
    assert outside.get_cached(key) == "new"


def test_failure_of_what_is_handed_out_when_a_refresh_was_asked_for(shop: Asked, key: str) -> None:
    """Nor does the error of such a run keep the next call from starting anew."""
    outside, server = shop.outside.with_options(error_ttl=60), shop.place.records.server
    waiter = in_background(outside.get_cached, key)
    token = server.blpop([f"token:{key}"], 30)[1]  # type: ignore[index]
    outside.refresh(key)
    assert fail(server, token.decode(), "sold out") == "AGAIN"
    with pytest.raises(TaskFailed, match="sold out"):
        waiter.result(30)
    following = in_background(outside.get_cached, key)
    token = server.blpop([f"token:{key}"], 30)[1]  # type: ignore[index]
    assert settle(server, token.decode(), "new") == "OK"
    assert following.result(30) == "new"


def test_local_cache(shop: Asked, key: str) -> None:
    """A value that is kept here costs no trip, until another process invalidates it."""
    assert shop.near.get_cached(key) == 1
    near = shop.place.tasks["near"]
    until(lambda: shop.near.get_cached(key) == 1 and near.memo.kept((key,), {}) == 1)
    shop.others[0].tell("answer = place.tasks['near'].invalidate(args[0])", key)
    assert shop.others[0].answer() is True
    assert until(lambda: shop.near.get_cached(key) == 2)


def test_nested(shop: Asked, key: str) -> None:
    """A task that asks for another's value computes it itself; one that asks for its own key hears so."""
    inner = f"inner of {key}"
    assert shop.outer.get_cached(key) == [[inner, "stock"]] * 2
    assert shop.ran(inner) == 1
    with pytest.raises(ReentrantFlight, match=key[:3]):
        shop.circle.get_cached(key)


def test_max_overlap(shop: Asked, key: str) -> None:
    """Ten invalidations, each with a call: never more than two runs at once, and each call gets a value."""
    waiters = []
    for _ in range(10):
        waiters.append(in_background(shop.crowded.get_cached, key, 0.3))
        shop.crowded.invalidate(key, 0.3)
    assert [waiter.result(60) for waiter in waiters] == [key] * 10
    most: Any = shop.place.records.server.lrange(f"alive:{key}", 0, -1)
    assert max(map(int, most)) <= 2


def test_wrong_arguments(shop: Asked, key: str) -> None:
    """Wrong arguments are the `TypeError` of a call."""
    with pytest.raises(TypeError, match="key"):
        shop.stock.get_cached()
    with pytest.raises(TypeError, match="cannot become part of a key"):
        shop.stock.get_cached(threading.Lock())
    assert shop.ran(key) == 0


def test_still_a_function(shop: Asked, key: str) -> None:
    """The task itself runs when it is called as what it is; an inline one by its `__wrapped__`."""
    task = shop.place.tasks["stock"]
    task = task.__wrapped__ if shop.place.engine == "inline" else task
    assert [task(key), task(key)] == [[key, "stock"]] * 2
    assert shop.ran(key) == 2
    assert shop.stock.peek(key) is MISS


def test_error_of_a_plain_call(shop: Asked, key: str) -> None:
    """It comes out as it is, also if nothing can be written to it."""
    key = f"frozen {key}"
    task = shop.place.tasks["odd"]
    task = task.__wrapped__ if shop.place.engine == "inline" else task
    shop.open_gate(key)
    with pytest.raises(ODD["frozen"]):
        task(key)
