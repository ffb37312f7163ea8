"""Two processes of one task that do not agree on the form of its values, as in the middle of a deploy."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
from celery import Celery

from celery_memolock import MISS, DecodeError, memolocked_task
from celery_memolock.engines.celery_settings import store_of
from celery_memolock.server import Server
from tests.workers.conftest import in_background


@dataclass
class Price:
    """A value of a type of its own."""

    pence: int


class Side:
    """The task in one process: computed where it is called, once the gate is open."""

    def __init__(self, server: Server, prefix: str, **options: Any) -> None:
        app = Celery("mixed", set_as_current=False)
        app.conf.update(memolock_redis_url=server.url, memolock_prefix=prefix, task_always_eager=True)
        self.began, self.gate = threading.Event(), threading.Event()

        @memolocked_task(app=app, ttl=60, name="mixed.price", **options)
        def price(key: str) -> Price:
            self.began.set()
            assert self.gate.wait(30)
            return Price(5) if options.get("typed") else {"pence": 5}  # type: ignore[return-value]

        self.task: Any = price
        self.store = store_of(app)


@pytest.mark.parametrize(
    ("there", "here", "cure"),
    [
        ({"typed": True}, {}, "must set the same typed"),
        ({}, {"typed": True}, "must set the same typed"),
        ({"serializer": "pickle"}, {}, "same serializer"),
        ({}, {"serializer": "pickle"}, "same serializer"),
    ],
)
def test_mismatch(
    server: Server,
    prefix: str,
    there: dict[str, Any],
    here: dict[str, Any],
    cure: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who waits for the other side's value has an error that names the cure; what is stored is a miss, and is said."""
    one, other = Side(server, prefix, **there), Side(server, prefix, **here)
    computing = in_background(one.task.get_cached, "k")
    assert one.began.wait(30)
    waiting = in_background(other.task.get_cached, "k")
    flight = one.task.memo.call(("k",), {}).keys.all[1]
    client = one.store._client
    while len([field for field in client.hkeys(flight) if field.startswith(b"w:")]) < 2:
        threading.Event().wait(0.01)
    one.gate.set()
    found = computing.result(30)
    with pytest.raises(DecodeError, match=cure):
        waiting.result(30)
    assert not other.began.is_set()
    assert one.task.peek("k") == found
    assert other.task.peek("k") is MISS
    assert cure in caplog.text
    other.gate.set()
    assert other.task.get_cached("k") == (Price(5) if here.get("typed") else {"pence": 5})
    assert one.task.peek("k") is MISS
    for side in (one, other):
        side.store.close()


def test_version(server: Server, prefix: str) -> None:
    """A process of another version has values of its own, and drops those of all versions with `invalidate_all`."""
    old, new = Side(server, prefix, version=1), Side(server, prefix, version=2)
    old.task.set_cached("old", "k")
    assert new.task.peek("k") is MISS
    new.gate.set()
    assert new.task.get_cached("k") == {"pence": 5}
    assert old.task.peek("k") == "old"
    old.task.invalidate("k")
    assert new.task.peek("k") == {"pence": 5}
    old.task.set_cached("old", "k")
    assert new.task.invalidate_all() == 2
    assert old.task.peek("k") is new.task.peek("k") is MISS
    for side in (old, new):
        side.store.close()
