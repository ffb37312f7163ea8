"""Servers of the tests' own: started here, on ephemeral ports, and stopped at the end."""

from __future__ import annotations

import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from celery_memolock.server import Server, find_server_binary

# A shell's job in the background ignores it, and so would all processes that are started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def missing(what: str) -> None:
    """Skip at a desk and fail in CI, where every lane has to have what it needs."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def _binary(kind: str) -> Path:
    if kind == "valkey":
        return find_server_binary()
    found = shutil.which("redis-server")
    if found is None:
        missing("redis-server is not on PATH: the lane of another, older server is left out")
    assert found is not None
    return Path(found)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server for all tests that do not care which."""
    with Server() as started:
        yield started


def server_of(kind: str) -> Server:
    """Return a server of a kind, to be started."""
    return Server(binary=_binary(kind))


@pytest.fixture(scope="session", params=["valkey", "redis"])
def any_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each kind of server in turn."""
    with server_of(request.param) as started:
        yield started


def commands_run(client: redis.Redis, name: str) -> int:
    """Count how often a server has run a command, by its scripts as well."""
    stats: Any = client.info("commandstats")
    return int(stats.get(f"cmdstat_{name}", {}).get("calls", 0))


@pytest.fixture
def prefix() -> str:
    """A key prefix that no other test uses."""
    return f"t{uuid.uuid4().hex[:8]}"
