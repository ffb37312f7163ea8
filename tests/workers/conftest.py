"""Real workers over real brokers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import signals

from celery_memolock.server import Server
from tests.workers import shop

ROOT = Path(__file__).parent.parent.parent

#: A worker looks for others for a second before it is ready, and then listens to them. There are none that it needs.
QUICK = ["--without-mingle", "--without-gossip"]


class Worker:
    """A worker in a process group of its own.

    Args:
        arguments: for Python.
        environment: what it has beside this process's own.
        log: the file that it writes to.
        ready: what it logs when it takes messages.
        folder: where it runs.
    """

    def __init__(
        self,
        arguments: list[str],
        environment: Mapping[str, str],
        log: Path,
        ready: str = " ready.",
        folder: Path = ROOT,
    ) -> None:
        self.log = log
        self._ready = ready
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def await_ready(self) -> None:
        """Return when it takes messages."""
        pause = threading.Event()
        while self._ready not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            pause.wait(0.02)

    def kill(self) -> None:
        """Kill it with all its children."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def stop(self) -> None:
        """End it in good order."""
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            pass
        self.kill()


Start = Callable[..., shop.Shop]


@contextmanager
def _vhost() -> Iterator[str]:
    """A virtual host of the tests' own on the RabbitMQ node of this machine."""
    name = f"memolock-{uuid.uuid4().hex[:8]}"
    for command in (["add_vhost", name], ["set_permissions", "-p", name, "guest", ".*", ".*", ".*"]):
        subprocess.run(["rabbitmqctl", "-q", *command], check=True, capture_output=True)
    try:
        yield f"amqp://guest:guest@127.0.0.1:5672/{name}"
    finally:
        subprocess.run(["rabbitmqctl", "-q", "delete_vhost", name], check=True, capture_output=True)


@pytest.fixture(scope="session")
def amqp() -> Iterator[str]:
    """The URL of a virtual host of our own."""
    with _vhost() as url:
        yield url


@contextmanager
def _starting(folder: Path) -> Iterator[Callable[..., Any]]:
    with ExitStack() as stack:

        def start(broker: str, store: str, *flags: str, **settings: str) -> tuple[shop.Shop, Worker]:
            prefix = settings.pop("prefix", None) or f"t{uuid.uuid4().hex[:8]}"
            environment = {"SHOP_BROKER": broker, "SHOP_STORE": store, "SHOP_PREFIX": prefix}
            module = settings.pop("module", "tests.workers.shop")
            environment |= {f"SHOP_{name.upper()}": value for name, value in settings.items()}
            name = uuid.uuid4().hex[:8]
            command = ["-m", "celery", "-A", module, "worker", "--loglevel", "INFO", *QUICK, *flags]
            worker = Worker([*command, "--hostname", f"{name}@tests"], environment, folder / f"{name}.log")
            stack.callback(worker.kill)
            worker.await_ready()
            made = shop.make(broker, store, prefix, settings.get("records"), result_backend=settings.get("results"))
            return made, worker

        yield start


@pytest.fixture(scope="session")
def start_for_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Start a worker that lives as long as the tests."""
    with _starting(tmp_path_factory.mktemp("workers")) as start:
        yield start


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start a worker for one test → its shop, and the worker."""
    with _starting(tmp_path) as start:
        yield start


@pytest.fixture(scope="session")
def redis_shop(server: Server, start_for_all: Callable[..., Any]) -> shop.Shop:
    """A shop with a running worker over Redis, for both drivers."""
    made, _ = start_for_all(server.url, server.url, "--concurrency", "4", results=server.url)
    return made  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def amqp_shop(amqp: str, server: Server, start_for_all: Callable[..., Any]) -> shop.Shop:
    """A shop with a running worker over RabbitMQ, for both drivers."""
    made, _ = start_for_all(amqp, server.url, "--concurrency", "4", results=server.url)
    return made  # type: ignore[no-any-return]


@pytest.fixture(
    scope="session",
    params=[
        "redis",
        pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
        pytest.param("redis, asked from asyncio", marks=pytest.mark.one_driver),
    ],
)
def any_shop(request: pytest.FixtureRequest, server: Server) -> tuple[shop.Shop, str, str]:
    """A shop with a running worker over each broker and for each driver in turn, with broker's and store's URL.

    "rabbitmq, asked from asyncio" is for the tests of a module that asks for it: see test_one_run.py.
    """
    over_amqp = "rabbitmq" in request.param
    broker = request.getfixturevalue("amqp") if over_amqp else server.url
    made = request.getfixturevalue("amqp_shop" if over_amqp else "redis_shop")
    if "asyncio" in request.param:
        made = replace(made, driver="asyncio")
    return made, broker, server.url


@pytest.fixture
def sent() -> Iterator[list[str]]:
    """The ids of the messages that this process sends."""
    ids: list[str] = []

    def note(headers: dict[str, Any], **_: Any) -> None:
        ids.append(headers["id"])

    # Not weakly: for whom a weak one died, Celery before 5.7 makes a new list of receivers, and an app that has sent a
    # message goes on with the old list.
    signals.after_task_publish.connect(note, weak=False)
    yield ids
    signals.after_task_publish.disconnect(note)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Measure how long a with block takes, from a fault to the answer; `python -m benchmarks.recovery` collects it."""

    @contextmanager
    def measure(fault: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        if "MEMOLOCK_RECOVERY" in os.environ:
            line = {"fault": fault, "test": request.node.nodeid, "seconds": time.monotonic() - began}
            with Path(os.environ["MEMOLOCK_RECOVERY"]).open("a") as file:
                file.write(json.dumps(line) + "\n")

    return measure


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server of one test alone, to be struck by its faults."""
    with Server() as started:
        yield started


@pytest.fixture(params=["early", pytest.param("late", marks=pytest.mark.one_driver)])
def acks(request: pytest.FixtureRequest) -> str:
    """When the worker acknowledges a message; the caller, whatever its driver, knows nothing of it."""
    return str(request.param)


@pytest.fixture
def key() -> str:
    """A key that no other test uses."""
    return f"key-{uuid.uuid4().hex[:8]}"


def until(true: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Ask again and again until the answer is true, and return it."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not (found := true()):
        assert time.monotonic() < deadline, "it never became true"
        pause.wait(0.02)
    return found


#: For tests in which another process asks, which has a driver of its own.
BROKERS = pytest.mark.parametrize(
    "any_shop", ["redis", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)], indirect=True
)


def in_a_process(of: tuple[shop.Shop, str, str], code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run some code as another web process of a shop."""
    with another_process(of, code, *args) as process:
        out, error = process.communicate(timeout=60)
    return subprocess.CompletedProcess(args, process.returncode, out, error)


def another_process(of: tuple[shop.Shop, str, str], code: str, *args: str) -> subprocess.Popen[str]:
    """Start another web process of a shop."""
    made, broker, store = of
    environment = {"SHOP_BROKER": broker, "SHOP_STORE": store, "SHOP_PREFIX": made.app.conf.memolock_prefix}
    if made.app.conf.result_backend:
        environment["SHOP_RESULTS"] = made.app.conf.result_backend
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *args],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def in_background(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Call in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
