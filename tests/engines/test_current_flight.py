"""What code that computes a value learns of its flight, and says to it: computed in a thread, and by a coroutine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_memolock import MISS, MemoLock, StoreUnavailable, current_flight
from celery_memolock.external import settle
from celery_memolock.server import Server
from tests.workers.conftest import until

Ask = Callable[..., Any]


@pytest.fixture
def memo(server: Server, prefix: str) -> Iterator[MemoLock]:
    """A MemoLock of the test's own."""
    with MemoLock(server.url, prefix=prefix, ttl=60, poll_interval=0.2, max_poll_interval=0.2) as made:
        yield made


@pytest.fixture(params=["threads", "asyncio"])
def ask(request: pytest.FixtureRequest, memo: MemoLock) -> Ask:
    """Have a value computed by a function, or by a coroutine function that does the same."""

    def get(key: str, fetch: Callable[[], Any], **options: Any) -> Any:
        async def coroutine() -> Any:
            return fetch()

        if request.param == "threads":
            return memo.get(key, fetch, **options)
        return asyncio.run(memo.aget(key, coroutine, **options))

    return get


def test_etag_of_what_is_not_modified(ask: Ask) -> None:
    """A version whose value still holds may have a new name; without one it keeps its own."""
    seen = []

    def fetch(etag: str) -> Any:
        seen.append(current_flight.stale_etag)
        if etag:
            current_flight.etag = etag
        return current_flight.not_modified() if current_flight.stale_etag else "page"

    for etag in ("v1", "v2", "", ""):
        assert ask("k", lambda etag=etag: fetch(etag), force_refresh=True) == "page"
    assert seen == ["", "v1", "v2", "v2"]


def test_cancelled(memo: MemoLock, ask: Ask) -> None:
    """It says so once the flight is another's: here it was ended by a value from outside."""

    def fetch() -> Any:
        assert not current_flight.cancelled
        memo.set("k", "set")
        until(lambda: current_flight.cancelled)
        return "late"

    assert ask("k", fetch, lease=0.3) == "set"


def test_not_cancelled(memo: MemoLock, ask: Ask) -> None:
    """It does not for want of renewals: after `max_run`, or as the flight is handed out and not kept alive here."""

    def slow() -> Any:
        time.sleep(0.8)  # the lease holds for as long as that after its only renewal
        return current_flight.cancelled

    assert ask("k", slow, lease=3, max_run=0.1) is False
    client: Any = memo._server.store._client

    def outside() -> None:
        settle(client, current_flight.token, current_flight.cancelled)

    assert ask("outside", outside, external=True) is False


def test_stale_after_a_failure(memo: MemoLock, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who could not read the stale value, and asks for it again, does not hear that there is none."""
    down = []
    get = memo._server.store.get

    def read(*args: Any) -> Any:
        if down:
            raise StoreUnavailable(down.pop())
        return get(*args)

    monkeypatch.setattr(memo._server.store, "get", read)

    def fetch() -> Any:
        down.append("for a moment")
        with pytest.raises(StoreUnavailable):
            assert current_flight.stale is MISS
        return [current_flight.stale, current_flight.stale]

    memo.set("k", "old")
    assert ask("k", fetch, force_refresh=True) == ["old", "old"]


def test_misspelt(ask: Ask) -> None:
    """To say something that is not there is an error, in a flight and outside."""

    def fetch() -> None:
        current_flight.tll = 5  # type: ignore[attr-defined]

    for call in (fetch, lambda: ask("k", fetch)):
        with pytest.raises(AttributeError, match="tll"):
            call()
