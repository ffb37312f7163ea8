"""What the first implementations of the pattern test of themselves, across processes, from threads and from asyncio."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from celery_memolock import MISS
from celery_memolock.server import Server
from tests.engines.callers import Callers, OtherCallers
from tests.engines.tasks import Records, connect
from tests.workers.conftest import until


@pytest.fixture(scope="module")
def others(server: Server) -> Iterator[list[OtherCallers]]:
    """Two other processes."""
    started = [OtherCallers(server.url) for _ in range(2)]
    for each in started:
        each.await_ready()
    yield started
    for each in started:
        each.stop()


class Crowd:
    """The callers of two other processes, and of this one, over one server."""

    def __init__(self, others: list[OtherCallers], server: Server, prefix: str, drivers: tuple[str, str]) -> None:
        self.here = Callers(server.url, prefix)
        self.memo = self.here.memo
        self.records: Records = connect(server.url)
        self._others = others
        self._prefix = prefix
        self._drivers = drivers

    def ask(
        self, fetch: str, keys: list[str], count: int, *, of: tuple[int, ...] = (0, 1), **how: Any
    ) -> list[Future[list[Any]]]:
        """Have so many callers in each process ask for each key."""
        return [self._others[i].ask(self._prefix, self._drivers[i], fetch, keys, count, **how) for i in of]

    def flight(self, key: str) -> str:
        """Return the name of a key's flight on the server."""
        name: str = self.memo._memo.call((key,), {}).keys.all[1]
        return name

    def waiting(self, key: str) -> int:
        """How many processes wait for a key."""
        fields: Any = self.records.server.hkeys(self.flight(key))
        return sum(name.startswith(b"w:") for name in fields)

    def await_waiting(self, key: str, count: int) -> None:
        """Return when so many processes wait for a key that is being computed."""
        self.records.await_start(key)
        until(lambda: self.waiting(key) == count)

    def await_all(self, key: str) -> None:
        """Open the gate when twenty callers have come, for those as well who were about to wait."""
        self.await_waiting(key, 2)
        until(lambda: self.records.server.get(f"asked:{key}") == b"20")
        for _ in range(20):
            self.records.open_gate(key)


@pytest.fixture(params=["threads", "asyncio", "threads and asyncio"])
def crowd(request: pytest.FixtureRequest, others: list[OtherCallers], server: Server, prefix: str) -> Iterator[Crowd]:
    """The callers, by each driver, and by one in each process."""
    first, *rest = request.param.split(" and ")
    made = Crowd(others, server, prefix, (first, (rest or [first])[0]))
    yield made
    made.memo.close()


def answers(asked: list[Future[list[Any]]]) -> list[Any]:
    """Return what all callers got."""
    return [answer for each in asked for answer in each.result(50)]


def test_twenty_callers_one_fetch(crowd: Crowd, key: str) -> None:
    """Twenty callers ask for one key at once: one fetch, twenty equal values."""
    asked = crowd.ask("gated", [key], 10)
    crowd.await_waiting(key, 2)
    crowd.records.open_gate(key, "value")
    assert answers(asked) == ["value"] * 20
    assert crowd.records.ran(key) == 1


def test_distinct_keys(crowd: Crowd, key: str) -> None:
    """Each key has a fetch and a value of its own, however alike the keys look."""
    keys = [f"{key}{end}" for end in ("", " ", ":", "1", "/1", "é", "\N{SNOWMAN}", "\n", ":v", "*")]
    for number, each in enumerate(keys):
        for _ in range(number):
            crowd.records.note(each)
    found = answers(crowd.ask("counted", keys, 2))
    assert found == list(range(1, 11)) * 4
    assert [crowd.records.ran(each) for each in keys] == list(range(1, 11))


def test_a_failed_fetch_is_tried_again(crowd: Crowd, key: str) -> None:
    """A fetch that fails tells all who wait, with its error, and the next caller fetches again."""
    asked = crowd.ask("gated failure", [key], 10)
    crowd.await_all(key)
    assert answers(asked) == [["Sold", key, "open"]] * 20
    ran = crowd.records.ran(key)
    assert ran <= 3, "one, but for those who were about to wait"
    assert set(answers(crowd.ask("counted", [key], 5))) == {ran + 1}


def test_750_requests_with_every_other_fetch_failing(crowd: Crowd, key: str) -> None:
    """Nobody hangs, and all get the outcome of some fetch: what is odd as an error, what is even as a value."""
    count = 375
    found = Counter(
        str(answer) for answer in answers(crowd.ask("every other", [key], count, options="not stored", most=15))
    )
    assert found.total() == 2 * count
    ran = crowd.records.ran(key)
    expected = {str(number) if number % 2 == 0 else str(["Sold", key, number]) for number in range(1, ran + 1)}
    assert set(found) == expected, "an outcome that is no fetch's, or a fetch that nobody got the outcome of"
    assert 2 <= ran < 2 * count, "nobody shared a fetch"


def test_a_fetch_longer_than_its_lock(crowd: Crowd, key: str) -> None:
    """The lease is renewed while the fetch runs: a lease of 1 s and a fetch of 1.6 s make one fetch."""
    assert answers(crowd.ask("slow", [key], 10, options="short lease")) == [1] * 20
    assert crowd.records.ran(key) == 1


