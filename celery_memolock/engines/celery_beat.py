"""Refreshes that Celery beat sends for tasks with `refresh_every`: in beat's schedule, and where a worker runs them."""

from __future__ import annotations

import json
import logging
import sys
import time
import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from hashlib import blake2b
from typing import Any, Final

from celery import signals

from ..memo import Memo
from ..options import Options

__all__ = ["HEADER", "REFRESHING", "is_refresh", "note_run", "run_refresh", "schedule"]

logger = logging.getLogger("celery_memolock")

#: What is ours among a message's headers, and what the headers of one are that asks for a refresh.
HEADER: Final = "memolock"
REFRESHING: Final[dict[str, Any]] = {HEADER: {"refresh": True}}

#: What django-celery-beat has room for.
_LONGEST_NAME: Final = 200

#: Of each app: what beat is to send, by the names of the entries.
_entries: weakref.WeakKeyDictionary[Any, dict[str, dict[str, Any]]] = weakref.WeakKeyDictionary()

#: What Celery says of the runs in this thread, where a refresh wants to know.
_runs: ContextVar[list[Any] | None] = ContextVar("celery_memolock_runs", default=None)


# ---- in the process of beat ------------------------------------------------------------------------------------


def schedule(app: Any, task: str, options: Options) -> None:
    """Have beat send the refreshes of a task."""
    entries = {
        name: {
            "task": task,
            "schedule": options.refresh_every,
            "args": call,
            # The mark tells these entries, and the rows that a scheduler makes of them, from a user's own.
            "options": {"headers": {HEADER: {"refresh": True, "beat": name, "app": app.main}}, "ignore_result": True},
        }
        for name, call in _calls(task, options).items()
    }
    _entries.setdefault(app, {}).update(entries)
    app.conf.beat_schedule.update(entries)


def _calls(task: str, options: Options) -> dict[str, tuple[Any, ...]]:
    """Return the calls that beat has refreshed, by the names of their entries."""
    if options.refresh_every is None:
        return {}
    return {_name(f"memolock {task}{call!r}"): call for call in options.refresh_calls}


def _name(text: str) -> str:
    if len(text) <= _LONGEST_NAME:
        return text
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{text[: _LONGEST_NAME - len(digest) - 1]} {digest}"


def _complete(app: Any) -> dict[str, dict[str, Any]]:
    """Put back what is missing as `beat_schedule` was set after the tasks were bound → that."""
    entries = _entries.get(app)
    if entries is None:
        return {}
    missing = {name: entry for name, entry in entries.items() if name not in app.conf.beat_schedule}
    app.conf.beat_schedule.update(missing)
    return missing


def _before_beat(sender: Any, **_: Any) -> None:
    """The app's module has been imported: most often, the last that sets `beat_schedule`."""
    _complete(sender)


def _on_beat(sender: Any, **_: Any) -> None:
    """Beat has its schedule: add what a module that was imported later left out, and tidy up what is stored."""
    app, scheduler = sender.app, sender.scheduler
    late = _complete(app)
    if late:
        logger.info("memolock puts back what a later beat_schedule left out: %s", ", ".join(late))
        scheduler.update_from_dict(late)
    stored = sys.modules.get("django_celery_beat.schedulers")
    if stored is not None and isinstance(scheduler, stored.DatabaseScheduler):
        _tidy(app, scheduler, stored)


def _tidy(app: Any, scheduler: Any, stored: Any) -> None:
    """Delete the rows that no task of the app wants any more: django-celery-beat keeps them whatever the code says."""
    wanted = _entries.get(app, {})
    for row in scheduler.Model._default_manager.filter(headers__contains=f'"{HEADER}"'):
        entry = wanted.get(row.name)
        if entry is None and _is_ours(row, app):
            logger.info("memolock deletes %r from beat's schedule: no task asks for it any more", row.name)
            row.delete()
            scheduler.schedule.pop(row.name, None)
        elif entry is not None and entry["schedule"] % 1:
            # The row was made of whole seconds; 0 of them would have beat send without a pause.
            every = stored.IntervalSchedule.MICROSECONDS, round(entry["schedule"] * 1e6)
            row.interval, _ = stored.IntervalSchedule.objects.get_or_create(period=every[0], every=every[1])
            row.save()


def _is_ours(row: Any, app: Any) -> bool:
    """Whether this app made the row: not if another one did, nor if an operator copied or renamed it."""
    try:
        mark = json.loads(row.headers)[HEADER]
        return bool(mark["beat"] == row.name and mark["app"] == app.main)
    except (KeyError, TypeError, ValueError):
        return False


signals.import_modules.connect(_before_beat, weak=False, dispatch_uid="celery_memolock.before_beat")
signals.beat_init.connect(_on_beat, weak=False, dispatch_uid="celery_memolock.beat")


# ---- in a worker -----------------------------------------------------------------------------------------------


def is_refresh(header: Any) -> bool:
    """Whether our header of a message asks for a refresh."""
    return isinstance(header, Mapping) and header.get("refresh") is True


def note_run(result: Any) -> None:
    """Take down what a flight that was run inline came to, for the refresh that it was run for, if any."""
    runs = _runs.get()
    if runs is not None:
        runs[:] = [result]


def run_refresh(memo: Memo[Any, Any], header: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Do what a refresh message asks for, and log in one line what that was.

    What beat sends is done only as long as the task asks for it. It may be sent for long after that: by a scheduler
    that keeps what it was once told, or by a beat that runs on with older code.

    Args:
        memo: of the task.
        header: ours, of the message.
        args, kwargs: of the message.
    """
    name = header.get("beat")
    if name is not None:
        calls = _calls(memo.task, memo.options)
        if not isinstance(name, str) or name not in calls:
            logger.warning("memolock drops a refresh that beat sent as %r: task %s asks for no such", name, memo.task)
            return
        args, kwargs = calls[name], {}  # as they are in the code, whatever the way through the scheduler made of them
    memo = memo.override({"nested": "inline"})  # what this message does is the run itself
    what = f"of task {memo.task}"
    runs: list[Any] = []
    watching = _runs.set(runs)
    began = time.monotonic()
    try:
        what = f"of key {memo.call(args, kwargs).keys.tag}"
        started = memo.run(memo.refresh(args, kwargs))
    except BaseException as error:
        logger.warning("memolock refresh %s: failed: %s: %s", what, type(error).__name__, error)
        raise
    finally:
        _runs.reset(watching)
    took = time.monotonic() - began
    if not started:
        logger.info("memolock refresh %s: joined a flight that was under way", what)
    elif runs and not runs[0].successful():
        left = runs[0].result
        logger.warning("memolock refresh %s: failed after %.2f s: %s: %s", what, took, type(left).__name__, left)
    else:
        logger.info("memolock refresh %s: the task ran for %.2f s", what, took)
