"""Run a storm for a time, with random faults at a rate, and report what the witness saw.

Callers, invalidations and workers are real processes; the faults are real signals to them and to the servers, commands
of an operator, and links that fail. The witness keeps its records on a server of its own. Whatever stands under
"violations" must be 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path

from benchmarks.chaos.broken import NAMES
from benchmarks.chaos.storm import FAULTS, Storm
from benchmarks.harness import record, spread

VIOLATIONS = (
    "overlapping runs of one (fence, attempt)",
    "stale answers",
    "wrong values",
    "hung callers",
    "leaked rooms",
    "leaked keys",
)


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
    counts["leaked keys"] = sum(store.pttl(key) == -1 for key in store.scan_iter("memolock:*"))
    return counts


def percentiles(values: list[float]) -> dict[str, float]:
    """Return what half of the values, all but a hundredth, and all of them stay below."""
    values.sort()
    return {"p50": values[len(values) // 2], "p99": values[len(values) * 99 // 100], "max": values[-1]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the storm lasts (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.5, help="faults a second at the most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="web processes (default: %(default)s)")
    parser.add_argument("--acks", choices=["early", "late"], default="early", help="default: %(default)s")
    parser.add_argument(
        "--broker", default="", help="URL of a broker that is the storm's alone (default: an own Redis)"
    )
    parser.add_argument("--fault", choices=["", *FAULTS], default="", help="only this one")
    parser.add_argument("--broken", choices=["", *sorted(NAMES)], default="", help="run a deliberately broken build")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    args = parser.parse_args()

    with ExitStack() as stack:
        storm = Storm(stack, args)
        recovery(0)  # the workers are up
        storm.let_callers_in(args.processes, args.seconds)
        names = [name for name in FAULTS if args.fault in ("", name)]
        if storm.broker is None:
            names = [name for name in names if name not in ("broker frozen", "broker restarted empty")]
        struck: dict[str, list[float]] = defaultdict(list)
        while time.monotonic() < storm.end:
            time.sleep(storm.random.uniform(0.5, 1.5) / args.rate if args.rate else args.seconds)
            if time.monotonic() < storm.end and args.rate:
                name = storm.random.choice(names)
                FAULTS[name](storm)
                struck[name].append(recovery(len(struck[name])))
        for process in storm.callers:
            process.wait()
        violations = judge(storm)
        results = {
            "violations": violations,
            "faults": {name: len(times) for name, times in sorted(struck.items())},
            "recovery seconds": {name: spread(times) for name, times in sorted(struck.items())},
            "runs": storm.witness.llen("runs"),
            "calls": {name: int(count) for name, count in sorted(storm.witness.hgetall("counts").items())},
            "seconds of a call": percentiles([float(took) for took in storm.witness.lrange("took", 0, -1)]),
            "messages": storm.witness.lrange("messages", 0, 20),
        }
        record("chaos", storm.store.url, results, args)
    return 1 if any(violations.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
