"""However many ask, one runs: threads, or coroutines, in several processes, over each broker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest

from celery_memolock import MISS
from tests.workers.conftest import ROOT, in_background
from tests.workers.shop import Shop, Sold

PROCESSES, THREADS = 4, 100

pytestmark = pytest.mark.parametrize(
    "any_shop",
    [
        # The first three in the order of the fixture's own, as pytest sorts tests by that.
        "redis",
        pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
        "redis, asked from asyncio",
        pytest.param("rabbitmq, asked from asyncio", marks=pytest.mark.rabbitmq),
    ],
    indirect=True,
    scope="session",
)


class Crowd:
    """400 callers in four processes that stay alive from one key to the next."""

    def __init__(self, processes: list[subprocess.Popen[str]], driver: str) -> None:
        self._processes = processes
        self._driver = driver

    def ask(self, task: str, *arguments: Any) -> list[Any]:
        """Have all callers ask for one key at once; return what they got."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([self._driver, task, arguments]) + "\n")
            process.stdin.flush()
        return [answer for process in self._processes for answer in self._answer(process)]

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        return json.loads(process.stdout.readline())


@pytest.fixture(scope="module")
def processes() -> Iterator[Callable[[tuple[Shop, str, str]], list[subprocess.Popen[str]]]]:
    """Return the processes of a shop, started once for both drivers."""
    command = [sys.executable, "-m", "tests.workers.crowd", str(THREADS)]
    with ExitStack() as stack:

        @cache
        def of(prefix: str, broker: str, store: str) -> list[subprocess.Popen[str]]:
            environment = {**os.environ, "SHOP_BROKER": broker, "SHOP_STORE": store, "SHOP_PREFIX": prefix}
            started = [
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                for _ in range(PROCESSES)
            ]
            for process in started:
                stack.enter_context(process)
                stack.callback(process.kill)
            for process in started:
                assert Crowd._answer(process) == "ready"
            return started

        yield lambda shop: of(shop[0].app.conf.memolock_prefix, *shop[1:])


@pytest.fixture(scope="module")
def crowd(any_shop: tuple[Shop, str, str], processes: Callable[..., list[subprocess.Popen[str]]]) -> Crowd:
    """The callers of a shop."""
    return Crowd(processes(any_shop), any_shop[0].driver)


@pytest.mark.repeat
@pytest.mark.timeout(300)
def test_400_callers_one_run(any_shop: tuple[Shop, str, str], crowd: Crowd, key: str) -> None:
    """100 threads in each of 4 processes ask for one cold key: one run, 400 equal results; and again and again."""
    made, *_ = any_shop
    for number in range(int(os.environ.get("MEMOLOCK_REPEAT", "10"))):
        mine = f"{key}-{number}"
        answers = crowd.ask("stock", mine)
        assert answers == [["value", [mine, "stock"]]] * (PROCESSES * THREADS)
        assert made.ran(mine) == 1


def test_failed_key_is_free(any_shop: tuple[Shop, str, str], key: str) -> None:
    """Without `error_ttl` those who wait get the error, and the next call runs the task again."""
    made, *_ = any_shop
    failing = made.failing.with_options(error_ttl=0)
    for count in (1, 2):
        with pytest.raises(Sold) as caught:
            failing.get_cached(key)
        assert caught.value.args == (key, 7)
        assert made.ran(key) == count


def test_distinct_keys(any_shop: tuple[Shop, str, str], key: str) -> None:
    """Each key has a run of its own."""
    made, *_ = any_shop
    futures = [in_background(made.stock.get_cached, f"{key}-{number}") for number in range(20)]
    assert [future.result(30) for future in futures] == [[f"{key}-{number}", "stock"] for number in range(20)]
    assert all(made.ran(f"{key}-{number}") == 1 for number in range(20))


def test_failure_reaches_all(any_shop: tuple[Shop, str, str], crowd: Crowd, key: str) -> None:
    """A failed run tells all 400: the exception of its own type, with the worker's traceback.

    Not all of them ask before it fails, so the task keeps its error for a while.
    """
    made, *_ = any_shop
    answers = crowd.ask("failing", key)
    assert {tuple(answer[:2]) for answer in answers} == {("Sold", f"('{key}', 7)")}
    assert all("raise Sold(key, 7)" in answer[2] for answer in answers)
    assert made.ran(key) == 1


@pytest.mark.parametrize(("kind", "error"), [("set", "EncodeError"), ("large", "ValueTooLarge")])
def test_unstorable_value_reaches_all(
    any_shop: tuple[Shop, str, str], crowd: Crowd, key: str, kind: str, error: str
) -> None:
    """A value that cannot be stored is a typed error for all who wait, from one run."""
    made, *_ = any_shop
    answers = crowd.ask("unencodable", key, kind)
    assert {answer[0] for answer in answers} == {error}
    assert made.ran(key) == 1


@pytest.mark.parametrize("value", [None, 0, "", [], False, {"a": [1, 2.5, None]}])
def test_empty_values_are_hits(any_shop: tuple[Shop, str, str], key: str, value: Any) -> None:
    """Whatever a task returns is a hit the next time."""
    made, *_ = any_shop
    assert made.plain.get_cached(key, value) == value
    assert made.plain.get_cached(key, value) == value
    assert made.plain.peek(key, value) == value
    assert made.plain.peek(key, value) is not MISS
    assert made.ran(key) == 1


def test_invalidation_in_mid_run(any_shop: tuple[Shop, str, str], key: str) -> None:
    """Who waited before an invalidation gets the old run's value; who comes after gets one computed after."""
    made, *_ = any_shop
    before = in_background(made.gated.get_cached, key)
    made.await_start(key)
    assert made.gated.invalidate(key) is False
    after = in_background(made.gated.get_cached, key)
    made.await_start(key)
    made.open_gate(key, "old")
    assert before.result(30) == "old"
    assert made.gated.peek(key) is MISS
    made.open_gate(key, "new")
    assert after.result(30) == "new"
    assert made.gated.peek(key) == "new"


def test_set_cached_in_mid_run(any_shop: tuple[Shop, str, str], key: str) -> None:
    """A value set from outside goes to those who wait, and the run's late value is refused."""
    made, *_ = any_shop
    waiter = in_background(made.gated.get_cached, key)
    made.await_start(key)
    made.gated.set_cached("set", key)
    assert waiter.result(30) == "set"
    made.open_gate(key, "late")
    # The flight that follows shows that the late run is over: its outcome changed nothing.
    made.gated.refresh(key)
    made.await_start(key)
    assert made.gated.peek(key) == "set"
    made.open_gate(key, "fresh")


def test_refresh_in_mid_run(any_shop: tuple[Shop, str, str], key: str) -> None:
    """A refresh asked for while a run is under way leads to another run after it; until then the first value serves."""
    made, *_ = any_shop
    waiter = in_background(made.gated.get_cached, key)
    made.await_start(key)
    assert made.gated.refresh(key) is False
    made.open_gate(key, "first")
    assert waiter.result(30) == "first"
    made.await_start(key)
    assert made.gated.get_cached(key) == "first"
    made.open_gate(key, "second")
    assert made.ran(key) == 2
