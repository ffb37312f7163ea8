"""The examples run as they say at their top."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from celery_memolock.server import Server
from tests.docs.conftest import Start

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server of this test alone: the examples use Celery's default queue."""
    with Server() as started:
        yield started


@pytest.fixture
def environment(own_server: Server) -> dict[str, str]:
    """The environment that the examples read."""
    return {**os.environ, "MEMOLOCK_REDIS_URL": own_server.url, "PYTHONPATH": str(ROOT)}


def test_smallest(environment: dict[str, str], start_worker: Start) -> None:
    """Ten callers, one run."""
    start_worker("examples.smallest", ROOT, environment)
    done = subprocess.run(
        [sys.executable, "-m", "examples.smallest"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "10 callers, 1 run" in done.stdout, done.stdout + done.stderr


@contextmanager
def site(app: str, environment: dict[str, str]) -> Iterator[str]:
    """Serve an app with gunicorn, as the examples say, on a port of our own."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = ["gunicorn", "--workers", "2", "--threads", "8", "--bind", f"fd://{listening.fileno()}"]
        with subprocess.Popen(
            [sys.executable, "-m", *command, app],
            cwd=ROOT,
            env=environment,
            pass_fds=[listening.fileno()],
            stderr=subprocess.DEVNULL,
        ) as web:
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            finally:
                web.terminate()


def test_flask_app(environment: dict[str, str], start_worker: Start) -> None:
    """Many visitors of two web processes get one report, and another one after a sale."""
    start_worker("examples.flask_app:celery_app", ROOT, environment)
    with site("examples.flask_app:app", environment) as address:
        # The socket listens already, so the first request waits for a web process.
        assert _get(f"{address}/health") == b"ok"
        with ThreadPoolExecutor(16) as visitors:
            pages = list(visitors.map(_get, [f"{address}/stock/tea"] * 16))
        assert len(set(pages)) == 1
        assert json.loads(pages[0])["article"] == "tea"
        sold = urllib.request.Request(f"{address}/stock/tea/sold", method="POST")
        with urllib.request.urlopen(sold, timeout=30) as answer:
            assert json.load(answer) == {"dropped": True}
        assert json.loads(_get(f"{address}/stock/tea"))["article"] == "tea"


def test_fastapi_app(environment: dict[str, str], start_worker: Start) -> None:
    """10,000 requests at one process wait for one task."""
    start_worker("examples.fastapi_app:celery_app", ROOT, environment)
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        uvicorn = ["-m", "uvicorn", "examples.fastapi_app:app", "--fd", str(listening.fileno()), "--log-level", "error"]
        with subprocess.Popen(
            [sys.executable, *uvicorn], cwd=ROOT, env=environment, pass_fds=[listening.fileno()]
        ) as web:
            try:
                address = f"http://127.0.0.1:{listening.getsockname()[1]}/stock/tea"
                done = subprocess.run(
                    [sys.executable, "-m", "examples.fastapi_app", "10000", address],
                    cwd=ROOT,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=90,
                )
            finally:
                web.terminate()
    assert done.stdout == "10,000 requests, 1 answer, 1 run\n", done.stdout + done.stderr


def test_queue_page(environment: dict[str, str], start_worker: Start, tmp_path: Path) -> None:
    """The page of the demo, by hand: its table, its worker, its site."""
    environment |= {
        "MEMOLOCK_DEMO_REDIS": environment["MEMOLOCK_REDIS_URL"],
        "MEMOLOCK_DEMO_DATABASE": f"sqlite:///{tmp_path}/demo.sqlite",
        "MEMOLOCK_DEMO_RECORDS": str(tmp_path),
    }
    subprocess.run([sys.executable, "-m", "examples.queue_page"], cwd=ROOT, env=environment, check=True, timeout=60)
    start_worker("examples.queue_page:celery_app", ROOT, environment)
    with site("examples.queue_page:app", environment) as address:
        assert json.loads(_get(f"{address}/queue/sale?user=7")) == {"in": False, "waiting": 5500}


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        body: bytes = answer.read()
        return body
