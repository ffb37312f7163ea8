"""The table of faults: every test that it names is there, and every figure is the one that was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "faults.md").read_text()


def test_the_tests_are_there() -> None:
    """No row rests on a test that was renamed or is gone."""
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE))
    assert len(named) > 50
    for file, test in named:
        found = "".join(path.read_text() for path in (ROOT / "tests").glob(f"*/{file}"))
        assert f"\ndef {test}(" in found, f"{file}::{test}"


def test_the_figures_were_measured() -> None:
    """A cell shows what `python -m benchmarks.recovery` found for its test, and each that was measured is shown."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "recovery.json").read_text())["results"]
    shown = 0
    for cell in (cell for row in PAGE.splitlines() for cell in row.split(" | ")):
        tests = tuple("/" + "::".join(found) for found in re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell))
        figures = {
            f"{found['seconds']['median']:.2f} ({found['seconds']['max']:.2f})"
            for found in measured.values()
            if any(name.endswith(tests) for name in found["tests"] if tests)
        }
        written = set(re.findall(r"\d+\.\d\d \(\d+\.\d\d\)", cell))
        assert written <= figures, cell
        assert written or not figures, cell
        shown += len(written)
    assert shown > 40
