"""Every engine, asked by every driver, over every kind of server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.conftest import server_of
from tests.engines.tasks import Place, make
from tests.workers.conftest import QUICK, ROOT, Worker, key, measured, own_server
from tests.workers.shop import FromAsyncio

__all__ = ["Asked", "key", "measured", "own_server", "workers"]

#: What starts a worker of each engine. RQ's runs one job at a time, and imports what it runs before it forks.
_RQ = "import sys, rq, tests.engines.tasks as tasks; from celery_memolock.rq import *; "
_CELERY = ["-m", "celery", "-A", "tests.engines.tasks", "worker", "--loglevel", "INFO", "--concurrency", "3", *QUICK]
WORKERS: dict[str, list[list[str]]] = {
    "celery": [_CELERY],
    "rq": [["-c", _RQ + "rq.Worker([tasks.app], connection=tasks.app.connection).work(with_scheduler=False)"]] * 3,
    "inline": [],
}
READY = {"celery": " ready.", "rq": "Listening on"}


class Other:
    """Another process with the same place. It stays from one test to the next, and does what it is told."""

    _CODE = """
import json, sys
from tests.engines.tasks import place
for line in sys.stdin:
    code, args = json.loads(line)
    told = {"place": place, "args": args}
    exec(code, told)
    print(json.dumps(told["answer"]), flush=True)
"""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._CODE],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, code: str, *args: str) -> None:
        """Have it run some code, which finds the place and `args`, and leaves its `answer`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([code, args]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Wait for the answer."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def kill(self) -> None:
        """End it."""
        with self._process:
            self._process.kill()


class Asked:
    """A place as one driver asks it."""

    def __init__(
        self, place: Place, driver: str, url: str, processes: list[Worker], others: list[Other] | None = None
    ) -> None:
        self.place = place
        self.driver = driver
        self.url = url
        self.server = redis.Redis.from_url(url)
        self.processes = processes
        self.others = others or []
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


def environment_of(place: Place, url: str) -> dict[str, str]:
    """Return what makes another process have the same place."""
    return {"PLACE_ENGINE": place.engine, "PLACE_STORE": url, "PLACE_PREFIX": place.prefix}


@contextmanager
def workers(folder: Path, place: Place, url: str, commands: list[list[str]] | None = None) -> Iterator[list[Worker]]:
    """Run the workers of a place."""
    with ExitStack() as stack:
        processes = []
        for command in WORKERS[place.engine] if commands is None else commands:
            log = folder / f"{uuid.uuid4().hex[:8]}.log"
            process = Worker(command, environment_of(place, url), log, READY[place.engine])
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            process.await_ready()
        yield processes


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Any]]:
    """Return a running place for an engine and a kind of server, with two more processes: one for both drivers."""
    made: dict[tuple[str, str], Any] = {}
    with ExitStack() as stack:

        def get(engine: str, kind: str) -> Any:
            if (engine, kind) not in made:
                server = stack.enter_context(server_of(kind))
                place = make(engine, server.url, f"t{uuid.uuid4().hex[:8]}")
                folder = tmp_path_factory.mktemp(f"{engine}-{kind}")
                others = [Other(environment_of(place, server.url)) for _ in range(2)]
                for each in others:
                    stack.callback(each.kill)
                made[engine, kind] = place, server.url, stack.enter_context(workers(folder, place, server.url)), others
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
    place, url, processes, others = places(engine, kind)
    return Asked(place, request.param, url, processes, others)
