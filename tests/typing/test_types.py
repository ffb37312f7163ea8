"""What the type checkers of our users see."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CHECKERS = {
    "mypy": ["mypy", "--strict", "--no-incremental", "--no-error-summary"],
    "pyright": ["pyright", "--pythonpath", sys.executable],
}


@pytest.fixture(scope="module", params=CHECKERS)
def output(request: pytest.FixtureRequest) -> str:
    """What a checker says of both files, in one run."""
    command = [sys.executable, "-m", *CHECKERS[request.param], str(HERE / "accepted.py"), str(HERE / "refused.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    return done.stdout + done.stderr


def _lines_with_errors(output: str, file: str) -> set[int]:
    return {int(line) for line in re.findall(rf"{file}:(\d+)(?::\d+)?\s*[:-]\s*(?:\d+\s*-\s*)?error", output)}


def test_right_calls_are_accepted(output: str) -> None:
    """Calls that fit the task's signature have its types."""
    assert not _lines_with_errors(output, "accepted.py"), output


def test_wrong_calls_are_refused(output: str) -> None:
    """Each call that does not fit is an error, on its own line."""
    lines = (HERE / "refused.py").read_text().splitlines()
    wanted = {number for number, line in enumerate(lines, 1) if line.endswith("# refused")}
    assert _lines_with_errors(output, "refused.py") == wanted, output
