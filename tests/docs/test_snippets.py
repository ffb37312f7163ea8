"""Every documented Python snippet runs as it stands, but for the port of the server."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from celery_memolock.cli import server as server_command
from tests.docs.readme import README, free_port, play, sessions, snippets
from tests.forks import Forks

PAGES = sorted([README, *(README.parent / "docs").glob("*.md")])
ANY_BLOCK = re.compile(r"^ *(```|~~~) *py", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_is_a_file(page: Path) -> None:
    """Each block names the file it is, so that none escapes the tests below."""
    named = snippets(page)
    assert len(ANY_BLOCK.findall(page.read_text())) == len(named)
    if page == README:
        text = README.read_text()
        assert [name for name in named if f"python {name}" not in text and f" {name[:-3]} " not in text] == []
    else:
        assert [name for name in named if not name.startswith("test_")] == []


def test_readme_runs(tmp_path: Path) -> None:
    """The README's first minute, command by command: with Celery, with RQ, and without a queue."""
    programs = Path(sys.executable).parent
    assert [found for found in play(tmp_path, free_port(), lambda _: programs) if found[1]] == []


def test_readme_shows_what_is_printed() -> None:
    """Each way to ask prints the value."""
    printed = {command.line: command.prints for session in sessions() for command in session}
    for script in ("ask.py", "rq_ask.py", "without_a_queue.py"):
        assert printed[f"python {script}"] == "2750\n"


def test_readme_asks_the_server_of_the_command() -> None:
    """Every URL of the README is that of `celery-memolock server` without options."""
    port = next(option.default for option in server_command.params if option.name == "port")
    assert {f"redis://localhost:{port}/0"} == set(re.findall(r"redis://[\w.:/]+", README.read_text()))


@pytest.mark.parametrize(
    ("page", "name"),
    [(page, name) for page in PAGES for name in snippets(page) if name.startswith("test_")],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_documented_tests_pass(page: Path, name: str, tmp_path: Path, forks: Forks) -> None:
    """A documented test is a test that passes."""
    (tmp_path / name).write_text(snippets(page)[name])
    environment = {key: value for key, value in os.environ.items() if key != "MEMOLOCK_REDIS_URL"}
    pytest_it = "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1]]))"
    done = forks.run(pytest_it, name, folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
