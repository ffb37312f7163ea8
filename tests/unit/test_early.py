"""Early refresh, simulated: under load a value is renewed before it expires, by few computations."""

from __future__ import annotations

import random
from typing import Any

import pytest

from celery_memolock.codec import Entry
from celery_memolock.options import Options
from celery_memolock.protocol import _early_in
from celery_memolock.rooms import Rooms

TTL = 60.0
COMPUTING = 1.5


def simulate(options: Options, calls_a_second: float, seconds: float, computing: float = COMPUTING) -> tuple[int, int]:
    """Let calls arrive at random → how many found nothing fresh after the first value, how often it was computed."""
    ttl = options.ttl_of(None)
    rooms = Rooms(lambda: 1.0, lambda _: None, lambda: 0.0)
    now = stored = 0.0
    done: float | None = None
    gaps = computed = 0
    while now < seconds:
        now += random.expovariate(calls_a_second)
        if done is not None and now >= done:
            stored, done = done, None
            computed += 1
        left = stored + ttl - now
        entry = Entry(
            False,
            False,
            f"{computed}-a",
            int((stored - computing) * 1e6),
            int((stored + ttl) * 1e6),
            int(computing * 1e6),
            *("application/json", "utf-8", "-", "", b"1"),
        )
        if left <= 0:
            gaps += 1
            done = done or now + computing
        elif _early_in(options, entry, left) <= 0 and rooms.may_refresh("k", entry.fence, now) and done is None:
            done = now + computing
    return gaps, computed


@pytest.mark.parametrize("early", [{"early_refresh": 0.8}, {"early_refresh": "xfetch", "beta": 3.0}])
@pytest.mark.parametrize("short", [1.0, 100.0])
def test_no_gap_under_load(early: dict[str, Any], short: float) -> None:
    """With four calls a second nobody ever finds it expired, and it is hardly computed more often than it expires.

    Neither does anybody where all goes a hundred times as fast, and a value lives for less than a second. More calls
    would hide a refresh that is asked for too late: with `beta` left out, ten a second find a gap in 250 lives of a
    value, four in nine.
    """
    random.seed(1)
    gaps, computed = simulate(Options(ttl=TTL / short, **early), 4.0 * short, 10_000.0 / short, COMPUTING / short)
    assert gaps == 0
    assert computed < 1.5 * 10_000 / TTL


def test_gaps_without() -> None:
    """The simulation can fail: what is refreshed only at its very end is found expired."""
    random.seed(1)
    gaps, _ = simulate(Options(ttl=TTL, early_refresh=0.999), 4.0, 2_000.0)
    assert gaps > 0


def test_xfetch_spreads() -> None:
    """What takes longer to compute is refreshed earlier, and beta makes it earlier still."""
    random.seed(1)

    def earliest(computing: float, beta: float) -> float:
        entry = Entry(False, False, "1-a", 0, 0, int(computing * 1e6), "", "", "", "", b"")
        options = Options(ttl=TTL, early_refresh="xfetch", beta=beta)
        return sum(sum(_early_in(options, entry, left / 10) <= 0 for left in range(1, 600)) for _ in range(50)) / 50

    assert earliest(0.1, 1.0) < earliest(1.0, 1.0) < earliest(1.0, 4.0)
