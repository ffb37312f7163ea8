"""A real worker, started as the documents say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

Start = Callable[[str, Path, Mapping[str, str]], None]


@contextmanager
def _worker(app: str, folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    command = [sys.executable, "-m", "celery", "-A", app, "worker", "--concurrency", "1", "--loglevel", "INFO"]
    with subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(environment),
    ) as process:
        assert process.stdout is not None
        heard = []
        for line in process.stdout:
            heard.append(line)
            if " ready." in line:
                break
        else:
            pytest.fail("".join(heard))
        try:
            yield
        finally:
            process.terminate()
            process.communicate()


@pytest.fixture
def start_worker() -> Iterator[Start]:
    """Start a worker of an app in a folder, and wait until it is ready."""
    with ExitStack() as stack:
        yield lambda app, folder, environment: stack.enter_context(_worker(app, folder, environment))
