"""Which refreshes are in beat's schedule, by Celery's own service and scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, signals
from celery.beat import Service

from celery_memolock import MemoLockTask, memolocked_task
from celery_memolock.engines.celery_beat import run_refresh


def _made(name: str) -> Celery:
    made = Celery(name, broker="memory://", set_as_current=False)

    @memolocked_task(app=made, name="report", ttl=60, refresh_every=30, refresh_calls=[("x" * 300,), ("x" * 301,)])
    def report(key: str) -> str:
        return key

    return made


def _scheduled(app: Celery) -> dict[str, Any]:
    """Return what beat has in its schedule when it begins, as it starts from the command line."""
    app.loader.init_worker()
    app.finalize()
    service = Service(app, scheduler_cls="celery.beat:Scheduler")
    known = service.scheduler  # made before the signal is sent, as `start` does
    signals.beat_init.send(sender=service)
    found: dict[str, Any] = known.schedule
    return found


def test_two_apps() -> None:
    """Each app has its own entries, under names that everything has room for, and its own mark on them."""
    for name in ("first", "second"):
        found = sorted(_scheduled(_made(name)).values(), key=lambda entry: len(entry.args[0]))
        assert [len(entry.name) for entry in found] == [200, 200]
        assert [entry.args[0] for entry in found] == ["x" * 300, "x" * 301]
        assert [entry.options["headers"]["memolock"] for entry in found] == [
            {"refresh": True, "beat": entry.name, "app": name} for entry in found
        ]


def test_a_new_configuration() -> None:
    """A configuration that is read when the tasks are there neither loses the entries nor is lost."""
    app = _made("configured")
    app.finalize()
    mine = {"task": "report", "schedule": 9, "args": ("mine",)}
    app.config_from_object(SimpleNamespace(broker_url="memory://", beat_schedule={"mine": mine}))
    assert len(_scheduled(app)) == 3


def test_abstract_bases() -> None:
    """The options of an abstract base are those of each task that is made of it, and of no task by themselves."""

    class Warm(MemoLockTask[[], int]):
        abstract = True
        memolock = {"ttl": 60, "refresh_every": 30}  # noqa: RUF012

    app = Celery("bases", broker="memory://", set_as_current=False)

    def compute() -> int:
        return 1

    for name in ("one", "two"):
        app.task(name=name, base=Warm, shared=False)(compute)
    cold = app.task(name="cold", base=Warm, shared=False, memolock={"ttl": 60})(compute)
    assert {(entry.task, entry.args) for entry in _scheduled(app).values()} == {("one", ()), ("two", ())}
    assert cold.memo.options.refresh_every is None


@pytest.mark.parametrize("mark", [{"a": 1}, ["a"], 5, "of another task"])
def test_spoilt_mark(mark: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A refresh that no schedule of this task has sent is dropped, whatever stands in it."""
    memo = _made("spoilt").tasks["report"].memo
    run_refresh(memo, {"refresh": True, "beat": mark}, ("k",), {})
    assert f"memolock drops a refresh that beat sent as {mark!r}" in caplog.text
