"""What a storm strikes, real processes all of them, and the faults that strike it."""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import redis
from celery import Celery

from celery_memolock.server import Server
from celery_memolock.testing import Link

__all__ = ["FAULTS", "Storm"]


class Storm:
    """A store and a broker, two workers and some callers, all joined by links that can fail; and the witness's server.

    Args:
        stack: what is started is stopped with it.
        args: of the command line.
    """

    def __init__(self, stack: ExitStack, args: argparse.Namespace) -> None:
        self.random = random.Random(args.seed)
        self.seed = args.seed * 1000
        self.store = stack.enter_context(Server())
        self.broker = None if args.broker else stack.enter_context(Server())
        broker = self.broker.url if self.broker else args.broker
        self.caller_link, self.worker_link = (stack.enter_context(Link(self.store.url)) for _ in range(2))
        # An operator's commands take a way that no fault of a link concerns.
        self.operator = Celery("operator", broker=broker, set_as_current=False)
        self.operator.conf.broker_pool_limit = 0
        self.broker_link = stack.enter_context(Link(broker))
        witness = stack.enter_context(Server()).url
        self.witness = redis.Redis.from_url(witness, decode_responses=True)
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # This process asks too, as a caller does: to see that all works again.
        os.environ.update(
            CHAOS_STORE=self.caller_link.url,
            CHAOS_BROKER=self.broker_link.url,
            CHAOS_WITNESS=witness,
            CHAOS_BREAK=args.broken,
        )
        self.workers = [self._start_worker(number) for number in range(2)]
        self.callers: list[subprocess.Popen[bytes]] = []
        stack.callback(self._stop)

    def let_callers_in(self, processes: int, seconds: float) -> None:
        """Start the callers, for so many seconds."""
        self.end = time.monotonic() + seconds
        self.callers = [self._start_caller() for _ in range(processes)]

    def client(self) -> redis.Redis:
        """Return a client of the store that no link's fault concerns."""
        return redis.Redis.from_url(self.store.url, socket_timeout=5)

    def _start_worker(self, number: int) -> subprocess.Popen[bytes]:
        command = "celery -A benchmarks.chaos.tasks worker --concurrency 2 --loglevel WARNING --hostname"
        with (self.folder / f"worker{number}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *command.split(), f"w{number}@storm"],
                env={
                    **os.environ,
                    "CHAOS_STORE": self.worker_link.url,
                    "CHAOS_ACKS": self.random.choice(["early", "late"]),
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _start_caller(self) -> subprocess.Popen[bytes]:
        self.seed += 1
        seconds = max(0.0, self.end - time.monotonic())
        driver = ("threads", "asyncio")[self.seed % 2]
        command = ["-m", "benchmarks.chaos.caller", str(seconds), str(self.seed), driver]
        return subprocess.Popen([sys.executable, *command])

    def _stop(self) -> None:
        for process in self.workers:
            _signal_group(process, signal.SIGKILL)
        for process in self.callers:
            process.kill()
        for process in (*self.workers, *self.callers):
            process.wait()

    def _revive(self, number: int) -> None:
        worker = self.workers[number]
        _signal_group(worker, signal.SIGKILL)
        worker.wait()
        self.workers[number] = self._start_worker(number)

    def _children(self) -> list[int]:
        mains = {worker.pid for worker in self.workers}
        return [each.pid for each in psutil.process_iter(["ppid"]) if each.info["ppid"] in mains]

    def _any_worker(self) -> int:
        return self.random.randrange(len(self.workers))

    def _pause(self, least: float, most: float) -> None:
        time.sleep(self.random.uniform(least, most))

    # ---- workers

    def worker_child_killed(self) -> None:
        """SIGKILL to a process of a pool."""
        if children := self._children():
            _send(self.random.choice(children), signal.SIGKILL)

    def worker_main_killed(self) -> None:
        """SIGKILL to the main process of a worker alone; its children go by themselves."""
        number = self._any_worker()
        self.workers[number].kill()
        time.sleep(0.5)
        self._revive(number)

    def worker_tree_killed(self) -> None:
        """SIGKILL to a worker and all its children."""
        self._revive(self._any_worker())

    def worker_restarted_warm(self) -> None:
        """SIGTERM: it ends its runs first."""
        self._restart_worker(signal.SIGTERM)

    def worker_restarted_cold(self) -> None:
        """SIGQUIT: it drops its runs."""
        self._restart_worker(signal.SIGQUIT)

    def _restart_worker(self, number: signal.Signals) -> None:
        worker = self._any_worker()
        self.workers[worker].send_signal(number)
        try:
            self.workers[worker].wait(10)
        except subprocess.TimeoutExpired:
            pass
        self._revive(worker)

    def worker_child_frozen(self) -> None:
        """SIGSTOP for up to three leases, then SIGCONT: it settles what others have taken over."""
        if children := self._children():
            child = self.random.choice(children)
            _send(child, signal.SIGSTOP)
            self._pause(0.5, 3.0)
            _send(child, signal.SIGCONT)

    def worker_tree_frozen(self) -> None:
        """The same for a whole worker, which also holds messages."""
        worker = self.workers[self._any_worker()]
        _signal_group(worker, signal.SIGSTOP)
        self._pause(0.5, 3.0)
        _signal_group(worker, signal.SIGCONT)

    def run_revoked(self) -> None:
        """Revoke what runs, and kill its process."""
        control = self.operator.control
        for active in (control.inspect(timeout=1).active() or {}).values():
            for task in active[:1]:
                control.revoke(task["id"], terminate=True, signal="SIGKILL")
                return

    # ---- the store

    def store_frozen(self) -> None:
        """SIGSTOP to the server."""
        self.store.freeze()
        self._pause(0.2, 2.0)
        self.store.thaw()

    def store_paused(self) -> None:
        """CLIENT PAUSE."""
        seconds = self.random.uniform(0.2, 2.0)
        self.client().execute_command("CLIENT", "PAUSE", int(seconds * 1000), "ALL")
        time.sleep(seconds)

    def store_restarted_empty(self) -> None:
        """SIGKILL, and a new one without data."""
        self.store.kill()
        self._pause(0.0, 1.0)
        self.store.restart()

    def store_flushed(self) -> None:
        """FLUSHALL."""
        self.client().flushall()

    def scripts_flushed(self) -> None:
        """SCRIPT FLUSH."""
        self.client().script_flush()

    def store_full(self) -> None:
        """No memory for any write."""
        self._setting("maxmemory", "1", "0")

    def store_without_replicas(self) -> None:
        """NOREPLICAS for each write."""
        self._setting("min-replicas-to-write", "1", "0")

    def _setting(self, name: str, bad: str, good: str) -> None:
        client = self.client()
        client.config_set(name, bad)
        self._pause(0.5, 2.0)
        client.config_set(name, good)

    def store_read_only(self) -> None:
        """A replica of nobody: READONLY for each write."""
        client = self.client()
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        self._pause(0.5, 2.0)
        client.execute_command("REPLICAOF", "NO", "ONE")

    # ---- links

    def notices_cut(self) -> None:
        """CLIENT KILL TYPE pubsub."""
        self.client().execute_command("CLIENT", "KILL", "TYPE", "pubsub")

    def links_cut(self) -> None:
        """CLIENT KILL TYPE normal."""
        self.client().execute_command("CLIENT", "KILL", "TYPE", "normal")

    def callers_cut_off(self) -> None:
        """No way from the callers to the store."""
        self._cut_off(self.caller_link)

    def callers_deaf(self) -> None:
        """Connections of the callers that carry nothing in one direction or both, and break in the end."""
        self._deaf(self.caller_link)

    def callers_slow(self) -> None:
        """A slow link between callers and store."""
        with self.caller_link.slow(0.1):
            self._pause(0.5, 2.0)

    def callers_lose_replies(self) -> None:
        """Commands of callers are run, and their replies lost; the client sends them again."""
        self._lose_replies(self.caller_link)

    def workers_cut_off(self) -> None:
        """No way from the workers to the store."""
        self._cut_off(self.worker_link)

    def workers_deaf(self) -> None:
        """As for callers."""
        self._deaf(self.worker_link)

    def workers_lose_replies(self) -> None:
        """As for callers."""
        self._lose_replies(self.worker_link)

    def _cut_off(self, link: Link) -> None:
        with link.cut():
            self._pause(0.2, 3.0)

    def _deaf(self, link: Link) -> None:
        with link.deaf(self.random.choice(["replies", "commands", "both"])):
            self._pause(0.2, 3.0)
            link.drop()

    def _lose_replies(self, link: Link) -> None:
        with link.cut_reply(self.random.randint(1, 10), b"EVALSHA") as fault:
            fault.wait(timeout=2)

    # ---- the broker

    def broker_frozen(self) -> None:
        """SIGSTOP to the broker's server."""
        if self.broker:
            self.broker.freeze()
            self._pause(0.2, 3.0)
            self.broker.thaw()

    def broker_restarted_empty(self) -> None:
        """SIGKILL, and a new one without messages."""
        if self.broker:
            self.broker.kill()
            self.broker.restart()

    def broker_cut_off(self) -> None:
        """No way to the broker, for anybody."""
        self._cut_off(self.broker_link)

    def broker_deaf(self) -> None:
        """As for callers."""
        self._deaf(self.broker_link)

    def messages_purged(self) -> None:
        """Whatever is queued is gone."""
        self.operator.control.purge()

    # ---- callers

    def caller_killed(self) -> None:
        """SIGKILL to a web process, which another one replaces."""
        number = self.random.randrange(len(self.callers))
        self.callers[number].kill()
        self.callers[number].wait()
        self.callers[number] = self._start_caller()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


#: By the name that the report gives them. The first argument is the storm.
FAULTS: dict[str, Callable[[Storm], None]] = {
    name.replace("_", " "): fault
    for name, fault in vars(Storm).items()
    if callable(fault) and not name.startswith("_") and name not in ("let_callers_in", "client")
}
