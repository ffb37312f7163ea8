"""Dropping and setting many values: by tag, all of a task, and lists of calls."""

from __future__ import annotations

from functools import partial

import pytest

from celery_memolock import MISS, ArgumentError, StoreUnavailable
from tests.workers.conftest import in_background
from tests.workers.shop import Shop, Sold

AnyShop = tuple[Shop, str, str]


def test_invalidate_tag(any_shop: AnyShop, key: str) -> None:
    """Whatever bears a tag goes, computed or set, and nothing else does."""
    made, *_ = any_shop
    tag, other = f"tag of {key}", f"another of {key}"
    calls = [(f"{key} {number}", tag) for number in range(3)]
    made.tagged.get_cached_many(calls[:2])
    made.tagged.set_cached(7, *calls[2])
    made.tagged.get_cached(key, other)
    seen: list[int] = []
    assert made.tagged.invalidate_tag(tag, on_progress=seen.append) == 3
    assert seen[-1] == 3
    assert [made.tagged.peek(*call) for call in calls] == [MISS, MISS, MISS]
    assert made.tagged.peek(key, other) == 1
    assert made.tagged.invalidate_tag(tag) == 0
    assert made.tagged.invalidate_tag("a tag of nothing {}") == 0


def test_tags_of_all_calls(any_shop: AnyShop, key: str) -> None:
    """A list of tags is for all values of the task."""
    made, *_ = any_shop
    for tag in ("a label", "another {label}"):
        made.labelled.get_cached(key)
        made.labelled.get_cached(f"{key} too")
        assert made.labelled.invalidate_tag(tag) == 2
        assert made.labelled.peek(key) is MISS
    assert made.ran(key) == 2


@pytest.mark.parametrize("kind", ["failing", "no text"])
def test_wrong_tags(any_shop: AnyShop, key: str, kind: str, sent: list[str]) -> None:
    """A function that fails, or gives something else than texts, is told at once, and nothing is sent."""
    made, *_ = any_shop
    for ask in (made.mistagged.get_cached, made.mistagged.refresh, partial(made.mistagged.set_cached, "value")):
        with pytest.raises(ArgumentError, match="tag"):
            ask(f"{kind} {key}")
    assert made.ran(f"{kind} {key}") == 0
    assert sent == []


def test_tags_that_are_wrong_in_the_worker(any_shop: AnyShop, key: str) -> None:
    """Those who wait hear so at once, and the task does not run."""
    made, *_ = any_shop
    wrong = f"wrong in the worker {key}"
    with pytest.raises(ArgumentError, match="must be a text that is not empty"):
        made.mistagged.with_options(wait_timeout=20).get_cached(wrong)
    assert made.ran(wrong) == 0


def test_invalidate_a_large_tag(any_shop: AnyShop, key: str) -> None:
    """A tag of many values is gone through in batches, and each is told of."""
    made, *_ = any_shop
    values = [((f"{key} {number}", key), number) for number in range(1300)]
    made.tagged.set_cached_many(values)
    seen: list[int] = []
    assert made.tagged.invalidate_tag(key, on_progress=seen.append) == 1300
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == 1300
    assert not any(made.records.exists(made.tagged.memo.call(call, {}).keys.entry) for call, _ in values)


def test_tag_of_what_runs(any_shop: AnyShop, key: str) -> None:
    """A run that goes on does not store what it read before the tag was invalidated."""
    made, *_ = any_shop
    running = in_background(made.tagged.get_cached, key, key, "gate")
    made.await_start(key)
    made.tagged.invalidate_tag(key)
    made.open_gate(key)
    assert running.result(30) == 1
    assert made.tagged.peek(key, key, "gate") is MISS


def test_index_forgets(any_shop: AnyShop, key: str) -> None:
    """Entries of an index, and the index, expire."""
    made, *_ = any_shop
    made.tagged.set_cached(1, key, key)
    client = made.records
    index = f"{made.app.conf.memolock_prefix}:1:t:{{{key}}}"
    assert client.zcard(index) == 1
    assert 0 < client.ttl(index) <= 60 + 60
    client.zadd(index, {"long gone": 1})
    made.tagged.set_cached(1, f"{key} too", key)
    assert client.zcard(index) == 2


def test_invalidate_all(any_shop: AnyShop, key: str) -> None:
    """All values of a task go, that of a run under way too, and those of other tasks stay."""
    made, *_ = any_shop
    made.told.set_cached([1], key)
    with pytest.raises(Sold):
        made.failing.get_cached(key)
    made.failing.invalidate_all()
    with pytest.raises(Sold):
        made.failing.get_cached(key)
    assert made.ran(key) == 2
    made.by_class.get_cached(key)
    running = in_background(made.gated.get_cached, key)
    made.await_start(key)
    made.gated.set_cached_many([((f"{key} {number}",), "set") for number in range(1200)])
    seen: list[int] = []
    assert made.gated.invalidate_all(on_progress=seen.append) >= 1200
    assert len(seen) > 3
    made.open_gate(key, "old")
    assert running.result(30) == "old"
    assert made.gated.peek(key) is MISS
    assert made.gated.peek(f"{key} 7") is MISS
    assert made.by_class.peek(key) == key.upper()
    assert made.told.peek(key) == [1]


def test_many(any_shop: AnyShop, key: str) -> None:
    """Several values are set and dropped in one trip each, and a call that fails is its own affair."""
    made, *_ = any_shop
    calls = [(f"{key} {number}",) for number in range(3)]
    assert made.plain.set_cached_many([(call, number) for number, call in enumerate(calls)]) == [None] * 3
    assert made.plain.get_cached_many(calls) == [0, 1, 2]
    found = made.plain.set_cached_many([(calls[0], {1}), (calls[1], 8)], return_exceptions=True)
    assert isinstance(found[0], TypeError)
    assert (found[1], made.plain.peek(*calls[1])) == (None, 8)
    assert made.plain.invalidate_many([*calls, (key,)]) == [True, True, True, False]
    with pytest.raises(TypeError):
        made.plain.invalidate_many([calls[0], ()])
    assert made.plain.invalidate_many([calls[0], ()], return_exceptions=True)[0] is False
    assert not isinstance(found[1], StoreUnavailable)
