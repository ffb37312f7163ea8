"""Runs the three modes one after the other, on the same load and the same database."""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import MemoLockError
from . import witness
from .database import Database
from .processes import started

__all__ = ["MODES", "DemoFailed", "Outcome", "Progress", "run"]

MODES = ("none", "ttl", "memolock")
THREADS = 64

#: What happens when, as parts of a mode's time: 500 are let in, and the second heavy query begins.
LET_IN, SLOWED = 1 / 3, 2 / 3

Progress = Callable[[str, dict[str, int], float], None]


class DemoFailed(MemoLockError):
    """A process of the demo did not come up; the message has the end of its log."""


@dataclass(frozen=True)
class Outcome:
    """What one mode came to; times are seconds from its beginning."""

    mode: str
    seconds: float
    requests: list[tuple[float, float, bool]]
    queries: list[witness.Query]

    def figures(self) -> dict[str, float]:
        """Return what the report and the JSON show."""
        took = sorted(took for _, took, fine in self.requests if fine) or [0.0]
        cuts = statistics.quantiles(took, n=100, method="inclusive") if len(took) > 1 else took * 99
        return {
            "requests": len(self.requests),
            "errors": sum(not fine for *_, fine in self.requests),
            "queries": len(self.queries),
            "max_concurrent_queries": witness.most_at_once(self.queries),
            "p50_ms": round(cuts[49] * 1e3, 1),
            "p95_ms": round(cuts[94] * 1e3, 1),
            "p99_ms": round(cuts[98] * 1e3, 1),
        }


def run(
    database: Database, redis_url: str, users: int, seconds: float, processes: int, progress: Progress
) -> Iterator[Outcome]:
    """Run each mode for a third of the time, and yield what it came to."""
    for mode in MODES:
        database.reset()
        with tempfile.TemporaryDirectory(prefix="memolock-demo-") as folder:
            yield _run_mode(mode, database, redis_url, users, seconds / len(MODES), processes, progress, Path(folder))


def _run_mode(
    mode: str,
    database: Database,
    redis_url: str,
    users: int,
    seconds: float,
    processes: int,
    progress: Progress,
    folder: Path,
) -> Outcome:
    environment = {
        **os.environ,
        "MEMOLOCK_DEMO_DATABASE": database.url,
        "MEMOLOCK_DEMO_REDIS": redis_url,
        "MEMOLOCK_DEMO_MODE": mode,
        "MEMOLOCK_DEMO_PREFIX": f"memolock-demo-{uuid.uuid4().hex[:8]}",
        "MEMOLOCK_DEMO_RECORDS": str(folder),
    }
    with ExitStack() as stack:
        if mode == "memolock":
            worker = "-m celery -A celery_memolock.demo.page:celery_app worker --concurrency 2 --loglevel WARNING"
            flags = "--without-gossip --without-mingle --without-heartbeat"
            stack.enter_context(
                started([sys.executable, *worker.split(), *flags.split()], environment, folder / "worker.log")
            )
        site = stack.enter_context(_site(environment, processes, folder))
        # One visit warms up each mode, and in memolock mode waits for the worker to be there.
        _get(f"{site}/queue/warm-up?user=0", folder)
        for file in folder.glob("*.queries"):
            file.unlink()
        began = time.monotonic()
        command = [sys.executable, "-m", "celery_memolock.demo.load", site, str(users), str(seconds), str(folder)]
        load = stack.enter_context(started(command, environment, folder / "load.log", pipe=True))
        stack.enter_context(_later(began + seconds * LET_IN, database.admit))
        stack.enter_context(_later(began + seconds * SLOWED, _slow_until(database, began + seconds)))
        assert load.stdout is not None
        for line in load.stdout:
            progress(mode, json.loads(line), min(1.0, (time.monotonic() - began) / seconds))
        if load.wait():
            raise DemoFailed("the visitors stopped:\n" + _tail(folder / "load.log"))
    requests = json.loads((folder / "requests.json").read_text())
    return Outcome(
        mode,
        seconds,
        [(at - began, took, fine) for at, took, fine in requests],
        [witness.Query(query.key, query.began - began, query.ended - began) for query in witness.read(folder)],
    )


@contextmanager
def _site(environment: dict[str, str], processes: int, folder: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listening:
        site = f"http://127.0.0.1:{listening.getsockname()[1]}"
        flags = f"-m gunicorn --workers {processes} --threads {THREADS} --bind fd://{listening.fileno()}"
        command = [sys.executable, *flags.split(), "--no-control-socket", "celery_memolock.demo.page:app"]
        with started(command, environment, folder / "web.log", pass_fds=[listening.fileno()]) as web:
            while True:
                try:
                    _get(f"{site}/health", folder)
                    break
                except OSError:
                    if web.poll() is not None:
                        raise DemoFailed("the web server did not start:\n" + _tail(folder / "web.log")) from None
            yield site


def _get(url: str, folder: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        logs = "".join(_tail(folder / name) for name in ("web.log", "worker.log"))
        raise DemoFailed(f"{url} answered {error.code}:\n{logs}") from None


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-20:]) if log.exists() else ""


@contextmanager
def _later(at: float, act: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(max(0.0, at - time.monotonic()), act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _slow_until(database: Database, end: float) -> Callable[[], None]:
    def slow() -> None:
        while time.monotonic() < end:
            database.report()

    return slow
