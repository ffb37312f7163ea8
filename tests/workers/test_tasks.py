"""A memolocked task stays a Celery task."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from celery import chain, group

from celery_memolock import MISS, ArgumentError, FlightFailed, ReentrantFlight, WaitTimeout, bounded, memolocked_task
from celery_memolock.server import Server
from celery_memolock.testing import Link
from tests.workers.conftest import in_a_process, in_background, until
from tests.workers.shop import Shop, Sold, make

AnyShop = tuple[Shop, str, str]


def test_delay_touches_no_cache(any_shop: AnyShop, key: str) -> None:
    """`delay` runs the task as always, each time, and neither reads nor fills the cache."""
    made, *_ = any_shop
    for count in (1, 2):
        assert made.stock.delay(key).get(timeout=30) == [key, "stock"]
        assert made.ran(key) == count
    assert made.stock.peek(key) is MISS


def test_canvas(any_shop: AnyShop, key: str) -> None:
    """Chains, groups and links carry the task as any other."""
    made, *_ = any_shop
    assert chain(made.add.s(1, 2), made.add.s(3)).apply_async().get(timeout=30) == 6
    assert chain(made.plain.s(key, 4), made.add.s(3)).apply_async().get(timeout=30) == 7
    assert group(made.plain.s(f"{key}-{n}", n) for n in range(3)).apply_async().get(timeout=30) == [0, 1, 2]


def test_bound_task(any_shop: AnyShop, key: str) -> None:
    """`self` is the task with its request, and no part of the key."""
    made, *_ = any_shop
    assert made.bound.get_cached(key) == [key, "shop.bound", True]
    assert made.bound.peek(key=key) == [key, "shop.bound", True]


@pytest.mark.parametrize("name", ["with_base", "by_class"])
def test_other_ways_to_define(any_shop: AnyShop, key: str, name: str) -> None:
    """`base=MemoLockTask` and a class of one's own work as the decorator does."""
    made, *_ = any_shop
    expected = key.upper() if name == "by_class" else key
    assert getattr(made, name).get_cached(key) == expected
    assert getattr(made, name).get_cached(key) == expected
    assert made.ran(key) == 1


def test_ignored_argument(any_shop: AnyShop, key: str) -> None:
    """An ignored argument reaches the task, but makes no other key."""
    made, *_ = any_shop
    assert made.with_base.get_cached(key, request="!") == f"{key}!"
    assert made.with_base.get_cached(key, request="?") == f"{key}!"


@pytest.mark.parametrize(("name", "failures", "expected"), [("flaky", 3, 3), ("retrying", 1, 1)])
def test_one_flight_through_all_retries(any_shop: AnyShop, key: str, name: str, failures: int, expected: int) -> None:
    """Waiters wait through autoretry and `self.retry`, and get the last attempt's value."""
    made, *_ = any_shop
    assert getattr(made, name).get_cached(key, failures) == expected
    assert made.ran(key) == failures + 1


def test_exhausted_retries(any_shop: AnyShop, key: str) -> None:
    """When no retry is left the error reaches the waiters."""
    made, *_ = any_shop
    with pytest.raises(Sold):
        made.retrying.get_cached(key, 5)
    assert made.ran(key) == 2


def test_circle(any_shop: AnyShop, key: str) -> None:
    """A task that asks for its own key hears so at once."""
    made, *_ = any_shop
    with pytest.raises(ReentrantFlight, match=key[:3]):
        made.circle.get_cached(key)


@pytest.mark.parametrize("nested", ["inline", "dispatch"])
def test_circle_of_two(any_shop: AnyShop, key: str, nested: str) -> None:
    """Two tasks that ask for each other's keys hear so, in one worker's process or across several."""
    made, *_ = any_shop
    with pytest.raises(ReentrantFlight, match=r"shop\.ping.* -> shop\.pong.* -> shop\.ping"):
        made.ping.get_cached(key, nested)
    assert made.ran(key) == 2


def test_local_cache(any_shop: AnyShop, key: str) -> None:
    """A value that is kept here costs no trip, until another process invalidates it."""
    made, *_ = any_shop
    near = made.tasks["near"]
    assert made.near.get_cached(key) == 1
    until(lambda: made.near.get_cached(key) == 1 and near.memo.kept((key,), {}) == 1)
    code = "import sys; from tests.workers.shop import shop; shop.near.invalidate(sys.argv[1])"
    assert in_a_process(any_shop, code, key).returncode == 0
    assert until(lambda: made.near.get_cached(key) == 2)


