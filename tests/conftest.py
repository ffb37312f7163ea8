"""Servers of the tests' own: started here, on ephemeral ports, and stopped at the end."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_memolock.server import Server, find_server_binary


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


@pytest.fixture(scope="session", params=["valkey", "redis"])
def any_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each kind of server in turn."""
    with Server(binary=_binary(request.param)) as started:
        yield started


@pytest.fixture
def prefix() -> str:
    """A key prefix that no other test uses."""
    return f"t{uuid.uuid4().hex[:8]}"