@pytest.mark.parametrize("fetch", ["gated", "gated failure"])
def test_the_lock_is_released(crowd: Crowd, key: str, fetch: str) -> None:
    """At the end of a fetch, good or bad, nothing of its flight is left, and another process begins at once."""
    asked = crowd.ask(fetch, [key], 1, of=(0,))
    crowd.await_waiting(key, 1)
    crowd.records.open_gate(key)
    answers(asked)
    assert not crowd.records.server.exists(crowd.flight(key))
    crowd.memo.invalidate(key)
    began = time.monotonic()
    assert answers(crowd.ask("counted", [key], 1, of=(1,))) == [2]
    assert time.monotonic() - began < 10, "it waited for the lease of 20 s"


def test_what_is_not_stored_answers_the_waiters(crowd: Crowd, key: str) -> None:
    """A value that `cache_if` refuses goes to all who wait, and to nobody else."""
    asked = crowd.ask("gated", [key], 10, options="not stored")
    crowd.await_all(key)
    assert answers(asked) == ["open"] * 20
    assert crowd.memo.peek(key) is MISS
    ran = crowd.records.ran(key)
    assert ran <= 3, "one, but for those who were about to wait"
    assert answers(crowd.ask("counted", [key], 1, of=(1,), options="not stored")) == [ran + 1]
    assert answers(crowd.ask("counted", [key], 1, of=(0,))) == [ran + 2]


def test_set_overrides(crowd: Crowd, key: str) -> None:
    """A value that is set is a hit, replaces a stored one, and beats what is being fetched, for those who wait too."""
    crowd.memo.set(key, "first")
    crowd.memo.set(key, "second")
    assert answers(crowd.ask("counted", [key], 2)) == ["second"] * 4
    assert crowd.records.ran(key) == 0
    crowd.memo.invalidate(key)
    asked = crowd.ask("gated", [key], 5)
    crowd.await_waiting(key, 2)
    crowd.here.run(crowd.memo.aset(key, "set"))
    crowd.records.open_gate(key, "late")
    assert answers(asked) == ["set"] * 10
    assert crowd.memo.peek(key) == "set"
    assert crowd.records.ran(key) == 1


def test_empty_values_are_hits(crowd: Crowd, key: str) -> None:
    """What is there is there, also if it is None or empty."""
    values: list[Any] = [None, "", 0, False, [], {}]
    keys = [f"{key} {number}" for number in range(len(values))]
    for each, value in zip(keys, values, strict=True):
        assert crowd.memo.get(each, lambda value=value: value) == value  # type: ignore[misc]
    found = answers(crowd.ask("counted", keys, 1))
    assert [(type(each), each) for each in found] == [(type(value), value) for value in values] * 2
    assert not any(map(crowd.records.ran, keys))


def test_what_cannot_be_decoded(crowd: Crowd, key: str, caplog: pytest.LogCaptureFixture) -> None:
    """A stored value that nobody can read is a miss: said once, fetched once, and then replaced."""
    keys = [f"{key} {number}" for number in range(3)]
    for each, stored in zip(keys, (b"garbage", b"", b"\x00\xff" * 50), strict=True):
        crowd.records.server.set(crowd.memo._memo.call((each,), {}).keys.entry, stored)
    with caplog.at_level(logging.WARNING, "celery_memolock"):
        assert list(map(crowd.memo.peek, keys)) == [MISS] * 3
    assert len(caplog.records) == 1
    assert answers(crowd.ask("counted", keys, 5)) == [1] * 30
    assert list(map(crowd.memo.peek, keys)) == [1] * 3


def test_a_value_of_another_format(crowd: Crowd, key: str) -> None:
    """So is one that was stored in a format that is not accepted here, such as pickle."""
    entry = crowd.memo._memo.call((key,), {}).keys.entry
    foreign = crowd.memo.client("memo", serializer="pickle")
    foreign.set(key, {"of": "another"})
    copied = crowd.records.server.get(foreign._memo.call((key,), {}).keys.entry)
    assert copied is not None
    crowd.records.server.set(entry, copied)
    assert foreign.peek(key) == {"of": "another"}
    assert answers(crowd.ask("counted", [key], 2)) == [1] * 4


def test_who_gives_up_is_not_waited_for(crowd: Crowd, key: str) -> None:
    """A caller whose time is over leaves no registration behind, and the others get their value."""
    patient = crowd.ask("gated", [key], 1, of=(0,))
    crowd.await_waiting(key, 1)
    (told,) = answers(crowd.ask("gated", [key], 1, of=(1,), options="impatient"))
    assert told[0] == "WaitTimeout"
    assert crowd.waiting(key) == 1
    crowd.records.open_gate(key, "value")
    assert answers(patient) == ["value"]
    assert crowd.records.ran(key) == 1


def test_get_after_delete_works_at_once(crowd: Crowd, key: str) -> None:
    """After an invalidation the next caller fetches anew, and waits for nothing that began before."""
    crowd.memo.get(key, lambda: "old")
    assert crowd.memo.invalidate(key) is True
    before = crowd.ask("gated", [key], 1, of=(0,))
    crowd.await_waiting(key, 1)
    assert crowd.here.run(crowd.memo.ainvalidate(key)) is False
    assert answers(crowd.ask("counted", [key], 5, of=(1,))) == [2] * 5
    crowd.records.open_gate(key, "of before")
    assert answers(before) == ["of before"]
    assert crowd.memo.peek(key) == 2