def test_wrong_arguments(any_shop: AnyShop, key: str) -> None:
    """Wrong arguments are the `TypeError` of a call, and nothing is dispatched."""
    made, *_ = any_shop
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'key'"):
        made.stock.get_cached()
    with pytest.raises(TypeError, match=r"argument 'value' of task 'shop\.stock', a set"):
        made.stock.get_cached(key, {1})
    assert made.ran(key) == 0


def test_unknown_task(any_shop: AnyShop, key: str) -> None:
    """A task that the worker does not know fails for its callers at once."""
    made, *_ = any_shop

    @memolocked_task(app=made.app, ttl=5, name=f"shop.unknown.{key}")
    def unknown(key: str) -> str:
        return key

    with pytest.raises(FlightFailed, match=r"not registered on worker \S+ \(are its modules"):
        unknown.get_cached(key)


def test_a_task_of_another_module_name(any_shop: AnyShop, key: str) -> None:
    """Where the worker has a task that differs from it only in its module's name, that one is named with the cure."""
    made, *_ = any_shop

    @memolocked_task(app=made.app, ttl=5, name=f"{key}.stock")
    def stock(key: str) -> str:
        return key

    text = rf"task '{key}\.stock' is not registered on worker \S+, which has 'shop\.stock' \(.* give them name="
    with pytest.raises(FlightFailed, match=text):
        stock.get_cached(key)


def test_time_out_while_running(any_shop: AnyShop, key: str) -> None:
    """A time-out says that the task is running; the flight goes on, and leaves no registration."""
    made, *_ = any_shop
    with pytest.raises(WaitTimeout, match=r"RUNNING for 0\.\d s"):
        made.gated.with_options(wait_timeout=0.8).get_cached(key)
    flight = made.gated.memo.call((key,), {}).keys.all[1]
    assert not [field for field in made.records.hkeys(flight) if field.startswith(b"w:")]  # type: ignore[union-attr]
    made.open_gate(key, "late")
    assert made.gated.get_cached(key) == "late"


def timed_out(get_cached: Callable[..., Any], *args: Any, about: str) -> None:
    """Ask until a time-out says something about the workers, which a slow one may have told too late."""

    def text() -> str:
        with pytest.raises(WaitTimeout, match="QUEUED for") as caught:
            get_cached(*args)
        assert caught.value.state == "QUEUED"
        return str(caught.value)

    found = until(lambda: found if "it waits for a worker" not in (found := text()) else None)
    assert re.search(about, found), found


