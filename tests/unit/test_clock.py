"""What time it is on the server."""

from __future__ import annotations

from celery_memolock.clock import Clock


def test_unknown_at_first() -> None:
    """Nobody has asked yet."""
    assert Clock(lambda: 5.0).server() is None


def test_never_behind() -> None:
    """However long the question and the answer travelled, the server's time has not passed ours."""
    now = 100.0
    clock = Clock(lambda: now)
    for said in (100.0, 101.0, 102.0):  # asked at 100, answered at 102: said at any time between
        clock.learn(int((said + 1000) * 1e6), 100.0, 102.0)
        now = 102.5
        assert int((now + 1000) * 1e6) <= (clock.server() or 0) <= int((now + 1002) * 1e6)


def test_asked_anew() -> None:
    """A clock may be set, so what was learnt counts for seconds only."""
    now = 0.0
    clock = Clock(lambda: now)
    clock.learn(1_000_000, 0.0, 0.0)
    now = 9.0
    assert clock.server() == 10_000_000
    now = 10.5
    assert clock.server() is None
