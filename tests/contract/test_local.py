"""Local caches kept coherent by real servers: changes elsewhere, links that break or go deaf, processes that fork."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import Celery

from celery_memolock import MISS, OptionError, memolocked_task
from celery_memolock.engines import celery_settings
from celery_memolock.engines.celery_settings import store_of
from celery_memolock.server import Server
from celery_memolock.testing import Link
from celery_memolock.tracker import Tracker
from tests.conftest import commands_run
from tests.workers.shop import FromAsyncio


def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never became true"
        threading.Event().wait(0.005)


class Site:
    """A web process's view of a task with a local cache, and another process's of the same task."""

    def __init__(self, url: str, elsewhere: str, prefix: str, driver: str = "threads", **options: Any) -> None:
        here = self._task(url, prefix, local_ttl=60, local_lease=0.5, **options)
        self.here = FromAsyncio(here) if driver == "asyncio" else here
        self.there = self._task(elsewhere, prefix)
        self.client = redis.Redis.from_url(elsewhere)

    @staticmethod
    def _task(url: str, prefix: str, **options: Any) -> Any:
        app = Celery("site", set_as_current=False)
        app.conf.update(memolock_redis_url=url, memolock_prefix=prefix)

        @memolocked_task(app=app, ttl=60, name="site.value", **options)
        def value(key: str) -> Any: ...

        return value

    def kept(self, key: str) -> bool:
        """Whether a call for the key costs no trip now."""
        return repr(self.here.memo.kept((key,), {})) != repr(_missing())

    def await_kept(self, key: str, value: Any) -> None:
        """Ask until the value is kept here."""
        until(lambda: self.here.get_cached(key) == value and self.kept(key))

    def close(self) -> None:
        for task in (self.here, self.there):
            store_of(task.app).close()


def _missing() -> Any:
    from celery_memolock.local import MISSING

    return MISSING


@pytest.fixture
def link(any_server: Server) -> Iterator[Link]:
    with Link(any_server.url) as found:
        yield found


@pytest.fixture
def site(any_server: Server, link: Link, prefix: str, driver: str) -> Iterator[Site]:
    made = Site(link.url, any_server.url, prefix, driver)
    yield made
    made.close()


def gets(client: redis.Redis) -> int:
    return commands_run(client, "get")


def test_hits_of_many_and_of_peek_cost_no_trip(site: Site) -> None:
    """What is kept is not asked for, be it for a list of calls, and only what is not kept is."""
    calls = [(f"k{number}",) for number in range(10)]
    site.there.set_cached_many([(call, number) for number, call in enumerate(calls)])
    for number, (key,) in enumerate(calls):
        site.await_kept(key, number)
    before = gets(site.client)
    assert site.here.get_cached_many(calls) == list(range(10))
    assert [site.here.peek(*call) for call in calls] == list(range(10))
    assert gets(site.client) == before
    site.there.set_cached("new", "k10")
    before = gets(site.client)
    assert site.here.get_cached_many([*calls, ("k10",)]) == [*range(10), "new"]
    assert gets(site.client) == before + 1
    site.there.invalidate("k3")
    until(lambda: site.here.peek("k3") is MISS)


def test_early_refresh_of_what_is_kept(any_server: Server, link: Link, prefix: str, driver: str) -> None:
    """At its early moment a value is kept no more, however long it might be, so that somebody sees what time it is."""
    site = Site(link.url, any_server.url, prefix, driver, early_refresh=0.04)
    began = time.monotonic()
    site.there.with_options(ttl=25).set_cached(1, "k")
    site.await_kept("k", 1)
    assert site.here.with_options(early_refresh=0.9).get_cached_entry("k").source == "store"
    until(lambda: not site.kept("k"))
    assert 0.9 < time.monotonic() - began < 5
    assert site.there.peek("k") == 1
    site.close()


@pytest.mark.parametrize("value", [7, {"queue": ["ada", "grace"]}])
def test_hits_cost_no_trip(site: Site, value: Any) -> None:
    """A value that is kept is served without a command, and nobody can change it for others."""
    site.there.set_cached(value, "k")
    site.await_kept("k", value)
    before = gets(site.client)
    for _ in range(100):
        found = site.here.get_cached("k")
        assert found == value
        if isinstance(found, dict):
            found.clear()
    assert gets(site.client) == before


def test_changed_elsewhere(site: Site) -> None:
    """A value that is replaced, dropped, expires or is flushed elsewhere is dropped here as soon as that is told."""
    site.there.set_cached(1, "k")
    site.await_kept("k", 1)
    site.there.set_cached(2, "k")
    until(lambda: site.here.get_cached("k") == 2)
    site.await_kept("k", 2)
    site.there.invalidate("k")
    until(lambda: not site.kept("k"))
    site.there.with_options(ttl=0.2).set_cached(3, "k")
    site.await_kept("k", 3)
    until(lambda: not site.kept("k"))
    site.there.set_cached(4, "k")
    site.await_kept("k", 4)
    for key in site.client.scan_iter("*"):
        site.client.delete(key)
    until(lambda: not site.kept("k"))


def test_changed_here(site: Site) -> None:
    """One's own change is seen by the very next call."""
    site.here.set_cached(1, "k")
    site.await_kept("k", 1)
    for version in range(2, 200):
        site.here.set_cached(version, "k")
        assert site.here.get_cached("k") == version
    site.here.invalidate("k")
    assert not site.kept("k")


