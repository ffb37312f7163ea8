"""What only callers in event loops meet: other loops, cancellation, and whatever would block a loop."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_memolock import DispatchError, WaitTimeout, memolocked_task
from celery_memolock.engines.celery_settings import store_of
from celery_memolock.server import Server
from tests.conftest import commands_run
from tests.workers.conftest import in_a_process, until
from tests.workers.shop import Shop, make


@pytest.fixture(scope="module")
def made(server: Server, start_for_all: Callable[..., Any]) -> Shop:
    """A shop with a worker."""
    found, _ = start_for_all(server.url, server.url, "--concurrency", "4")
    return found  # type: ignore[no-any-return]


def registered(made: Shop, key: str) -> list[bytes]:
    flight: dict[bytes, bytes] = made.records.hgetall(made.gated.memo.call((key,), {}).keys.all[1])  # type: ignore[assignment]
    return [field for field in flight if field.startswith(b"w:")]


async def started(made: Shop, key: str) -> None:
    await asyncio.to_thread(made.await_start, key)


def test_ten_thousand_callers(made: Shop, key: str) -> None:
    """10,000 coroutines of one loop wait for one run."""

    async def main() -> None:
        callers = [asyncio.create_task(made.tasks["gated"].aget_cached(key)) for _ in range(10_000)]
        await started(made, key)
        made.open_gate(key)
        assert set(await asyncio.gather(*callers)) == {"open"}

    asyncio.run(main())
    assert made.ran(key) == 1
    assert len(registered(made, key)) == 0


def test_commands_of_a_herd(server: Server, own_server: Server, start_worker: Callable[..., Any], key: str) -> None:
    """Coroutines that ask at once need one `acquire`, and of scripts that and their winner's `confirm` are all."""
    # A store of its own: kombu has scripts, too, and runs that other tests have left behind renew their leases.
    made, _ = start_worker(server.url, own_server.url, "--concurrency", "1")

    async def main(key: str) -> int:
        gated = newcomer.tasks["gated"].with_options(lease=60, poll_interval=60, max_poll_interval=60)
        before = commands_run(made.records, "evalsha")
        callers = [asyncio.create_task(gated.aget_cached(key)) for _ in range(500)]
        await started(made, key)
        made.open_gate(key)
        assert set(await asyncio.gather(*callers)) == {"open"}
        until(lambda: commands_run(made.records, "evalsha") >= before + 4)
        return commands_run(made.records, "evalsha") - before  # with the worker's claim and settle

    # Of a process that listens to nothing yet: it begins to, while they come.
    newcomer = make(made.app.conf.broker_url, made.app.conf.memolock_redis_url, made.app.conf.memolock_prefix)
    first = asyncio.run(main(key))
    # It listens now, and each loop is another. A busy machine parts a herd in two, so the least of some counts.
    assert min(first, *(asyncio.run(main(f"{key} {number}")) for number in range(4))) == 4


def test_cancelled_callers(made: Shop, key: str) -> None:
    """To cancel callers concerns no other, the one that looks for all included; the last one unregisters."""

    async def main() -> None:
        gated = made.tasks["gated"]
        callers = [asyncio.create_task(gated.aget_cached(key)) for _ in range(10)]
        await started(made, key)
        for caller in callers[:9]:
            caller.cancel()
        assert len(await asyncio.gather(*callers[:9], return_exceptions=True)) == 9
        assert all(caller.cancelled() for caller in callers[:9])
        assert len(registered(made, key)) == 1
        callers[9].cancel()
        with pytest.raises(asyncio.CancelledError):
            await callers[9]
        assert registered(made, key) == []
        again = asyncio.create_task(gated.aget_cached(key))
        made.open_gate(key)
        assert await again == "open"

    asyncio.run(main())
    assert made.ran(key) == 1
    assert len(store_of(made.app).inbox.rooms) == 0


@pytest.mark.repeat
def test_cancelled_at_any_moment(made: Shop, key: str) -> None:
    """Callers that are cancelled after 0 to 30 ms leave nothing, and the key gets its value."""

    async def main(key: str) -> None:
        stock = made.tasks["stock"]

        async def hurried(number: int) -> None:
            try:
                await asyncio.wait_for(stock.aget_cached(key), number * 0.0003)
            except (TimeoutError, asyncio.TimeoutError):
                pass

        await asyncio.gather(*(hurried(number) for number in range(100)), stock.aget_cached(key))

    for round_ in range(int(os.environ.get("MEMOLOCK_REPEAT", "10"))):
        asyncio.run(main(f"{key}-{round_}"))
        assert made.ran(f"{key}-{round_}") == 1
        assert len(store_of(made.app).inbox.rooms) == 0


def test_time_out(made: Shop, key: str) -> None:
    """A time-out is the same error as for threads, and the loop's own time-outs work as well."""

    async def main() -> None:
        gated = made.tasks["gated"]
        with pytest.raises(WaitTimeout, match="RUNNING"):
            await gated.with_options(wait_timeout=0.5).aget_cached(key)
        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await asyncio.wait_for(gated.aget_cached(key), 0.1)
        made.open_gate(key)
        assert await gated.aget_cached(key) == "open"

    asyncio.run(main())
    assert made.ran(key) == 1


