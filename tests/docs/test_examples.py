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
from typing import Any

import pytest
import redis

from celery_memolock.demo.database import Database
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


def test_inline(environment: dict[str, str]) -> None:
    """Ten callers in each of two processes, one run: of threads, and of coroutines."""
    command = [sys.executable, "-m", "examples.inline"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    _, threads, _, loops = done.stdout.splitlines()
    assert (threads, loops) == ("threads: 20 callers, 1 run", "asyncio: 20 callers, 1 run"), done.stderr
    assert done.stderr == ""


def test_rq_app(environment: dict[str, str], own_server: Server) -> None:
    """Many visitors of two web processes get one report of an RQ worker, and another one after a sale."""
    environment["RQ_REDIS_URL"] = environment.pop("MEMOLOCK_REDIS_URL")
    flags = ["--url", own_server.url, "--worker-class", "celery_memolock.rq.MemoLockWorker", "reports"]
    worker = [sys.executable, "-m", "rq.cli", "worker", *flags]
    with (
        subprocess.Popen(worker, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process,
        site("examples.rq_app:app", environment) as address,
    ):
        try:
            with ThreadPoolExecutor(16) as visitors:
                pages = set(visitors.map(_get, [f"{address}/stock/tea"] * 16))
            assert len(pages) == 1
            first = json.loads(pages.pop())
            assert first["pieces"] == 3
            sold = urllib.request.Request(f"{address}/stock/tea/sold", method="POST")
            with urllib.request.urlopen(sold, timeout=30) as answer:
                assert json.load(answer) == {"dropped": True}
            assert json.loads(_get(f"{address}/stock/tea"))["counted_at"] > first["counted_at"]
        finally:
            process.terminate()


def test_external(environment: dict[str, str], own_server: Server, start_worker: Start) -> None:
    """One asks, the task hands its token out, and the command line settles the flight; or the twin in Python does."""
    start_worker("examples.external", ROOT, environment)
    example = [sys.executable, "-m", "examples.external"]
    for article, value in (("tea", '{"price": 7}'), ("salt", "8")):
        with subprocess.Popen([*example, "ask", article], cwd=ROOT, env=environment, stdout=subprocess.PIPE) as asking:
            command = [*example, "settle", article, value]
            if article == "tea":
                with redis.Redis.from_url(own_server.url, socket_timeout=60) as client:
                    found: Any = client.blpop([f"tokens:{article}"], 30)
                command = [sys.executable, "-c", "from celery_memolock.cli import main; main()"]
                command += ["settle", found[1].decode(), value]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
            assert done.stdout == "OK\n", done.stderr
            answer, _ = asking.communicate(timeout=60)
        assert answer.decode() == f"{{'price': {7 if article == 'tea' else 8}}}\n"


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


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("requests", "seconds"), [("2,000", 3), pytest.param("10,000", 10, marks=pytest.mark.slow)], ids=["2000", "10000"]
)
def test_fastapi_app(requests: str, seconds: int, environment: dict[str, str], start_worker: Start) -> None:
    """Thousands of requests at one process wait for one task, and one follows its progress."""
    environment["STOCK_SECONDS"] = str(seconds)
    start_worker("examples.fastapi_app:celery_app", ROOT, environment)
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        uvicorn = ["-m", "uvicorn", "examples.fastapi_app:app", "--fd", str(listening.fileno()), "--log-level", "error"]
        with subprocess.Popen(
            [sys.executable, *uvicorn], cwd=ROOT, env=environment, pass_fds=[listening.fileno()]
        ) as web:
            try:
                address = f"http://127.0.0.1:{listening.getsockname()[1]}/stock/tea"
                events = ThreadPoolExecutor(1).submit(_get, f"{address}/events")
                done = subprocess.run(
                    [sys.executable, "-m", "examples.fastapi_app", requests.replace(",", ""), address],
                    cwd=ROOT,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=200,
                )
            finally:
                web.terminate()
    *progress, report = events.result(200).decode().strip().split("\n\n")
    assert report.startswith("event: report")
    told = [float(each.removeprefix("event: progress\ndata: ")) for each in progress]
    assert told  # how many is up to a loop that has thousands of requests to answer
    assert told == sorted(told)
    assert done.stdout == f"{requests} requests, 1 answer, 1 run\n", done.stdout + done.stderr


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
        assert b'new EventSource("events")' in _get(f"{address}/queue/sale/watch")
        # A count takes a few hundredths of a second here: now and then its end is heard before its last report.
        database = Database(environment["MEMOLOCK_DEMO_DATABASE"])
        told: list[float] = []
        for page in (f"page{number}" for number in range(1, 40)):
            *progress, waiting = _events(f"{address}/queue/{page}/events")
            assert waiting == ("waiting", database.count_waiting(page))
            assert {event for event, _ in progress} <= {"progress"}
            told = [fraction for _, fraction in progress]
            assert told == sorted(told)
            if len(told) > 1:
                break
        assert told[0] < told[-1] <= 1
        database.drop()
        assert _events(f"{address}/queue/another/events") == [("failed", "no such table: memolock_demo_visitor")]


def _events(url: str) -> list[tuple[str, Any]]:
    """Return all server-sent events of an answer, which has to end by itself."""
    blocks = _get(url).decode().removesuffix("\n\n").split("\n\n")
    return [
        (event.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for event, data in map(str.splitlines, blocks)
    ]


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=200) as answer:
        body: bytes = answer.read()
        return body
