"""What this process keeps of a task's values, with a clock that the test turns."""

from __future__ import annotations

from typing import Any

import pytest

from celery_memolock.codec import Entry
from celery_memolock.local import MISSING, Local


class Clock:
    """A clock that stands still until it is turned."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def made(clock: Clock, ttl: float = 10, entries: int = 100, size: int = 100_000) -> Local:
    local = Local(ttl, entries, size, 1.0, clock)
    local.proved(clock.now)
    return local


def entry(body: bytes = b"1", fence: str = "17-abc") -> Entry:
    return Entry(False, False, fence, 1, 2, 3, "application/json", "utf-8", "-", "", body)


def keep(local: Local, key: str, value: Any = 1, body: bytes = b"1") -> None:
    local.end(key, local.begin(key), value, entry(body))


def test_kept_until_its_time(clock: Clock) -> None:
    """A value is served until `ttl` is over."""
    local = made(clock)
    keep(local, "k", 7)
    assert local.get("k") == 7
    clock.now += 9.9
    local.proved(clock.now)
    assert local.get("k") == 7
    clock.now += 0.1
    local.proved(clock.now)
    assert local.get("k") is MISSING


def test_kept_no_longer_than_asked_for(clock: Clock) -> None:
    """A value may have to be read anew long before it expires; on an error it counts for as long as ever."""
    local = made(clock)
    local.end("k", local.begin("k"), 7, entry(), 9.0, 3.0)
    assert local.get("k") == 7
    clock.now += 3
    local.proved(clock.now)
    assert local.get("k") is MISSING
    local.cut()
    clock.now += 5.9
    assert local.quarantined("k", 0.0) is not None
    clock.now += 0.2
    assert local.quarantined("k", 0.0) is None


@pytest.mark.parametrize("value", ["text", 1, 1.5, True, None, b"bytes"])
def test_what_nobody_can_change_is_shared(clock: Clock, value: Any) -> None:
    """Plain values are handed out as they are; of all others the entry, for each caller to decode."""
    local = made(clock)
    keep(local, "k", value)
    assert local.get("k") is value
    keep(local, "k", [1])
    assert local.get("k") == entry()


def test_nothing_without_proof(clock: Clock) -> None:
    """Without a proof that the link lives, of less than a lease ago, nothing is served and nothing begun."""
    local = made(clock)
    keep(local, "k")
    clock.now += 1.0
    assert local.get("k") is MISSING
    keep(local, "other")
    assert len(local) == 1
    local.proved(clock.now - 0.5)
    assert local.get("k") == 1
    local.proved(clock.now - 5)  # an older proof takes nothing back
    assert local.get("k") == 1


def test_change_during_a_read(clock: Clock) -> None:
    """A change that is told while an entry is read finds no place for the value that may be older."""
    local = made(clock)
    for change in (lambda: local.drop("k"), local.drop_all, local.cut):
        local.proved(clock.now)
        ticket = local.begin("k")
        change()
        local.proved(clock.now)
        local.end("k", ticket, 1, entry())
        assert local.get("k") is MISSING


def test_reads_at_once(clock: Clock) -> None:
    """Of reads that never cease to overlap each may keep what it found."""
    local = made(clock)
    first, second = local.begin("k"), local.begin("k")
    local.end("k", first, "first", entry())
    assert local.get("k") == "first"
    third = local.begin("k")
    local.end("k", second, "second", entry())
    local.end("k", second)  # as at the end of all reads
    assert local.get("k") == "second"
    local.end("k", third, "third", entry())
    assert local.get("k") == "third"


@pytest.mark.parametrize("newer_first", [True, False])
def test_nothing_older_than_what_was_found(clock: Clock, newer_first: bool) -> None:
    """Of two reads at once the later to begin, or to end, may have found the older value: the newer one is kept."""
    local = made(clock)
    for first_began in (True, False):
        tickets = [local.begin("k"), local.begin("k")]
        ends = [(tickets[not first_began], "new", entry(fence="18-b")), (tickets[first_began], "old", entry())]
        for ticket, value, found in ends if newer_first else ends[::-1]:
            local.end("k", ticket, value, found)
        assert local.get("k") == "new"
        local.drop("k")


def test_newer_than_what_may_be_kept(clock: Clock) -> None:
    """A read that must keep nothing, as a change was told meanwhile, shows all the same what is too old."""
    local = made(clock)
    for newest_first in (True, False):
        lost = local.begin("k")
        local.drop("k")
        ticket = local.begin("k")
        ends = [(lost, "new", entry(fence="18-b")), (ticket, "old", entry())]
        for each, value, found in ends if newest_first else ends[::-1]:
            local.end("k", each, value, found)
        assert local.get("k") is MISSING


def test_one_of_several_reads_found_nothing(clock: Clock) -> None:
    """Nobody knows whether that is newer than what the others found: they keep nothing, but the next may."""
    local = made(clock)
    first, second = local.begin("k"), local.begin("k")
    local.end("k", second)
    third = local.begin("k")
    local.end("k", first, 1, entry())
    assert local.get("k") is MISSING
    local.end("k", third, 3, entry())
    assert local.get("k") == 3


def test_superseded(clock: Clock) -> None:
    """What somebody here has seen since takes away what is older, and nothing else."""
    local = made(clock)
    keep(local, "k")
    local.supersede("k", entry(fence="17-def"))
    assert local.get("k") == 1
    reading = local.begin("k")
    local.supersede("k", entry(fence="18-abc"))
    assert local.get("k") is MISSING
    local.end("k", reading, 1, entry(fence="17-abc"))
    assert local.get("k") is MISSING


def test_read_that_found_nothing(clock: Clock) -> None:
    """Its placeholder is gone, and nothing is kept."""
    local = made(clock)
    local.end("k", local.begin("k"))
    assert (len(local), local.get("k")) == (0, MISSING)


def test_lost_link(clock: Clock) -> None:
    """What was kept over a link that broke is not served over the next."""
    local = made(clock)
    keep(local, "k")
    local.cut()
    assert local.get("k") is MISSING
    local.proved(clock.now)
    assert local.get("k") is MISSING


def test_bounds(clock: Clock) -> None:
    """At most so many values, and so many bytes; the least recently used go first, and the too large are not kept."""
    few = made(clock, entries=3)
    for key in "abcd":
        keep(few, key)
        few.get("a")
    assert [key for key in "abcd" if few.get(key) is not MISSING] == ["a", "c", "d"]
    small = made(clock, size=10_000)
    for number in range(50):
        keep(small, str(number), body=b"x" * 700)
    assert len(small) == 10
    keep(small, "large", body=b"x" * 20_000)
    assert small.get("large") is MISSING
