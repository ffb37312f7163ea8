"""Every engine, asked by every driver, over every kind of server."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.conftest import server_of
from tests.engines.tasks import Place, make
from tests.workers.conftest import Worker, key, measured, own_server
from tests.workers.shop import FromAsyncio

__all__ = ["Asked", "key", "measured", "own_server", "workers"]

#: What starts a worker of each engine. RQ's runs one job at a time, and imports what it runs before it forks.
_RQ = "import sys, rq, tests.engines.tasks as tasks; from celery_memolock.rq import *; "
WORKERS: dict[str, list[list[str]]] = {
    "celery": [["-m", "celery", "-A", "tests.engines.tasks", "worker", "--loglevel", "INFO", "--concurrency", "3"]],
    "rq": [["-c", _RQ + "rq.Worker([tasks.app], connection=tasks.app.connection).work(with_scheduler=False)"]] * 3,
    "inline": [],
}
READY = {"celery": " ready.", "rq": "Listening on"}


class Asked:
    """A place as one driver asks it."""

    def __init__(self, place: Place, driver: str, url: str, processes: list[Worker]) -> None:
        self.place = place
        self.driver = driver
        self.url = url
        self.server = redis.Redis.from_url(url)
        self.processes = processes
        for name in ("ran", "await_start", "open_gate"):
            setattr(self, name, getattr(place.records, name))

    def __getattr__(self, name: str) -> Any:
        task = self.place.tasks[name]
        return FromAsyncio(task) if self.driver == "asyncio" else task

    def flight(self, name: str, key: str) -> str:
        """Return where the server keeps a key's flight."""
        return str(self.place.tasks[name].memo.call((key,), {}).keys.all[1])

    def waiting(self, name: str, key: str) -> int:
        """How many processes wait for a key."""
        fields: Any = self.server.hkeys(self.flight(name, key))
        return sum(field.startswith(b"w:") for field in fields)

    @property
    def environment(self) -> dict[str, str]:
        """What makes another process have the same place."""
        return {"PLACE_ENGINE": self.place.engine, "PLACE_STORE": self.url, "PLACE_PREFIX": self.place.prefix}


@contextmanager
def workers(folder: Path, place: Place, url: str, commands: list[list[str]] | None = None) -> Iterator[list[Worker]]:
    """Run the workers of a place."""
    environment = {"PLACE_ENGINE": place.engine, "PLACE_STORE": url, "PLACE_PREFIX": place.prefix}
    with ExitStack() as stack:
        processes = []
        for command in WORKERS[place.engine] if commands is None else commands:
            log = folder / f"{uuid.uuid4().hex[:8]}.log"
            process = Worker(command, environment, log, READY[place.engine])
            stack.callback(process.stop)
            processes.append(process)
        for process in processes:
            process.await_ready()
        yield processes


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Any]]:
    """Return a running place for an engine and a kind of server: one for both drivers."""
    made: dict[tuple[str, str], Any] = {}
    with ExitStack() as stack:

        def get(engine: str, kind: str) -> Any:
            if (engine, kind) not in made:
                server = stack.enter_context(server_of(kind))
                place = make(engine, server.url, f"t{uuid.uuid4().hex[:8]}")
                folder = tmp_path_factory.mktemp(f"{engine}-{kind}")
                made[engine, kind] = place, server.url, stack.enter_context(workers(folder, place, server.url))
            return made[engine, kind]

        yield get


@pytest.fixture(scope="session", params=["valkey", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which server."""
    return str(request.param)


@pytest.fixture(scope="session", params=["celery", "rq", "inline"])
def engine(request: pytest.FixtureRequest) -> str:
    """Which engine."""
    return str(request.param)


@pytest.fixture(params=["threads", "asyncio"])
def shop(request: pytest.FixtureRequest, engine: str, kind: str, places: Callable[[str, str], Any]) -> Asked:
    """An engine as a driver asks it."""
    place, url, processes = places(engine, kind)
    return Asked(place, request.param, url, processes)
