"""Where the time of a miss, and of a hit in this process, goes, step by step. docs/benchmarks.md tells it by hand.

A miss is followed through both processes, whose clock is one; so is Celery's own round trip. Of a hit in this process
each part is timed alone, as a profiler's own work would be most of what it sees there.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import timeit
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import redis
from celery import Celery, signals

from benchmarks.harness import celery_worker
from benchmarks.local import VALUES
from celery_memolock import memolocked_task, sync
from celery_memolock.codec import Entry
from celery_memolock.local import MISSING
from celery_memolock.server import serve_or_use

URL = os.environ.get("BENCHMARK_URL", "")
MARKS = "benchmark-marks"
MISSES = 600

app = Celery("benchmarks.where", broker=URL, backend=URL)
app.conf.memolock_redis_url = URL
notes: dict[str, float] = {}


def mark(what: str) -> None:
    notes[what] = time.monotonic()


def empty(key: str) -> str:
    mark("runs")
    return key


memolocked = memolocked_task(ttl=60, app=app, name="benchmarks.where.memolocked")(empty)
plain: Any = app.task(name="benchmarks.where.plain")(empty)


class Noting(sync.Driver):
    """A driver that notes when each effect begins and ends."""

    def __call__(self, effect: Any) -> Any:
        name = type(effect).__name__
        mark(f"{name} begins")
        try:
            return super().__call__(effect)
        finally:
            mark(f"{name} ends")


def note_all(client: redis.Redis) -> None:
    """Have the drivers of this process note, and its worker hand its notes to the caller after each task."""
    for name in ("celery_memolock.memo", "celery_memolock.work", "celery_memolock.sync"):
        if hasattr(sys.modules.get(name), "Driver"):
            sys.modules[name].Driver = Noting  # type: ignore[attr-defined]
    signals.before_task_publish.connect(lambda **_: mark("publish begins"), weak=False)
    signals.after_task_publish.connect(lambda **_: mark("publish ends"), weak=False)
    signals.task_prerun.connect(lambda **_: mark("task begins"), weak=False)

    def hand_over(**_: Any) -> None:
        mark("task ends")
        client.rpush(MARKS, json.dumps(notes))
        notes.clear()

    signals.task_postrun.connect(hand_over, weak=False)


def steps_of(client: redis.Redis, ask: Callable[[str], Any], names: list[tuple[str, str, str]]) -> dict[str, float]:
    """Ask again and again → the median of each step, in milliseconds; a step is its name, and the marks around it."""
    took: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(MISSES):
        notes.clear()
        mark("call begins")
        ask(f"{number}:{time.time()}")
        mark("call ends")
        here = dict(notes)
        found: Any = client.blpop([MARKS], 10)
        there = {f"worker {name}": at for name, at in json.loads(found[1]).items()}
        for name, begins, ends in names if number > MISSES // 10 else ():
            every = {**here, **there}
            took[name].append((every[ends] - every[begins]) * 1e3)
    return {name: statistics.median(each) for name, each in took.items()}


MISS = [
    ("the key, GET", "call begins", "Get ends"),
    ("acquire", "Get ends", "Acquire ends"),
    ("to the thread that sends", "Acquire ends", "publish begins"),
    ("the message, by Celery, to its worker", "publish begins", "worker Claim begins"),
    ("claim", "worker Claim begins", "worker Claim ends"),
    ("the task", "worker Claim ends", "worker Settle begins"),
    ("settle, and its notice to the caller", "worker Settle begins", "call ends"),
    ("all", "call begins", "call ends"),
    ("(beside the worker: confirm)", "Confirm begins", "Confirm ends"),
]
PLAIN = [
    ("delay, until it sends", "call begins", "publish begins"),
    ("the message, by Celery, to its worker", "publish begins", "worker runs"),
    ("the result backend, to the caller", "worker runs", "call ends"),
    ("all", "call begins", "call ends"),
]


def parts_of_a_local_hit(value: Any) -> dict[str, float]:
    """Return the microseconds of each part, the least of several rounds: the parts are what others disturb most."""
    task: Any = memolocked_task(ttl=600, app=app, name="benchmarks.where.local", local_ttl=600)(empty)
    task.set_cached(value, "q1")
    while task.memo.kept(("q1",), {}) is MISSING:
        task.get_cached("q1")
    memo, real = task.memo, task._get_current_object()
    key, local = memo._maker.keys(("q1",), {}).entry, memo._near
    parts = {
        "all: get_cached": lambda: task.get_cached("q1"),
        "the same, past Celery's proxy of the task": lambda: real.get_cached("q1"),
        "the key": lambda: memo._maker.keys(("q1",), {}),
        "the look: lock, LRU order, times": lambda: local.get(key),
        "the decoding": (lambda: memo.codec.unpack(found)) if type(found := local.get(key)) is Entry else lambda: found,
        "(a call of nothing, in each of these)": lambda: None,
    }
    return {name: min(timeit.repeat(part, number=20_000, repeat=15)) / 20_000 * 1e6 for name, part in parts.items()}


def main() -> None:
    with serve_or_use() as url:
        app.conf.update(broker_url=url, result_backend=url, memolock_redis_url=url)
        with redis.Redis.from_url(url) as client, celery_worker(app, url, "-c", "1", "-P", "threads"):
            note_all(client)
            for title, ask, names in (
                ("get_cached", memolocked.get_cached, MISS),
                ("task.delay().get()", lambda key: plain.delay(key).get(timeout=30), PLAIN),
            ):
                print(title)
                for name, took in steps_of(client, ask, names).items():
                    print(f"  {name:40} {took:5.2f} ms")
            for title, value in VALUES.items():
                print(f"a hit in this process, {title}")
                for name, took in parts_of_a_local_hit(value).items():
                    print(f"  {name:45} {took:5.2f} microseconds")


if __name__ == "__main__":
    main()
elif URL:
    note_all(redis.Redis.from_url(URL))
