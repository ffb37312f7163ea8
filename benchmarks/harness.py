"""What all measurements share: the record of the machine and the versions, ratios, and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import redis

__all__ = ["arguments", "record", "spread"]

_PACKAGES = ("celery-memolock", "celery", "kombu", "redis", "hiredis")


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
