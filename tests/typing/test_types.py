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


def _lines_with_errors(checker: str, file: Path) -> tuple[set[int], str]:
    command = [sys.executable, "-m", *CHECKERS[checker], str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    found = re.findall(rf"{file.name}:(\d+)(?::\d+)?\s*[:-]\s*(?:\d+\s*-\s*)?error", done.stdout)
    return {int(line) for line in found}, done.stdout + done.stderr


@pytest.mark.parametrize("checker", CHECKERS)
def test_right_calls_are_accepted(checker: str) -> None:
    """Calls that fit the task's signature have its types."""
    lines, output = _lines_with_errors(checker, HERE / "accepted.py")
    assert not lines, output


@pytest.mark.parametrize("checker", CHECKERS)
def test_wrong_calls_are_refused(checker: str) -> None:
    """Each call that does not fit is an error, on its own line."""
    file = HERE / "refused.py"
    wanted = {number for number, line in enumerate(file.read_text().splitlines(), 1) if line.endswith("# refused")}
    lines, output = _lines_with_errors(checker, file)
    assert lines == wanted, output
