"""What a worker and an idle web process pay: for the hooks of a task, the heartbeat of runs, the listener."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import psutil
import redis
from celery import Celery

from benchmarks.harness import arguments, celery_worker, record, server_seconds, spread
from celery_memolock import memolocked_task
from celery_memolock.server import serve_or_use

URL = os.environ.get("BENCHMARK_URL", "")
LEASE = 3.0
RUNS = 50
DONE = "done"

app = Celery("benchmarks.overhead", broker=URL)
app.conf.memolock_redis_url = URL


def empty(key: str) -> str:
    return key


def long(seconds: float, number: int) -> None:
    time.sleep(seconds)
    with redis.Redis.from_url(URL) as client:
        client.incr(DONE)


plain: Any = app.task(name="benchmarks.overhead.plain", ignore_result=True)(empty)
memolocked = memolocked_task(ttl=60, app=app, name="benchmarks.overhead.memolocked", ignore_result=True)(empty)
plain_long: Any = app.task(name="benchmarks.overhead.plain_long", ignore_result=True)(long)
held = memolocked_task(ttl=60, lease=LEASE, app=app, name="benchmarks.overhead.held")(long)


def used_by(worker: psutil.Process) -> float:
    """Return the processor seconds of a worker, with its children."""
    times = [process.cpu_times() for process in [worker, *worker.children(recursive=True)]]
    return sum(each.user + each.system for each in times)


def of_tasks(url: str, rounds: int, calls: int) -> dict[str, Any]:
    """Measure what a worker uses for an empty task: sent as ever, or as a flight."""
    client = redis.Redis.from_url(url)
    ways: dict[str, Callable[[str], Any]] = {
        "a Celery task": plain.delay,
        "the same, memolocked, by .delay()": memolocked.delay,
        "a flight": memolocked.refresh,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    with celery_worker(app, url, "-c", "1") as worker:
        for number in range(rounds + 1):
            for name in random.sample(sorted(ways), len(ways)):
                before = used_by(worker)
                for call in range(calls):
                    ways[name](f"{name} {number} {call}")
                settled(client, worker)
                if number:  # the first round makes connections
                    found[name].append((used_by(worker) - before) / calls * 1e6)
    return {name: spread(each) for name, each in found.items()}


def settled(client: redis.Redis, worker: psutil.Process) -> None:
    """Return when the queue is empty and the worker rests."""
    while client.llen("celery"):
        time.sleep(0.05)
    before = -1.0
    while (now := used_by(worker)) - before > 0.02:
        before = now
        time.sleep(0.5)


def of_heartbeat(url: str, rounds: int, seconds: int) -> list[dict[str, Any]]:
    """Measure what the renewal of many leases costs: tasks that only sleep, plain and as flights."""
    client: Any = redis.Redis.from_url(url)
    ways: dict[str, Callable[[int], Any]] = {
        "Celery tasks": lambda number: plain_long.delay(seconds, number),
        "flights": lambda number: held.refresh(seconds, number),
    }
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ways}
    with celery_worker(app, url, "-c", str(RUNS), "-P", "threads") as worker:
        for number in range(rounds):
            for name in random.sample(sorted(ways), len(ways)):
                client.delete(DONE)
                for run in range(RUNS):
                    ways[name](number * RUNS + run)
                time.sleep(1)  # all run, and have been claimed
                began = used_by(worker), server_seconds(client), client.info("stats")["total_commands_processed"]
                time.sleep(seconds - 2)
                ended = used_by(worker), server_seconds(client), client.info("stats")["total_commands_processed"]
                while int(client.get(DONE) or 0) < RUNS:
                    time.sleep(0.05)
                worker_used, server_used, commands = (
                    (b - a) / (seconds - 2) for a, b in zip(began, ended, strict=True)
                )
                found[name]["worker CPU ms per second"].append(worker_used * 1e3)
                found[name]["server CPU ms per second"].append(server_used * 1e3)
                found[name]["commands per second, with those of scripts"].append(commands)
    return [
        {"running": f"{RUNS} {name}", "lease seconds": LEASE, **{what: spread(each) for what, each in figures.items()}}
        for name, figures in found.items()
    ]


IDLE = """
import os, resource, sys, threading, time
from celery import Celery
import redis
app = Celery("idle", broker=sys.argv[1])
app.conf.memolock_redis_url = sys.argv[1]
redis.Redis.from_url(sys.argv[1]).get("x")
if sys.argv[2] != "no memolock":
    from celery_memolock import memolocked_task
    options = {"local_ttl": 60} if sys.argv[2] == "local cache" else {}
    @memolocked_task(ttl=600, app=app, **options)
    def queue_size(key): ...
    if sys.argv[2] != "imported":
        queue_size.set_cached(1, "q1")
        assert queue_size.get_cached("q1") == 1
    if sys.argv[2] == "has waited":
        try:
            queue_size.with_options(wait_timeout=0.2).get_cached("q2")
        except TimeoutError:
            pass
time.sleep(1)
before = time.process_time()
time.sleep(float(sys.argv[3]))
used = (time.process_time() - before) / float(sys.argv[3])
with open("/proc/self/statm") as file:
    resident = int(file.read().split()[1]) * resource.getpagesize()
print(used * 1e3, threading.active_count(), resident / 1e6)
"""


def of_idling(url: str, rounds: int, seconds: int) -> list[dict[str, Any]]:
    """Measure an idle web process, with more and more of the library at work."""
    states = ["no memolock", "imported", "has hit", "has waited", "local cache"]
    found: dict[str, list[tuple[float, ...]]] = {state: [] for state in states}
    for _ in range(rounds):
        running = {
            state: subprocess.Popen(
                [sys.executable, "-c", IDLE, url, state, str(seconds)], stdout=subprocess.PIPE, text=True
            )
            for state in states
        }
        for state, process in running.items():
            text, _ = process.communicate()
            found[state].append(tuple(map(float, text.split())))
    return [
        {
            "state": state,
            "CPU ms per second": spread([each[0] for each in figures]),
            "threads": int(figures[0][1]),
            "resident MB": spread([each[2] for each in figures]),
        }
        for state, figures in found.items()
    ]


def main() -> None:
    args = arguments(__doc__, rounds=5, calls=1000, seconds=8)
    with serve_or_use() as url:
        app.conf.update(broker_url=url, memolock_redis_url=url)
        results = {
            "worker CPU microseconds per task": of_tasks(url, args.rounds, args.calls),
            "heartbeat": of_heartbeat(url, args.rounds, args.seconds),
            "idle web process": of_idling(url, args.rounds, args.seconds),
        }
        record("overhead", url, results, args)


if __name__ == "__main__":
    main()
