"""Sentry's SDK in worker and web processes, as it patches Celery and adds headers of its own to each message.

Up to 2.54 it hides a message's other headers from the task. The processes take the SDK from their path, so that
``PYTHONPATH=folder pytest tests/workers/test_sentry.py`` tests the one in a folder.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from celery_memolock.server import Server
from tests.workers.conftest import in_a_process, until
from tests.workers.shop import Shop

#: What a web process does within one of Sentry's transactions; it prints what it was told.
WEB = """
import json, sys, threading
from concurrent.futures import ThreadPoolExecutor

import sentry_sdk
from tests.workers.conftest import until
from tests.workers.sentried import shop

key, told = sys.argv[1], {}


def error_of(call, *args):
    try:
        return call(*args)
    except Exception as error:
        return repr(error)


told["outside a transaction"] = shop.plain.get_cached(f"{key} outside", 1)
with sentry_sdk.start_transaction(name="web", op="test") as transaction:
    told["trace"] = transaction.trace_id
    with ThreadPoolExecutor(8) as pool:
        told["herd"] = list(pool.map(shop.stock.get_cached, [f"{key} herd"] * 8))
    told["by class"] = shop.by_class.get_cached(f"{key} class")
    told["autoretry"] = shop.flaky.get_cached(f"{key} flaky", 2)
    told["retry"] = shop.retrying.get_cached(f"{key} retrying", 1)
    told["no more retries"] = error_of(shop.retrying.get_cached, f"{key} exhausted", 9)
    told["error"] = error_of(shop.failing.get_cached, f"{key} failing")
    told["the error again"] = error_of(shop.failing.get_cached, f"{key} failing")
    told["nested"] = shop.outer.get_cached(f"{key} outer")

    shop.counted.set_cached(0, f"{key} refresh")
    shop.counted.refresh(f"{key} refresh")
    until(lambda: shop.counted.peek(f"{key} refresh") == 1)
    shop.counted.refresher(f"{key} refresh").delay()
    until(lambda: shop.counted.peek(f"{key} refresh") == 2)
    told["plain"] = shop.add.delay(1, 2).get(timeout=30)
    told["plain with ours"] = shop.flaky.delay(f"{key} delayed", 2).get(timeout=30)
print(json.dumps(told))
"""


class Seen(NamedTuple):
    """What a web process was told, and what both processes reported."""

    shop: Shop
    key: str
    told: dict[str, Any]
    reports: list[dict[str, Any]]

    @property
    def errors(self) -> list[tuple[str, str]]:
        """The errors that Sentry heard of: type, and message."""
        raised = [each["exception"]["values"][-1] for each in self.reports if "exception" in each]
        return [(each["type"], each["value"]) for each in raised]

    def traces_of(self, task: str) -> list[str]:
        """The traces that a worker's runs of a task belong to."""
        return [each["contexts"]["trace"]["trace_id"] for each in self.reports if each.get("transaction") == task]


@pytest.fixture(scope="module", params=["redis", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def seen(request: pytest.FixtureRequest, server: Server, start_for_all: Callable[..., Any]) -> Seen:
    broker = request.getfixturevalue("amqp") if request.param == "rabbitmq" else server.url
    flags = ("-c", "2", "--without-mingle")
    made, _ = start_for_all(broker, server.url, *flags, module="tests.workers.sentried", results=server.url)
    key = f"sentry-{uuid.uuid4().hex[:8]}"
    done = in_a_process((made, broker, server.url), WEB, key)
    assert done.returncode == 0, done.stderr
    reported = f"sentry:{made.app.conf.memolock_prefix}"

    def reports() -> list[dict[str, Any]]:
        return [json.loads(each) for each in made.records.lrange(reported, 0, -1)]  # type: ignore[union-attr]

    # A worker reports a run when it is over, which is after the caller has its value.
    until(lambda: len([each for each in reports() if each.get("transaction") == "shop.flaky"]) >= 6)
    return Seen(made, key, json.loads(done.stdout), reports())


def test_values(seen: Seen) -> None:
    """Misses, herds, retries, classes and nested calls have their values, each from as many runs as it needs."""
    told, key, ran = seen.told, seen.key, seen.shop.ran
    assert told["outside a transaction"] == 1
    assert told["herd"] == [[f"{key} herd", "stock"]] * 8
    assert told["by class"] == f"{key} class".upper()
    assert (told["autoretry"], told["retry"]) == (2, 1)
    assert told["nested"] == [[f"inner of {key} outer", "stock"]] * 2
    assert (told["plain"], told["plain with ours"]) == (3, 2)
    runs = [ran(f"{key} {which}") for which in ("outside", "herd", "class", "flaky", "retrying", "refresh", "delayed")]
    assert runs == [1, 1, 1, 3, 2, 2, 3]


def test_errors(seen: Seen) -> None:
    """Who waits gets the run's own error, and Sentry hears of it once: from the worker, and of no retry."""
    told, key = seen.told, seen.key
    assert told["error"] == told["the error again"] == f"Sold('{key} failing', 7)"
    assert told["no more retries"] == f"Sold('{key} exhausted')"
    assert sorted(seen.errors) == [("Sold", f"('{key} failing', 7)"), ("Sold", f"{key} exhausted")]


def test_traces(seen: Seen) -> None:
    """A flight belongs to the trace of the caller that sent it, through all its retries: their headers arrive, too."""
    trace = seen.told["trace"]
    assert seen.traces_of("shop.flaky") == [trace] * 6
    assert trace in seen.traces_of("shop.counted")
