"""What callers leave behind, however they end, and what strangers can put in their way."""

from __future__ import annotations

import secrets
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from celery_memolock.engines.celery_settings import store_of
from celery_memolock.server import Server
from tests.conftest import commands_run
from tests.workers.conftest import another_process, in_background, until
from tests.workers.shop import Shop

Start = Callable[..., Any]


def registered(made: Shop, key: str) -> list[bytes]:
    """Return the inboxes that the server would tell of a flight's end."""
    flight: dict[bytes, bytes] = made.records.hgetall(made.gated.memo.call((key,), {}).keys.all[1])  # type: ignore[assignment]
    return [field for field in flight if field.startswith(b"w:")]


@pytest.mark.timeout(400)  # 10,000 runs
def test_ten_thousand_keys(own_server: Server, start_worker: Start, key: str) -> None:
    """After 10,000 keys and silence nothing is left: no room, no thread, no connection more, no key that stays."""
    made, _ = start_worker(own_server.url, own_server.url, "--concurrency", "2")
    store = store_of(made.app)
    made.plain.get_cached("first")
    watch = redis.Redis.from_url(own_server.url)
    threads, files = threading.active_count(), 0
    threads += 32 if made.driver == "asyncio" else 0  # the pool that publishes for loops; not one for each key
    brief = made.plain.with_options(ttl=2, wait_timeout=60)
    for round_ in range(2):
        numbers = iter(range(5000))

        def ask(numbers: Any = numbers, round_: int = round_) -> None:
            for number in numbers:
                assert brief.get_cached(f"{key}-{round_}-{number}", number) == number

        crowd = [in_background(ask) for _ in range(20)]
        for future in crowd:
            future.result(150)
        until(lambda: threading.active_count() <= threads)
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        assert not files or open_files <= files + 20  # a connection for each thread at the most; none for each key
        files = open_files
    assert len(store.inbox.rooms) == 0
    left = [name for name in watch.scan_iter(f"{made.app.conf.memolock_prefix}:*") if watch.pttl(name) == -1]
    assert left == []
    until(lambda: not list(watch.scan_iter(f"{made.app.conf.memolock_prefix}:*{key}*")))
    assert list(watch.scan_iter(f"{made.app.conf.memolock_prefix}:1:f:*")) == []
    assert watch.pubsub_numsub(store.inbox.channel) == [(store.inbox.channel.encode(), 1)]


INTERRUPTED = """
import sys
from celery_memolock.engines.celery_settings import store_of
from tests.workers.shop import shop

try:
    shop.gated.get_cached(sys.argv[1])
except KeyboardInterrupt:
    print("interrupted", len(store_of(shop.app).inbox.rooms))
"""


def test_interrupted_caller(any_shop: tuple[Shop, str, str], key: str) -> None:
    """Ctrl-C ends a waiting caller and its registration; the flight goes on."""
    made, *_ = any_shop
    with another_process(any_shop, INTERRUPTED, key) as process:
        made.await_start(key)
        until(lambda: len(registered(made, key)) == 1)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert out == "interrupted 0\n", error
    assert registered(made, key) == []
    made.open_gate(key)
    assert made.gated.get_cached(key) == "open"
    assert made.ran(key) == 1


def test_killed_caller(any_shop: tuple[Shop, str, str], key: str) -> None:
    """A caller that is killed cannot give up its registration; it goes with the flight."""
    made, *_ = any_shop
    with another_process(any_shop, INTERRUPTED, key) as process:
        made.await_start(key)
        until(lambda: len(registered(made, key)) == 1)
        process.kill()
    assert len(registered(made, key)) == 1
    flight = made.gated.memo.call((key,), {}).keys.all[1]
    assert 0 < int(made.records.pttl(flight)) <= 61_000  # type: ignore[arg-type]
    made.open_gate(key)
    assert made.gated.get_cached(key) == "open"
    until(lambda: not made.records.exists(flight))


@pytest.mark.one_driver
@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_forged_notices(server: Server, own_server: Server, start_worker: Start, key: str, driver: str) -> None:
    """Whoever can publish to an inbox can make its process look once more, and no more than that."""
    # A store of its own: kombu has scripts, too, and runs that other tests have left behind renew their leases.
    made, _ = start_worker(server.url, own_server.url, "--concurrency", "1")
    made = replace(made, driver=driver)
    waiter = in_background(made.gated.with_options(poll_interval=60, max_poll_interval=60, lease=300).get_cached, key)
    made.await_start(key)
    until(lambda: len(registered(made, key)) == 1)
    channel = store_of(made.app).inbox.channel
    fence = made.records.hget(made.gated.memo.call((key,), {}).keys.all[1], "fence")
    assert isinstance(fence, bytes)
    until(lambda: looks_of(made) == 3)  # acquire, confirm, claim
    forged = [b"", b"\n", b"x" * 100_000, b"17-abc\nML1 V 17-abc 1 2 3 json utf-8 - =\n1", secrets.token_bytes(500)]
    for notice in [*forged * 50, fence, fence + b"\n"]:
        made.records.publish(channel, notice)
    until(lambda: looks_of(made) > 3)
    threading.Event().wait(0.3)
    assert looks_of(made) <= 3 + 2
    assert not waiter.done()
    made.open_gate(key)
    assert waiter.result(30) == "open"


def looks_of(made: Shop) -> int:
    """Return how many scripts the server has run, which are this process's looks while all else is quiet."""
    return commands_run(made.records, "evalsha")


@pytest.mark.one_driver
@pytest.mark.parametrize(
    "entry",
    [
        b"",
        b"garbage",
        b"ML1 V 1-a 1 2 3 json utf-8 - =\n{broken",
        b"ML1 V 1-a 1 2 3 application/x-python-serialize binary - =\n\x80\x04}\x94.",
        b"ML1 V 1-a 1 2 3 json utf-8 zlib =\nnot compressed",
        b"ML1 V 1-a x y z json utf-8 - =\n1",
        b"ML9 V 1-a 1 2 3 json utf-8 - =\n1",
        b"ML1 E 1-a 1 2 3 json utf-8 - =\n{}",
    ],
)
def test_corrupt_entry(any_shop: tuple[Shop, str, str], key: str, entry: bytes) -> None:
    """An entry that is not of our making, or broken, is a miss: it is computed anew, and replaced."""
    made, *_ = any_shop
    made.records.set(made.stock.memo.call((key,), {}).keys.entry, entry, px=60_000)
    assert made.stock.get_cached(key) == [key, "stock"]
    assert made.stock.peek(key) == [key, "stock"]
    assert made.ran(key) == 1
