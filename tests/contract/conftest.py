"""The same tests for both drivers: a store, or a task, that is asked from threads, or from an event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_memolock.store import Store
from tests.workers.shop import FromAsyncio, Loop

Open = Callable[[str, str], Any]


class StoreFromAsyncio(FromAsyncio):
    """A store whose commands are sent by the coroutine twins of its methods, in a loop of another thread."""

    def get(self, keys: Any, patience: float = 5.0) -> Any:
        """Do what `Store.get` does, whose twin has no default."""
        return self.__getattr__("get")(keys, patience)


@pytest.fixture(scope="session")
def loop() -> Loop:
    """The one loop of these tests; it is there before any of them counts threads."""
    if FromAsyncio.loop is None:
        FromAsyncio.loop = Loop()
    return FromAsyncio.loop


@pytest.fixture(scope="module", params=["threads", "asyncio"])
def driver(request: pytest.FixtureRequest, loop: Loop) -> str:
    """Who asks."""
    return str(request.param)


def opened(url: str, prefix: str, driver: str) -> Any:
    """Open a store that is asked by a driver."""
    made = Store.from_url(url, prefix)
    return StoreFromAsyncio(made) if driver == "asyncio" else made


@pytest.fixture
def open_store(driver: str) -> Iterator[Open]:
    """Open stores that are asked by this test's driver, and close them at its end."""
    stores: list[Any] = []

    def open_one(url: str, prefix: str) -> Any:
        stores.append(opened(url, prefix, driver))
        return stores[-1]

    yield open_one
    for each in stores:
        each.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that leaves has all the time it takes: with a slow machine it would have no answer."""
    monkeypatch.setattr("celery_memolock.store.LEAVE_PATIENCE", 5.0)