def test_loops_in_threads(made: Shop, key: str) -> None:
    """Loops in several threads, uvloop's too, and plain threads beside them wait for one run."""
    uvloop = pytest.importorskip("uvloop")
    got: list[str] = []

    async def ask() -> None:
        got.extend(await asyncio.gather(*(made.tasks["gated"].aget_cached(key) for _ in range(50))))

    def in_a_loop(new: Callable[[], asyncio.AbstractEventLoop]) -> None:
        loop = new()
        try:
            loop.run_until_complete(ask())
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0.05))
        finally:
            loop.close()

    kinds = [asyncio.new_event_loop, uvloop.new_event_loop] * 2
    threads = [threading.Thread(target=in_a_loop, args=(kind,)) for kind in kinds]
    threads += [threading.Thread(target=lambda: got.append(made.tasks["gated"].get_cached(key))) for _ in range(50)]
    for thread in threads:
        thread.start()
    made.await_start(key)
    made.open_gate(key)
    for thread in threads:
        thread.join(30)
    assert got == ["open"] * 250
    assert made.ran(key) == 1


@pytest.fixture
def silent() -> Iterator[str]:
    """A broker that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"redis://127.0.0.1:{listening.getsockname()[1]}/0"


async def longest_stall(of: Any) -> tuple[float, Any]:
    """Return for how long the loop was held up while something was awaited, and what came of it."""
    longest = 0.0
    work = asyncio.ensure_future(of)
    while not work.done():
        began = time.monotonic()
        await asyncio.sleep(0.001)
        longest = max(longest, time.monotonic() - began)
    return longest, work.exception() or work.result()


def test_broker_that_blocks(server: Server, silent: str, prefix: str, key: str) -> None:
    """A broker that never answers holds up its callers for `dispatch_lease`, and the loop not at all."""
    made = make(silent, server.url, prefix)

    async def main() -> None:
        stall, error = await longest_stall(made.tasks["stock"].with_options(dispatch_lease=4).aget_cached(key))
        assert isinstance(error, DispatchError)
        assert stall < 2

    asyncio.run(main())


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_broker_that_blocks_many(server: Server, silent: str, prefix: str, key: str, driver: str) -> None:
    """What of a batch was not sent in that time is not tried one by one."""
    stock = make(silent, server.url, prefix).tasks["stock"].with_options(dispatch_lease=1)
    calls = [(f"{key} {number}",) for number in range(12)]
    began = time.monotonic()
    if driver == "threads":
        found = stock.get_cached_many(calls, return_exceptions=True)
    else:
        found = asyncio.run(stock.aget_cached_many(calls, return_exceptions=True))
    assert {type(each) for each in found} == {DispatchError}
    assert time.monotonic() - began < 9


def test_stale_value_in_a_loop_that_ends(made: Shop, key: str) -> None:
    """The refresh of a stale value is sent, though the loop of who got that ends at once."""
    stock = made.tasks["stock"].with_options(stale_ttl=60)
    asyncio.run(stock.aget_cached(key))
    stock.expire(key)
    assert asyncio.run(stock.aget_cached_entry(key)).state == "stale"
    until(lambda: made.ran(key) == 2)


def test_cancelled_while_it_sends(server: Server, silent: str, prefix: str, key: str) -> None:
    """A winner that is cancelled while it sends ends as cancelled, and fails the flight that others wait for first."""
    made = make(silent, server.url, prefix)

    async def main() -> None:
        stock = made.tasks["stock"].with_options(dispatch_lease=1)
        winner = asyncio.create_task(stock.aget_cached(key))
        while not made.records.exists(stock.memo.call((key,), {}).keys.all[1]):
            await asyncio.sleep(0.01)
        other = asyncio.create_task(stock.aget_cached(key))
        await asyncio.sleep(0.1)
        winner.cancel()
        with pytest.raises(asyncio.CancelledError):
            await winner
        with pytest.raises(DispatchError):
            await other

    asyncio.run(main())
    assert len(store_of(made.app).inbox.rooms) == 0


def test_eager(prefix: str) -> None:
    """In eager mode the task runs in a thread: a slow one holds up nobody else in the loop."""
    made = make("memory://", "redis://127.0.0.1:1/0", prefix)
    made.app.conf.task_always_eager = True

    @memolocked_task(app=made.app, ttl=5, name="shop.sleepy")
    def sleepy() -> int:
        time.sleep(2)
        return 7

    async def main() -> None:
        stall, value = await longest_stall(sleepy.aget_cached())
        assert value == 7
        assert stall < 1

    asyncio.run(main())


EXIT = """
import asyncio, sys
from tests.workers.shop import shop

async def main():
    waiting = asyncio.create_task(shop.tasks["gated"].aget_cached(sys.argv[1]))
    await asyncio.to_thread(shop.await_start, sys.argv[1])

asyncio.run(main())
"""


def test_exit_with_waiters(made: Shop, server: Server, key: str) -> None:
    """A program whose loop ends while callers wait ends, and says nothing."""
    done = in_a_process((made, server.url, server.url), EXIT, key)
    made.open_gate(key)
    assert (done.returncode, done.stderr) == (0, "")
