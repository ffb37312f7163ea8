"""What all measurements share: the record of the machine and the versions, ratios, and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import redis
from celery import Celery

__all__ = ["arguments", "celery_worker", "percentile", "program", "record", "server_seconds", "spread"]

_PACKAGES = (
    *("celery-memolock", "celery", "kombu", "redis", "hiredis"),
    *("aiocache", "cachetools", "cashews", "celery-singleton", "dogpile.cache", "python-redis-lock", "rq"),
)


def arguments(doc: str | None, **defaults: int) -> argparse.Namespace:
    """Parse ``--json FILE`` and a whole number for each default."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    return parser.parse_args()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the least, the median and the greatest of some values."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def percentile(values: Sequence[float], fraction: float) -> float:
    """Return the value below which that fraction of the others lies."""
    return sorted(values)[min(len(values) - 1, int(len(values) * fraction))]


@contextmanager
def program(url: str, *command: str) -> Iterator[psutil.Process]:
    """Run ``python -m command`` as long as the block takes; it finds the server's address in BENCHMARK_URL."""
    with tempfile.NamedTemporaryFile("w+") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", *command], env={**os.environ, "BENCHMARK_URL": url}, stdout=log, stderr=log
        )
        try:
            yield psutil.Process(running.pid)
        except BaseException:
            sys.stderr.write(Path(log.name).read_text()[-4000:])
            raise
        finally:
            running.terminate()
            running.wait()


@contextmanager
def celery_worker(app: Celery, url: str, *options: str) -> Iterator[psutil.Process]:
    """Run a real worker of an app whose module is a benchmark, until the block is over."""
    with program(url, "celery", "-A", str(app.main), "worker", "-l", "WARNING", *options) as worker:
        deadline = time.monotonic() + 90
        while not app.control.ping(timeout=0.5):
            assert time.monotonic() < deadline, "the worker did not start"
        yield worker


def server_seconds(client: redis.Redis) -> float:
    """Return how much processor time the server has used so far."""
    used: Any = client.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


def record(name: str, url: str, results: Any, args: argparse.Namespace) -> None:
    """Print the figures, and write them with what they were measured on."""
    with redis.Redis.from_url(url) as client:
        info = client.info("server")
    report = {
        "benchmark": name,
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.{name} "
        + " ".join(f"--{key} {value}" for key, value in vars(args).items() if key != "json" and value != ""),
        "machine": {"processors": os.cpu_count(), "system": platform.system(), "architecture": platform.machine()},
        "versions": {
            "python": platform.python_version(),
            "server": f"{'valkey ' + info['valkey_version'] if 'valkey_version' in info else info['redis_version']}",
            **{package: _version(package) for package in _PACKAGES},
        },
        "results": results,
    }
    text = json.dumps(report, indent=2)
    sys.stdout.write(text + "\n")
    if args.json:
        args.json.write_text(text + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