@pytest.mark.parametrize("broker", ["redis", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def test_time_out_in_the_queue(request: Any, server: Server, prefix: str, key: str, broker: str) -> None:
    """Without a worker the time-out says that the message is QUEUED, and that nobody was found who consumes it."""
    url = server.url if broker == "redis" else request.getfixturevalue("amqp")
    made = make(url, server.url, prefix)
    text = "no worker of queue '{}' at redis://" if broker == "redis" else "no worker consumes queue '{}' at amqp://"
    timed_out(made.stock.with_options(wait_timeout=0.5).get_cached, key, about=text.format(prefix))


def test_time_out_after_a_worker_came(
    server: Server, prefix: str, key: str, start_worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found before a worker came is told of no flight that began later."""
    monkeypatch.setattr(bounded, "_RECENT", 60.0)
    made = make(server.url, server.url, prefix)
    impatient = made.stock.with_options(wait_timeout=0.5)
    timed_out(impatient.get_cached, f"{key} early", about="no worker of queue")
    start_worker(server.url, server.url, "--concurrency", "1", prefix=prefix)
    runner = in_background(made.gated.get_cached, key)
    made.await_start(key)
    timed_out(impatient.get_cached, f"{key} late", about="and answers: busy")
    made.open_gate(key)
    assert runner.result(30) == "open"


def test_time_out_while_the_workers_are_busy(any_shop: AnyShop, key: str) -> None:
    """The time-out says that there are workers, and of what waits for its retry that one took it.

    Of a queue that none of them consumes it says so.
    """
    made, broker, store = any_shop
    amqp, queue = broker.startswith("amqp"), made.app.conf.task_default_queue
    which = f"queue '{queue}' at {'amqp' if amqp else 'redis'}://\\S+"
    busy = f"workers that consume {which}: 1, busy" if amqp else f"consumes {which}, and answers: busy"
    runners = [in_background(made.gated.get_cached, f"{key} {number}") for number in range(4)]
    for number in range(4):
        made.await_start(f"{key} {number}")
    timed_out(made.stock.with_options(wait_timeout=0.5).get_cached, key, about=busy)
    for number in range(4):
        made.open_gate(f"{key} {number}")
    assert [runner.result(30) for runner in runners] == ["open"] * 4
    assert made.stock.get_cached(key) == [key, "stock"]

    assert made.sourced.refresh(key, "retry late")
    until(lambda: made.ran(key) == 2)  # the first run
    impatient = made.sourced.with_options(wait_timeout=0.2)
    timed_out(impatient.get_cached, key, "retry late", about="QUEUED for .* \\(a worker took it and sent it back")

    elsewhere = make(broker, store, queue, task_routes={"shop.plain": {"queue": f"{queue}-other"}})
    plain = replace(elsewhere, driver=made.driver).plain.with_options(wait_timeout=0.5)
    none = f"no worker consumes queue '{queue}-other'" if amqp else "within 0.25 s, but [1-9]+ of other queues"
    timed_out(plain.get_cached, key, about=none)


def test_broker_silent_when_the_time_is_over(server: Server, prefix: str, key: str) -> None:
    """A broker that does not answer any more, or is gone, keeps nobody: the time-out says what is known."""
    for fault in (lambda link: link.deaf("replies"), lambda link: link.cut()):
        with Link(server.url) as link:
            made = make(link.url, server.url, prefix)
            assert made.stock.refresh(key)
            with fault(link):
                waiters = [in_background(made.stock.with_options(wait_timeout=0.5).get_cached, key) for _ in range(5)]
                for waiter in waiters:
                    with pytest.raises(WaitTimeout, match=r"QUEUED for \d\.\d s \(it waits for a worker\)"):
                        waiter.result(20)
        key += " again"


def test_nested_on_a_pool_of_one(server: Server, start_worker: Callable[..., Any], key: str) -> None:
    """A task that needs another value computes it itself, so a pool of one cannot wait for itself."""
    made, _ = start_worker(server.url, server.url, "--concurrency", "1")
    inner = f"inner of {key}"
    assert made.outer.get_cached(key) == [[inner, "stock"], [inner, "stock"]]
    assert made.ran(inner) == 1


def test_decorator_that_adds_an_argument(any_shop: AnyShop, key: str) -> None:
    """What `delay` takes `get_cached` takes; what it cannot tell before the run fails as the run does."""
    made, *_ = any_shop
    for name in (key, f"{key} 2"):
        expected = [name, "a session", "shop.injected"]
        assert made.injected.delay(name).get(timeout=30) == expected
        assert made.injected.get_cached(name) == made.injected.peek(name) == expected
        assert made.injected.get_cached(key=name) == expected
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'key'"):
        made.injected.get_cached()
    with pytest.raises(
        ArgumentError, match=r"argument 'args\[0\]' of task 'shop\.injected', a bytearray, cannot be sent"
    ):
        made.injected.get_cached(bytearray(b"1"))


def test_routing(server: Server, start_worker: Callable[..., Any], key: str) -> None:
    """A flight's message goes where Celery routes the task."""
    made, _ = start_worker(server.url, server.url, "--queues", f"special-{key}")
    made.app.conf.task_routes = {"shop.stock": {"queue": f"special-{key}"}}
    assert made.stock.get_cached(key) == [key, "stock"]


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
def test_other_pools(server: Server, start_worker: Callable[..., Any], key: str, pool: str) -> None:
    """Flights run in every pool: values, failures, retries, nesting."""
    made, worker = start_worker(server.url, server.url, "--pool", pool, "--concurrency", "2")
    assert made.stock.get_cached(key) == [key, "stock"]
    with pytest.raises(Sold):
        made.failing.get_cached(key)
    assert made.flaky.get_cached(key, 2) == 2
    assert made.outer.get_cached(key)[0] == [f"inner of {key}", "stock"]
    # A run that outlasts its lease of one second keeps it by signs of life.
    assert made.slow.get_cached(f"slow {key}", 2.5) == f"slow {key}"
    assert made.ran(f"slow {key}") == 1
    worker.kill()  # gevent's takes ten seconds to end in good order
