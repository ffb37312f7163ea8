"""Run a storm for a time, with random faults at a rate, and report what the witness saw.

Callers, invalidations and workers are real processes; the faults are real signals to them, to the store's server and
to the broker's. The witness keeps its records on a server of its own. Whatever stands under "violations" must be 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import redis

from benchmarks.chaos.broken import MUTANTS
from benchmarks.harness import record, spread
from celery_memolock.server import Server

VIOLATIONS = (
    "overlapping runs of one (fence, attempt)",
    "stale answers",
    "wrong values",
    "hung callers",
    "leaked rooms",
    "leaked keys",
)


class Storm:
    """Three servers, two workers, and the faults that strike them."""

    def __init__(self, stack: ExitStack, args: argparse.Namespace) -> None:
        self.random = random.Random(args.seed)
        self.store = stack.enter_context(Server())
        self.broker = stack.enter_context(Server(options={"save": "", "appendonly": "no"}))
        self.witness = redis.Redis.from_url(stack.enter_context(Server()).url, decode_responses=True)
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kwargs = self.witness.connection_pool.connection_kwargs
        self.environment = {
            **os.environ,
            "CHAOS_STORE": self.store.url,
            "CHAOS_BROKER": self.broker.url,
            "CHAOS_WITNESS": f"redis://{kwargs['host']}:{kwargs['port']}/0",
            "CHAOS_BREAK": args.broken,
            "CHAOS_ACKS": args.acks,
        }
        os.environ.update(self.environment)
        self.workers = [self.start_worker(number) for number in range(2)]
        stack.callback(self.stop_workers)

    def start_worker(self, number: int) -> subprocess.Popen[bytes]:
        command = "celery -A benchmarks.chaos.tasks worker --concurrency 2 --loglevel WARNING --hostname"
        with (self.folder / f"worker{number}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *command.split(), f"w{number}@storm"],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop_workers(self) -> None:
        for worker in self.workers:
            signal_group(worker, signal.SIGKILL)
            worker.wait()

    def children(self) -> list[int]:
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", ",".join(str(worker.pid) for worker in self.workers)],
            capture_output=True,
            text=True,
        )
        return [int(pid) for pid in found.stdout.split()]

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.store.url, socket_timeout=5)

    def revive(self, number: int) -> None:
        worker = self.workers[number]
        signal_group(worker, signal.SIGKILL)
        worker.wait()
        self.workers[number] = self.start_worker(number)

    # ---- the faults, each named as the report names it

    def worker_child_killed(self) -> None:
        if children := self.children():
            send(self.random.choice(children), signal.SIGKILL)

    def worker_main_killed(self) -> None:
        number = self.random.randrange(2)
        self.workers[number].kill()
        time.sleep(0.5)
        self.revive(number)

    def worker_tree_killed(self) -> None:
        self.revive(self.random.randrange(2))

    def worker_restarted_warm(self) -> None:
        number = self.random.randrange(2)
        self.workers[number].terminate()
        try:
            self.workers[number].wait(10)
        except subprocess.TimeoutExpired:
            pass
        self.revive(number)

    def worker_child_frozen(self) -> None:
        if children := self.children():
            child = self.random.choice(children)
            send(child, signal.SIGSTOP)
            time.sleep(self.random.uniform(0.5, 3.0))
            send(child, signal.SIGCONT)

    def store_frozen(self) -> None:
        self.store.freeze()
        time.sleep(self.random.uniform(0.2, 2.0))
        self.store.thaw()

    def store_restarted_empty(self) -> None:
        self.store.kill()
        time.sleep(self.random.uniform(0.0, 1.0))
        self.store.restart()

    def store_flushed(self) -> None:
        self.client().flushall()

    def scripts_flushed(self) -> None:
        self.client().script_flush()

    def notices_cut(self) -> None:
        self.client().execute_command("CLIENT", "KILL", "TYPE", "pubsub")

    def links_cut(self) -> None:
        self.client().execute_command("CLIENT", "KILL", "TYPE", "normal")

    def broker_frozen(self) -> None:
        self.broker.freeze()
        time.sleep(self.random.uniform(0.2, 3.0))
        self.broker.thaw()

    def broker_restarted_empty(self) -> None:
        self.broker.kill()
        self.broker.restart()

    def messages_purged(self) -> None:
        redis.Redis.from_url(self.broker.url, socket_timeout=5).delete("celery")

    def faults(self) -> dict[str, Callable[[], None]]:
        names = (
            "worker_child_killed worker_main_killed worker_tree_killed worker_restarted_warm worker_child_frozen "
            "store_frozen store_restarted_empty store_flushed scripts_flushed notices_cut links_cut broker_frozen "
            "broker_restarted_empty messages_purged"
        )
        return {name.replace("_", " "): getattr(self, name) for name in names.split()}


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def recovery(attempt: int) -> float:
    """Ask for a value nobody asked for before until it comes: store, broker, worker and notices work again."""
    from benchmarks.chaos.tasks import SourceDown, value
    from celery_memolock import MemoLockError

    began = time.monotonic()
    while True:
        try:
            value.with_options(wait_timeout=5).get_cached(f"probe{attempt}:{time.monotonic()}")
        except (MemoLockError, SourceDown):
            time.sleep(0.02)
        else:
            return time.monotonic() - began


def judge(storm: Storm) -> dict[str, int]:
    """Count what must never happen."""
    counts = dict.fromkeys(VIOLATIONS, 0)
    counts.update({name: int(count) for name, count in storm.witness.hgetall("violations").items()})
    runs = Counter((fence, attempt) for _, fence, attempt, *_ in map(json.loads, storm.witness.lrange("runs", 0, -1)))
    counts["overlapping runs of one (fence, attempt)"] = sum(count - 1 for count in runs.values())
    store = storm.client()
    counts["leaked keys"] = sum(store.pttl(key) < 0 for key in store.scan_iter("memolock:*"))
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the storm lasts (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.5, help="faults a second at the most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="web processes (default: %(default)s)")
    parser.add_argument("--acks", choices=["early", "late"], default="early", help="default: %(default)s")
    parser.add_argument("--broken", choices=["", *sorted(MUTANTS)], default="", help="run a deliberately broken build")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    args = parser.parse_args()

    with ExitStack() as stack:
        storm = Storm(stack, args)
        recovery(0)  # the workers are up
        crowd = [
            subprocess.Popen([sys.executable, "-m", "benchmarks.chaos.caller", str(args.seconds), str(seed)])
            for seed in range(args.seed * 1000, args.seed * 1000 + args.processes)
        ]
        stack.callback(lambda: [process.kill() for process in crowd])
        faults = storm.faults()
        struck: dict[str, list[float]] = defaultdict(list)
        end = time.monotonic() + args.seconds
        while time.monotonic() < end:
            time.sleep(storm.random.uniform(0.5, 1.5) / args.rate if args.rate else end - time.monotonic())
            if time.monotonic() < end and args.rate:
                name = storm.random.choice(sorted(faults))
                faults[name]()
                struck[name].append(recovery(len(struck[name])))
        for process in crowd:
            process.wait()
        violations = judge(storm)
        results = {
            "violations": violations,
            "faults": {name: len(times) for name, times in sorted(struck.items())},
            "recovery seconds": {name: spread(times) for name, times in sorted(struck.items())},
            "runs": storm.witness.llen("runs"),
            "calls": {name: int(count) for name, count in sorted(storm.witness.hgetall("counts").items())},
            "messages": storm.witness.lrange("messages", 0, 20),
        }
        record("chaos", storm.store.url, results, args)
    return 1 if any(violations.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
