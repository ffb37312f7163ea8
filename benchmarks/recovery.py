"""How long it takes from each fault to the answer: the chaos tests, run several times, with what they measured.

Each test injects one fault and notes when whoever waited had an answer; docs/faults.md shows the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks.harness import arguments, record, spread
from celery_memolock.server import Server


def main() -> int:
    args = arguments(__doc__, rounds=3)
    with tempfile.TemporaryDirectory() as folder, Server() as server:
        measured = Path(folder) / "measured"
        measured.touch()
        for _ in range(args.rounds):
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-m", "chaos", "tests", "--ignore", "tests/chaos/test_storm.py"],
                env={**os.environ, "MEMOLOCK_RECOVERY": str(measured)},
                stdout=sys.stderr,
            )
            if done.returncode:
                return done.returncode
        seconds: dict[str, list[float]] = defaultdict(list)
        tests: dict[str, set[str]] = defaultdict(set)
        for line in map(json.loads, measured.read_text().splitlines()):
            seconds[line["fault"]].append(line["seconds"])
            tests[line["fault"]].add(line["test"].split("[")[0])
        results = {
            fault: {"seconds": spread(values), "times": len(values), "tests": sorted(tests[fault])}
            for fault, values in sorted(seconds.items())
        }
        record("recovery", server.url, results, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
