"""The demo runs, tells the truth, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.workers.conftest import until

COMMAND = [sys.executable, "-m", "celery_memolock.demo"]


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "MEMOLOCK_REDIS_URL"}


def _left(mark: str) -> list[psutil.Process]:
    """Return the processes that were started for the demo in a folder: their environment or command names it."""
    return [
        each
        for each in psutil.process_iter(["cmdline", "environ", "status"])
        if each.info["status"] != psutil.STATUS_ZOMBIE and mark in f"{each.info['cmdline']} {each.info['environ']}"
    ]


def test_demo(tmp_path: Path) -> None:
    """Three modes, the figures of each, a picture and a page; in memolock mode never two queries at once."""
    flags = ["--users", "1000", "--seconds", "6", "--processes", "2", "--json", "figures.json", "--report", "report"]
    done = subprocess.run(
        [*COMMAND, *flags], cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    modes = json.loads((tmp_path / "figures.json").read_text())["modes"]
    assert set(modes) == {"none", "ttl", "memolock"}
    wanted = {"requests", "errors", "queries", "max_concurrent_queries", "p50_ms", "p95_ms", "p99_ms"}
    assert all(set(figures) == wanted for figures in modes.values())
    assert modes["memolock"]["max_concurrent_queries"] == 1
    assert modes["memolock"]["errors"] == 0
    assert modes["memolock"]["queries"] < modes["none"]["queries"]
    assert (tmp_path / "report" / "queue-page.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report" / "queue-page.html").read_text()
    assert "data:image/png;base64," in page
    assert "http://" not in page
    assert "https://" not in page


def test_interrupted_demo_leaves_nothing_running(tmp_path: Path) -> None:
    """After Ctrl-C in the middle of the load no process of the demo is left."""
    environment = {**_environment(), "TMPDIR": str(tmp_path)}
    command = [*COMMAND, "--users", "300", "--seconds", "30", "--processes", "2"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        until(lambda: demo.poll() is not None or list(tmp_path.glob("memolock-demo-*/*.queries")), 60)
        assert demo.poll() is None
        assert _left(str(tmp_path))
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=30)
    assert demo.returncode == 130, output
    assert _left(str(tmp_path)) == []


def test_bad_database_is_refused(tmp_path: Path) -> None:
    """A database that the demo does not know is refused with the two that it does."""
    done = subprocess.run(
        [*COMMAND, "--database", "oracle://nowhere"], cwd=tmp_path, env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "sqlite:///PATH or postgresql://" in done.stderr
