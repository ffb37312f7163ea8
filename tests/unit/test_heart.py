"""The threads that keep time are woken only by what is due before they would wake anyway."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest
import redis

from celery_memolock.effects import Hold, Renew, Run
from celery_memolock.errors import StoreUnavailable
from celery_memolock.inbox import Inbox
from celery_memolock.keys import Keys
from celery_memolock.store import _Heart


class Server:
    """Answers renewals, and remembers of which runs."""

    def __init__(self) -> None:
        self.renewed: list[Run] = []
        self.heard = threading.Event()

    def run_all(self, effects: list[Renew]) -> list[str]:
        self.renewed += [effect.run for effect in effects]
        self.heard.set()
        return ["CONTINUE"] * len(effects)


def hold(number: int, lease: float) -> Hold:
    return Hold(Keys.of("memolock", f"t:{number}"), Run(f"{number}-a", 1), lease, 60.0)


def asleep(heart: Any) -> float:
    """Wait until the thread sleeps → until when."""
    deadline = time.monotonic() + 5
    while not heart._asleep_until:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return float(heart._asleep_until)


def test_a_later_lease_does_not_wake_the_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run after the other is held and released, and only the first wakes the thread; a shorter lease does again."""
    server: Any = Server()
    heart = _Heart(server)
    heart.hold(hold(0, 30.0), lambda: True)
    asleep(heart)
    woken: list[bool] = []
    plain = heart._changed.notify
    monkeypatch.setattr(heart._changed, "notify", lambda: (woken.append(True), plain()))
    heart.release(hold(0, 30.0).run)
    for number in range(1, 50):
        heart.hold(hold(number, 30.0), lambda: True)
        heart.release(hold(number, 30.0).run)
    assert not woken
    heart.hold(hold(50, 0.06), lambda: True)
    assert woken
    assert server.heard.wait(5), "the short lease was not renewed"
    assert set(server.renewed) == {hold(50, 0.06).run}
    heart.close()


def test_heart_sleeps_on_what_is_held_later() -> None:
    """A lease that was held without waking it is renewed when it is due, though what it slept for is gone."""
    server: Any = Server()
    heart = _Heart(server)
    heart.hold(hold(0, 0.3), lambda: True)
    asleep(heart)
    heart.release(hold(0, 0.3).run)
    heart.hold(hold(1, 0.6), lambda: True)
    assert server.heard.wait(5), "it was not renewed"
    assert set(server.renewed) == {hold(1, 0.6).run}
    heart.release(hold(1, 0.6).run)
    deadline = time.monotonic() + 5
    while heart._asleep_until != math.inf:  # nothing is left to wake for
        assert time.monotonic() < deadline
        time.sleep(0.001)
    heart.close()


def test_heart_survives_whatever_befalls_a_renewal(caplog: pytest.LogCaptureFixture) -> None:
    """It is in the log, and the leases are renewed the next time."""
    server: Any = Server()
    heart = _Heart(server)
    plain, failures = server.run_all, [ValueError("odd"), StoreUnavailable("away")]

    def failing(effects: list[Renew]) -> list[str]:
        if failures:
            raise failures.pop(0)
        return plain(effects)  # type: ignore[no-any-return]

    server.run_all = failing
    heart.hold(hold(0, 0.06), lambda: True)
    assert server.heard.wait(5), "it was not renewed any more"
    heart.close()
    odd, away = [record for record in caplog.records if "could not renew 1 leases" in record.message]
    assert odd.exc_info
    assert not away.exc_info


def test_listener_dozes_between_misses(monkeypatch: pytest.MonkeyPatch, server: Any) -> None:
    """Of one miss after the other only the first wakes the listener, and when no more come it sleeps on."""
    monkeypatch.setattr("celery_memolock.inbox._DOZE", 1.5)  # a busy machine takes its time over the steps below
    inbox = Inbox(redis.ConnectionPool.from_url(server.url), "t")
    told = threading.Event()
    with inbox.expecting(told.set):
        assert told.wait(5)
    woken: list[bool] = []
    plain = inbox._ring_listener
    monkeypatch.setattr(inbox, "_ring_listener", lambda: (woken.append(True), plain()))

    def sleeps(least: float, most: float) -> bool:
        return bool(least < inbox._asleep_until - time.monotonic() < most)

    def until(true: Any) -> None:
        deadline = time.monotonic() + 5
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    until(lambda: sleeps(5.0, 60.0))
    inbox._alarm(time.monotonic() + 3.0)
    assert len(woken) == 1
    until(lambda: sleeps(0.2, 1.6))
    for _ in range(50):
        inbox._alarm(time.monotonic() + 3.0)
    assert len(woken) == 1
    until(lambda: sleeps(5.0, 60.0))
    inbox._alarm(time.monotonic() + 3.0)
    assert len(woken) == 2
    inbox.close()
