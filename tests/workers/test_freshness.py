"""Values between fresh and gone: stale ones, failing refreshes, early refreshes, and what a task says of its value."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Any

import pytest

from celery_memolock import MISS, NothingStale, OptionError, StoreUnavailable, WaitTimeout, current_flight
from celery_memolock.codec import Entry
from celery_memolock.engines.celery_settings import store_of
from celery_memolock.server import Server
from tests.workers.conftest import Start, in_background, until
from tests.workers.shop import Shop, Sold, Stock

AnyShop = tuple[Shop, str, str]


def test_stale_while_revalidate(any_shop: AnyShop, key: str) -> None:
    """A stale value is returned at once, to everybody, while exactly one task refreshes it."""
    made, *_ = any_shop
    task = made.counted.with_options(stale_ttl=60)
    assert task.get_cached(key, "gate") == 1
    assert task.expire(key, "gate") is True
    for _ in range(5):
        found = task.get_cached_entry(key, "gate")
        assert (found.value, found.state, found.source, found.error) == (1, "stale", "store", None)
    made.await_start(key)
    assert task.get_cached(key, "gate") == 1
    made.open_gate(key)
    found = until(lambda: (entry := task.get_cached_entry(key, "gate")).state == "fresh" and entry)
    assert (found.value, found.source) == (2, "store")
    assert made.ran(key) == 2


def test_stale_for_so_long(any_shop: AnyShop, key: str) -> None:
    """After `stale_ttl` a value is gone, and callers wait for the next."""
    made, *_ = any_shop
    task = made.counted.with_options(ttl=0.05, stale_ttl=0.05)
    assert task.get_cached(key) == 1
    until(lambda: task.peek(key) is MISS)
    assert task.get_cached(key) == 2


def test_expire_where_nothing_stale_is_kept(any_shop: AnyShop, key: str) -> None:
    """Without `stale_ttl` it drops the value."""
    made, *_ = any_shop
    assert made.counted.get_cached(key) == 1
    assert made.counted.expire(key) is True
    assert made.counted.expire(key) is False
    assert made.counted.get_cached(key) == 2


def test_expire_during_a_run(any_shop: AnyShop, key: str) -> None:
    """After the run that may have read older data comes another."""
    made, *_ = any_shop
    task = made.counted.with_options(stale_ttl=60)
    task.set_cached(0, key, "gate")
    made.records.rpush(f"ran:{key}", "so that the next run has a gate")
    task.refresh(key, "gate")
    made.await_start(key)
    task.expire(key, "gate")
    made.open_gate(key)
    made.await_start(key)
    made.open_gate(key)
    until(lambda: task.get_cached(key, "gate") == 3)


def test_invalidated_is_never_stale(any_shop: AnyShop, key: str) -> None:
    """What was invalidated is served neither as stale nor on an error."""
    made, *_ = any_shop
    task = made.counted.with_options(stale_ttl=60, stale_if_error=60)
    assert task.get_cached(key) == 1
    task.invalidate(key)
    made.records.set(f"fail:{key}", 1)
    assert task.peek(key) is MISS
    with pytest.raises(Sold):
        task.get_cached(key)


def test_soft_timeout(any_shop: AnyShop, key: str) -> None:
    """With a stale value a caller waits for the fresh one, but not long; the refresh goes on."""
    made, *_ = any_shop
    task = made.counted.with_options(stale_ttl=60, soft_timeout=0.2)
    assert task.get_cached(key, "gate") == 1
    task.expire(key, "gate")
    found = task.get_cached_entry(key, "gate")
    assert (found.value, found.state, found.error) == (1, "stale", None)
    patient = in_background(made.counted.with_options(stale_ttl=60, soft_timeout=30).get_cached, key, "gate")
    made.open_gate(key)
    assert patient.result(30) == 2
    assert made.ran(key) == 2


def test_stale_if_error(any_shop: AnyShop, key: str) -> None:
    """A failing refresh leaves the stale value in service, says so, and is not tried again at once."""
    made, *_ = any_shop
    task = made.counted.with_options(stale_if_error=60, error_ttl=30)
    assert task.get_cached(key) == 1
    task.expire(key)
    made.records.set(f"fail:{key}", 1)
    for _ in range(5):
        found = task.get_cached_entry(key)
        assert (found.value, found.state) == (1, "error")
        assert isinstance(found.error, Sold)
        assert task.get_cached(key) == 1
    assert made.ran(key) == 2
    made.records.delete(f"fail:{key}")
    task.refresh(key)
    until(lambda: task.get_cached_entry(key).state == "fresh")
    assert task.get_cached(key) == 3


def test_stale_if_nobody_answers(any_shop: AnyShop, key: str) -> None:
    """A refresh that takes too long is an error too: the hard time-out ends with the stale value."""
    made, *_ = any_shop
    task = made.counted.with_options(stale_if_error=60, wait_timeout=2, error_ttl=30)
    assert task.get_cached(key, "gate") == 1
    task.expire(key, "gate")
    began = time.monotonic()
    for _ in range(5):  # of which the first alone waits
        found = task.get_cached_entry(key, "gate")
        assert (found.value, found.state) == (1, "error")
        assert isinstance(found.error, WaitTimeout)
    assert 2 <= time.monotonic() - began < 8
    made.open_gate(key)
    until(lambda: task.get_cached_entry(key, "gate").state == "fresh")
    assert task.get_cached(key, "gate") == 2


def test_invalidated_while_waiting_for_its_refresh(any_shop: AnyShop, key: str) -> None:
    """A caller who held a stale value to fall back on does not, once it was invalidated."""
    made, *_ = any_shop
    task = made.counted.with_options(stale_if_error=60)
    assert task.get_cached(key, "gate") == 1
    task.expire(key, "gate")
    waiting = in_background(task.get_cached, key, "gate")
    made.await_start(key)
    task.invalidate(key, "gate")
    made.records.set(f"fail:{key}", 1)
    made.open_gate(key)
    with pytest.raises(Sold):
        waiting.result(30)


@pytest.mark.parametrize("early", [{"early_refresh": 1e-6}, {"early_refresh": "xfetch", "beta": 1e12}])
def test_early_refresh(any_shop: AnyShop, key: str, early: dict[str, object]) -> None:
    """A value is refreshed before it expires, by one task, while everybody gets the old one."""
    made, *_ = any_shop
    assert made.counted.get_cached(key, "gate") == 1
    task = made.counted.with_options(**early)
    for _ in range(5):
        assert task.get_cached(key, "gate") == 1
    made.await_start(key)
    assert made.ran(key) == 2
    made.open_gate(key)
    until(lambda: made.counted.get_cached(key, "gate") == 2)
    assert made.ran(key) == 2


def test_not_yet_early(any_shop: AnyShop, key: str) -> None:
    """Before its time a value is left alone."""
    made, *_ = any_shop
    assert made.counted.get_cached(key) == 1
    assert made.counted.with_options(early_refresh=0.9).get_cached(key) == 1
    assert made.counted.with_options(early_refresh="xfetch", beta=1e-9).get_cached(key) == 1
    assert made.ran(key) == 1


def test_cache_if(any_shop: AnyShop, key: str) -> None:
    """What is not to be stored reaches those who wait, and the next call computes anew."""
    made, *_ = any_shop
    for count in (1, 2):
        assert made.chosen.get_cached(key, "no") == "no"
        assert made.ran(key) == count
    assert made.chosen.peek(key, "no") is MISS
    assert made.chosen.get_cached(key, "yes") == made.chosen.peek(key, "yes") == "yes"


def test_unstored_value_takes_the_old_one_away(any_shop: AnyShop, key: str) -> None:
    """A newer value that is not to be stored leaves none behind that it replaces."""
    made, *_ = any_shop
    made.chosen.set_cached("old", key, "no")
    assert made.chosen.with_options(force_refresh=True).get_cached(key, "no") == "no"
    assert made.chosen.peek(key, "no") is MISS
    made.told.set_cached(["old"], key, "unstored")
    made.told.expire(key, "unstored")
    assert made.told.get_cached(key, "unstored") == ["old"]
    until(lambda: made.told.peek(key, "unstored") is MISS)


def test_jitter(any_shop: AnyShop, key: str) -> None:
    """Values that are stored together expire at different times, computed or set, and None has a ttl of its own."""
    made, *_ = any_shop
    calls = [(f"{key} {number}",) for number in range(20)]
    made.jittered.get_cached_many(calls[:10])
    made.jittered.set_cached_many([(call, 1) for call in calls[10:]])
    memo = made.tasks["jittered"].memo
    lives: list[Any] = [made.records.pttl(memo.call(call, {}).keys.entry) for call in calls]
    for some in (lives[:10], lives[10:]):
        assert all(48_000 < life <= 100_000 for life in some)
        assert max(some) - min(some) > 1000
    assert made.jittered.get_cached(key, None) is None
    assert made.jittered.peek(key, None) is None
    assert 3_000 < made.records.pttl(memo.call((key, None), {}).keys.entry) <= 7_000  # type: ignore[operator]


def test_serializer_of_ones_own(any_shop: AnyShop, key: str) -> None:
    """One that the application registered with kombu will do, on both sides and compressed."""
    made, *_ = any_shop
    for _ in range(2):
        assert made.lines.get_cached(key) == made.lines.peek(key) == [key, "ä"]
    assert made.ran(key) == 1
    entry = Entry.parse(made.records.get(made.tasks["lines"].memo.call((key,), {}).keys.entry))  # type: ignore[arg-type]
    assert (entry.content_type, entry.compression) == ("text/x-lines", "application/x-gzip")
    with pytest.raises(TypeError):
        made.lines.set_cached(7, key)


def test_ttl_of_the_value(any_shop: AnyShop, key: str) -> None:
    """The ttl may depend on the value; 0 does not store it, and None has its own."""
    made, *_ = any_shop
    made.chosen.get_cached(key, {"ttl": 500})
    left = made.chosen.get_cached_entry(key, {"ttl": 500})
    assert left.source == "store"
    assert made.chosen.get_cached(key, {"ttl": 0}) == {"ttl": 0}
    assert made.chosen.peek(key, {"ttl": 0}) is MISS
    assert made.chosen.get_cached(key, None) is None
    assert made.chosen.peek(key, None) is MISS


def test_ttl_that_makes_no_sense(any_shop: AnyShop, key: str) -> None:
    """A function that gives no time is an error that names the option, for all who wait."""
    made, *_ = any_shop
    with pytest.raises(OptionError, match="ttl"):
        made.chosen.get_cached(key, {"ttl": "soon"})


def test_not_modified(any_shop: AnyShop, key: str) -> None:
    """A task sees the stale value and its etag, and may say that it still holds."""
    made, *_ = any_shop
    assert made.told.get_cached(key) == [True, "", 1, True]
    made.told.set_cached(["by hand"], key)
    made.told.refresh(key)
    until(lambda: made.told.get_cached(key) == [False, "", 1, True])
    first = made.told.get_cached_entry(key)
    made.told.expire(key)
    assert made.told.get_cached_entry(key).state == "stale"
    fresh = until(lambda: (found := made.told.get_cached_entry(key)).state == "fresh" and found)
    assert fresh.value == [False, "v 1", 1, True]
    assert fresh.fence != first.fence
    with pytest.raises(NothingStale):
        made.told.get_cached(key, "not modified")
    made.told.set_cached(["kept"], key, "not modified")
    before = made.told.get_cached_entry(key, "not modified").fence
    made.told.refresh(key, "not modified")
    after = until(lambda: (found := made.told.get_cached_entry(key, "not modified")).fence != before and found)
    assert after.value == ["kept"]


def test_ttl_by_the_task(any_shop: AnyShop, key: str) -> None:
    """The task itself may say how long its value is fresh, and 0 does not store it."""
    made, *_ = any_shop
    made.told.get_cached(key, "unstored")
    assert made.told.peek(key, "unstored") is MISS


def test_no_flight(any_shop: AnyShop, key: str) -> None:
    """Outside of a flight there is nothing to know, and nothing goes wrong."""
    made, *_ = any_shop
    assert not current_flight
    assert (current_flight.stale, current_flight.attempt, current_flight.key) == (MISS, 0, "")
    current_flight.ttl = 5
    assert current_flight.ttl is None
    assert made.tasks["told"](key) == [True, "", 0, False]
    assert made.told.delay(key).get(timeout=30) == [True, "", 0, False]
    with pytest.raises(OptionError):
        current_flight.ttl = -1


def test_force(any_shop: AnyShop, key: str) -> None:
    """A forced call gets a run that began after it, even while an earlier one is under way."""
    made, *_ = any_shop
    made.counted.set_cached(0, key, "gate")
    made.records.rpush(f"ran:{key}", "so that the next run has a gate")
    made.counted.refresh(key, "gate")
    made.await_start(key)
    force = made.counted.with_options(force_refresh=True)
    forced = [in_background(force.get_cached, key, "gate") for _ in range(3)]
    flight = made.counted.memo.call((key, "gate"), {}).keys.all[1]
    fence: Any = made.records.hget(flight, "fence")
    rooms = store_of(made.app).inbox.rooms
    # One that looked when the second run has begun would want a third.
    until(lambda: len(getattr(rooms._flights.get((fence.decode(), "force")), "seats", ())) == 3)
    assert made.records.hget(flight, "again")
    made.open_gate(key)
    made.await_start(key)
    assert not any(each.done() for each in forced)
    made.open_gate(key)
    assert [each.result(30) for each in forced] == [3, 3, 3]
    assert made.ran(key) == 3


def test_force_starts_a_run(any_shop: AnyShop, key: str) -> None:
    """Where nothing runs it starts one; the others go on to get the old value meanwhile."""
    made, *_ = any_shop
    assert made.counted.get_cached(key, "gate") == 1
    forced = in_background(made.counted.with_options(force_refresh=True).get_cached, key, "gate")
    made.await_start(key)
    assert made.counted.get_cached(key, "gate") == 1
    made.open_gate(key)
    assert forced.result(30) == 2


def test_entry_of_an_older_format(any_shop: AnyShop, key: str) -> None:
    """What another version stored is a miss: it is neither served, nor stale, nor in the way."""
    made, *_ = any_shop
    task = made.counted.with_options(stale_ttl=60, stale_if_error=60)
    entry = made.counted.memo.call((key,), {}).keys.entry
    for count in (1, 2):
        made.records.set(entry, b"ML0 V 17-abc 1 2 3 application/json utf-8\n7", ex=60)
        assert task.peek(key) is MISS
        assert task.expire(key) is False
        found = task.get_cached_entry(key) if count == 1 else task.get_cached(key)
        assert (found.value if count == 1 else found) == count
        assert task.get_cached(key) == task.peek(key) == count
    assert made.ran(key) == 2


def test_typed(any_shop: AnyShop, key: str) -> None:
    """A value of a type of its own reaches those who wait and those who come later as such."""
    made, *_ = any_shop
    for _ in range(2):
        (found,) = made.typed.get_cached(key)
        assert found == Stock(key, datetime(2026, 1, 2, tzinfo=timezone.utc))
    assert made.ran(key) == 1


def test_stale_while_redis_is_away(own_server: Server, start_worker: Start, key: str) -> None:
    """What this process had kept is served, and marked, until Redis is back; nothing else is."""
    made, _ = start_worker(own_server.url, own_server.url)
    made.fallback.get_cached(key)
    until(lambda: made.fallback.get_cached_entry(key).source == "local")
    own_server.kill()
    found = until(lambda: (entry := made.fallback.get_cached_entry(key)).state == "error" and entry)
    assert (found.value, found.source, found.age) == (1, "local", None)
    assert isinstance(found.error, StoreUnavailable)
    assert made.fallback.get_cached(key) == 1
    with pytest.raises(StoreUnavailable):
        made.fallback.get_cached(f"another {key}")
    own_server.restart()
    until(lambda: made.fallback.peek(key) is MISS)
    made.fallback.set_cached(5, key)
    assert made.fallback.get_cached(key) == 5
