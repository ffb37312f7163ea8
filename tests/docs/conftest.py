"""A real worker, started as the documents say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.workers.conftest import Worker

Start = Callable[[str, Path, Mapping[str, str]], None]


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Start]:
    """Start a worker of an app in a folder, and wait until it is ready."""
    with ExitStack() as stack:

        def start(app: str, folder: Path, environment: Mapping[str, str]) -> None:
            command = ["-m", "celery", "-A", app, "worker", "--concurrency", "1", "--loglevel", "INFO"]
            worker = Worker(command, environment, tmp_path / "worker.log", folder=folder)
            stack.callback(worker.kill)
            worker.await_ready()

        yield start
