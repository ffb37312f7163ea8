"""Every documented Python snippet runs as it stands, but for the address of the server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from celery_memolock.server import Server
from tests.docs.conftest import Start

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ANY_BLOCK = re.compile(r"^```python\n", re.MULTILINE)


def _snippets(page: Path) -> dict[str, str]:
    return dict(BLOCK.findall(page.read_text()))


@pytest.fixture
def folder(tmp_path: Path, server: Server) -> Path:
    """A folder with the snippets of the README, at the server of this test."""
    for name, text in _snippets(ROOT / "README.md").items():
        (tmp_path / name).write_text(text.replace("redis://localhost:6379/0", server.url))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_is_a_file(page: Path) -> None:
    """Each block names the file it is, so that none escapes the tests below."""
    assert len(ANY_BLOCK.findall(page.read_text())) == len(_snippets(page))


def test_readme_runs(folder: Path, start_worker: Start) -> None:
    """The README's scripts run against its worker."""
    start_worker("shop", folder, os.environ)
    for script in ("ask.py", "tour.py", "without_a_queue.py"):
        done = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("page", "name"),
    [(page, name) for page in PAGES for name in _snippets(page) if name.startswith("test_")],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_documented_tests_pass(page: Path, name: str, tmp_path: Path) -> None:
    """A documented test is a test that passes."""
    (tmp_path / name).write_text(_snippets(page)[name])
    environment = {key: value for key, value in os.environ.items() if key != "MEMOLOCK_REDIS_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 0, done.stdout