def test_another_task_is_not_concerned(site: Site, any_server: Server, prefix: str) -> None:
    """Changes of other tasks' values are not even told."""
    site.there.set_cached(1, "k")
    site.await_kept("k", 1)
    site.client.set(f"{prefix}:1:e:{{site.other:1:k}}", 1, px=60_000)
    threading.Event().wait(0.1)
    assert site.kept("k")


def test_link_that_breaks(site: Site, link: Link) -> None:
    """When the link is lost nothing is served from here until there is another, and then nothing from before."""
    site.there.set_cached(1, "k")
    site.await_kept("k", 1)
    with link.cut():
        until(lambda: not site.kept("k"))
        site.there.set_cached(2, "k")
    until(lambda: site.here.get_cached("k") == 2)
    site.await_kept("k", 2)


def test_tracking_connection_that_is_killed(site: Site) -> None:
    """The same when the server drops the one connection on which it tells."""
    site.there.set_cached(1, "k")
    site.await_kept("k", 1)
    tracking = [each for each in site.client.client_list() if "t" in each["flags"]]
    assert len(tracking) >= 1
    for each in tracking:
        site.client.client_kill_filter(_id=each["id"])
    site.there.set_cached(2, "k")
    until(lambda: site.here.get_cached("k") == 2)
    site.await_kept("k", 2)


def test_deaf_link(site: Site, link: Link) -> None:
    """A link that carries nothing is noticed by its silence: nothing is served after `local_lease`."""
    site.there.set_cached(1, "k")
    site.await_kept("k", 1)
    with link.deaf("replies"):
        site.there.set_cached(2, "k")
        began = time.monotonic()
        until(lambda: not site.kept("k"))
        assert time.monotonic() - began < 8  # of the minute that it would be kept
    until(lambda: site.here.get_cached("k") == 2)


@pytest.mark.repeat
def test_change_while_the_reply_travels(any_server: Server, prefix: str, driver: str) -> None:
    """Readers and a writer at once: when all is quiet what is kept here is the last that was written."""
    site = Site(any_server.url, any_server.url, prefix, driver)
    last_version = int(os.environ.get("MEMOLOCK_REPEAT", "10")) * (20 if driver == "threads" else 10)
    stop = threading.Event()
    wrong = []

    def read() -> None:
        last = 0
        while not stop.is_set():
            found = site.here.with_options(wait_timeout=5).get_cached("k")
            if found < last:
                wrong.append((found, last))  # of one thread's reads none goes back
            last = found

    site.there.set_cached(0, "k")
    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for version in range(1, last_version + 1):
        site.there.set_cached(version, "k")
    stop.set()
    for reader in readers:
        reader.join()
    until(lambda: site.here.get_cached("k") == last_version)
    assert wrong == []
    site.close()


def test_fork(any_server: Server, prefix: str, driver: str) -> None:
    """A child keeps nothing of its parent's, and has a link of its own."""
    site = Site(any_server.url, any_server.url, prefix, driver)
    site.there.set_cached(1, "k")
    site.await_kept("k", 1)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            FromAsyncio.loop = None  # its thread is the parent's
            assert not site.kept("k")
            site.await_kept("k", 1)
            site.here.set_cached(2, "k")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    until(lambda: site.here.get_cached("k") == 2)
    site.close()


def test_another_store_of_the_same_app(site: Site) -> None:
    """When the app's store was closed the next use makes another one, and values are kept over that."""
    site.there.set_cached(1, "k")
    site.await_kept("k", 1)
    celery_settings._stores.drop(site.here.app)
    assert not site.kept("k")
    site.await_kept("k", 1)
    site.there.set_cached(2, "k")
    until(lambda: site.here.get_cached("k") == 2)


def test_server_that_does_not_track(prefix: str, driver: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where tracking is not allowed nothing is kept, values come from the server, and the log says so once."""
    with Server() as own:
        client = redis.Redis.from_url(own.url)
        client.execute_command("ACL", "SETUSER", "default", "-client|tracking")
        site = Site(own.url, own.url, prefix, driver)
        site.there.set_cached(1, "k")
        for _ in range(20):
            assert site.here.get_cached("k") == 1
            threading.Event().wait(0.02)
        until(lambda: "memolock keeps nothing locally" in caplog.text)
        assert not site.kept("k")
        site.close()


def test_tracker_that_fails(site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong on the link, there is another one soon."""
    plain, failed = Tracker._attend, threading.Event()

    def attend(tracker: Tracker) -> None:
        if not failed.is_set():
            failed.set()
            raise ValueError("read of closed file")
        plain(tracker)

    monkeypatch.setattr(Tracker, "_attend", attend)
    site.there.set_cached(1, "k")
    site.await_kept("k", 1)
    assert failed.is_set()
    assert "read of closed file" in caplog.text


def test_nothing_is_left(any_server: Server, prefix: str, driver: str) -> None:
    """Closing ends the thread and the connection."""
    threads = threading.active_count()
    site = Site(any_server.url, any_server.url, prefix, driver)
    site.there.set_cached(1, "k")
    site.await_kept("k", 1)
    site.close()
    assert threading.active_count() <= threads


def test_options() -> None:
    """What belongs to the process cannot be set for one call; what makes no sense is refused."""
    for bad in ({"local_ttl": -1}, {"local_max_entries": 0}, {"local_max_bytes": 1.5}, {"local_lease": 0}):
        with pytest.raises(OptionError, match=next(iter(bad))):
            memolocked_task(ttl=5, **bad)  # type: ignore[arg-type]
