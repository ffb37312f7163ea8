"""Which app, which server, and what happens without them: each case in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from celery_memolock import DispatchError, MemoLockTask, StoreUnavailable
from celery_memolock.engines.celery_settings import store_of
from celery_memolock.server import Server
from tests.forks import Forks
from tests.workers.conftest import BROKERS, ROOT, in_background
from tests.workers.shop import Shop, make

COMMON = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import redis
from celery import Celery

from celery_memolock import *

URL = os.environ["URL"]
DEAD = "redis://user:secret@127.0.0.1:1/0"


def in_a_thread(call, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *args).result()


def error_of(call, *args):
    try:
        return f"returned {call(*args)!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@memolocked_task(ttl=60, name="shop.stock")
def stock(key, value="stock"):
    return [key, value]
"""


@pytest.fixture
def script(server: Server, forks: Forks) -> Callable[..., str]:
    """Run some lines after the common ones, and return what they print."""

    def run(text: str, **environment: str) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MEMOLOCK", "CELERY"))}
        done = forks.run(COMMON + text, folder=ROOT, environment={**clean, "URL": server.url, **environment})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_commands_know_what_workers_import(server: Server, tmp_path: Path) -> None:
    """A command finds a task in a module that the app only names, and says so if there is none at all."""
    (tmp_path / "proj.py").write_text(
        f"from celery import Celery\napp = Celery('proj', broker={server.url!r}, include=['proj_tasks'])\n"
    )
    (tmp_path / "proj_tasks.py").write_text(
        "from celery_memolock import memolocked_task\n@memolocked_task(ttl=5)\ndef size(key): return len(key)\n"
    )

    def peek(task: str, app: str = "proj") -> str:
        command = [sys.executable, "-m", "celery", "-A", app, "memolock", "peek", task, "-a", '["a"]']
        paths = f"{tmp_path}{os.pathsep}{ROOT}"
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
        )
        return done.stderr

    assert "no value is stored" in peek("proj_tasks.size")
    assert "those are: proj_tasks.size" in peek("proj_tasks.sise")
    (tmp_path / "bare.py").write_text("from celery import Celery\napp = Celery('bare', broker='memory://')\n")
    assert "it has none (include=" in peek("proj_tasks.size", "bare")


@BROKERS
def test_web_thread_finds_the_one_app(any_shop: tuple[Shop, str, str], script: Callable[..., str], key: str) -> None:
    """A thread that did not create the app uses the only one there is, without `set_default`."""
    made, broker, store = any_shop
    conf = f"memolock_redis_url={store!r}, memolock_prefix={made.app.conf.memolock_prefix!r}"
    queue = f"task_default_queue={made.app.conf.task_default_queue!r}"
    text = f"""
app = Celery("web", broker={broker!r})
app.conf.update({conf}, {queue})
print(in_a_thread(stock.get_cached, {key!r}))
"""
    assert script(text) == str([key, "stock"])


def test_several_apps(script: Callable[..., str]) -> None:
    """With two apps the ambiguity is an error that names the cures, and each cure works."""
    text = """
one, two = Celery("one"), Celery("two")
for app in (one, two):
    app.conf.update(memolock_redis_url=URL, task_always_eager=True, memolock_prefix=app.main)
print(error_of(lambda: stock.get_cached("k")))
print(error_of(in_a_thread, lambda: stock.get_cached("k")))

@memolocked_task(app=two, ttl=60)
def named(key):
    return key

print(named.app is two, in_a_thread(named.get_cached, "k"))
one.set_default()
print(stock.app is one, in_a_thread(stock.get_cached, "k"))
"""
    ambiguous, in_thread, named, default = script(text).splitlines()
    assert ambiguous == in_thread
    assert ambiguous.startswith("ConfigurationError: this process has 2 Celery apps")
    assert "app=app" in ambiguous
    assert "set_default()" in ambiguous
    assert named == "True k"
    assert default == "True ['k', 'stock']"


def test_no_app(script: Callable[..., str]) -> None:
    """Without an app the error says so, instead of a broker that refuses connections."""
    assert "found no Celery app" in script('print(error_of(lambda: stock.get_cached("k")))')


@pytest.mark.parametrize(
    "setting",
    [
        "app.conf.memolock_redis_url = URL",
        "app.conf.memolock_redis_url = redis.Redis.from_url(URL, decode_responses=True)",
        "os.environ['MEMOLOCK_REDIS_URL'] = URL",
        "app.conf.broker_url = URL",
        "app.conf.broker_url = [URL, DEAD]",
        "app.conf.update(broker_url='amqp://127.0.0.1:1', result_backend=URL)",
        "app.config_from_object(SimpleNamespace(CELERY_MEMOLOCK_REDIS_URL=URL, MEMOLOCK_OTHER=1), namespace='CELERY')",
    ],
)
def test_where_the_server_is_named(script: Callable[..., str], setting: str, prefix: str) -> None:
    """The server may be named in the configuration, in the environment, or be that of broker or result backend."""
    text = f"""
app = Celery("web")
{setting}
app.conf.memolock_prefix = {prefix!r}
stock.set_cached("set", "k")
print(stock.peek("k"), redis.Redis.from_url(URL).exists(stock.memo.call(("k",), {{}}).keys.entry))
"""
    assert script(text) == "set 1"


def test_no_server_named(script: Callable[..., str]) -> None:
    """Without any the error names all the places."""
    told = script('app = Celery("web", broker="amqp://127.0.0.1:1")\nprint(error_of(stock.get_cached, "k"))')
    assert told.startswith("ConfigurationError: memolock has no Redis")
    assert "memolock_redis_url" in told
    assert "MEMOLOCK_REDIS_URL" in told
    assert "(broker_url is 'amqp://127.0.0.1:1')" in told


def test_a_wrong_server_named(script: Callable[..., str]) -> None:
    """What names no server is refused by its name, and nothing else is taken instead."""
    text = 'app = Celery("web", broker=URL)\napp.conf.memolock_redis_url = {}\nprint(error_of(stock.get_cached, "k"))'
    for wrong, name in (("'nonsense'", "cannot be used"), ("redis", "is to be a URL or a redis.Redis, not a")):
        assert script(text.format(wrong)).startswith(f"ConfigurationError: memolock_redis_url {name}")


def test_unreachable_server(script: Callable[..., str]) -> None:
    """A server that is not there is an error within the connect budget, and shows no password."""
    text = 'app = Celery("web", broker="amqp://127.0.0.1:1")\napp.conf.memolock_redis_url = DEAD\n'
    began = time.monotonic()
    told = script(text + 'print(error_of(stock.get_cached, "k"))')
    assert told.startswith("StoreUnavailable: Redis at redis://127.0.0.1:1/0 cannot be reached")
    assert "secret" not in told
    assert time.monotonic() - began < 20
    with pytest.raises(StoreUnavailable):
        store_of(make("memory://", "redis://127.0.0.1:1/0", "x").app).listen(0.1)


def test_compute_when_redis_is_down(script: Callable[..., str]) -> None:
    """`on_redis_error="compute"` runs the task in the caller, uncached."""
    text = """
app = Celery("web", broker="amqp://127.0.0.1:1")
app.conf.memolock_redis_url = DEAD
print(stock.with_options(on_redis_error="compute").get_cached("k"))
"""
    assert script(text) == "['k', 'stock']"


def test_defaults_of_the_app(script: Callable[..., str]) -> None:
    """`memolock_*` in the configuration are defaults for all tasks; unknown ones are refused by name."""
    text = """
app = Celery("web")
conf = SimpleNamespace(CELERY_MEMOLOCK_REDIS_URL=URL, CELERY_MEMOLOCK_LEASE=7, CELERY_MEMOLOCK_WAIT_TIMEOUT=3)
app.config_from_object(conf, namespace="CELERY")
print(stock.memo.options.lease, stock.memo.options.wait_timeout, stock.memo.options.ttl)
other = Celery("other", set_as_current=False)
other.conf.memolock_wait_timout = 3

@other.task(base=MemoLockTask, memolock={"ttl": 1})
def wrong(): ...

print(error_of(wrong.get_cached))
"""
    defaults, refused = script(text).splitlines()
    assert defaults == "7.0 3.0 60.0"
    assert refused.startswith("OptionError: memolock_wait_timout")


@pytest.mark.parametrize("url", ["URL", "DEAD", "None"])
def test_eager(script: Callable[..., str], url: str, prefix: str) -> None:
    """Eager mode runs in the caller's thread, caches if a server is there, and does without if not."""
    text = f"""
import threading
app = Celery("web", broker="amqp://127.0.0.1:1")
app.conf.update(task_always_eager=True, memolock_redis_url={url}, memolock_prefix={prefix!r})
ran = []

@memolocked_task(ttl=60, bind=True)
def here(self, key):
    ran.append(threading.current_thread() is threading.main_thread() and self.request.is_eager)
    if key == "bad":
        raise KeyError(key)
    return key

print(here.get_cached("k"), here.get_cached("k"), len(ran), all(ran), here.peek("k"), here.invalidate("k"))
print(error_of(here.get_cached, "bad"))
"""
    values, error = script(text).splitlines()
    assert values == ("k k 1 True k True" if url == "URL" else "k k 2 True MISS False")
    assert error == "KeyError: 'bad'"


@pytest.mark.parametrize("url", ["URL", "DEAD", "None"])
@pytest.mark.parametrize("propagates", [True, False])
def test_eager_retries(script: Callable[..., str], url: str, propagates: bool, prefix: str) -> None:
    """In eager mode a caller gets what the last attempt came to, and the next caller does not wait for another."""
    text = f"""
import asyncio
app = Celery("web", broker="amqp://127.0.0.1:1")
app.conf.update(task_always_eager=True, task_eager_propagates={propagates})
app.conf.update(memolock_redis_url={url}, memolock_prefix={prefix!r})
runs = []

@memolocked_task(ttl=60, autoretry_for=(KeyError,), default_retry_delay=0, max_retries=3)
def twice_in_vain(key):
    runs.append(key)
    if runs.count(key) < 3:
        raise KeyError(key)
    return key

@memolocked_task(ttl=60, bind=True, max_retries=2, retry_backoff=False)
def in_vain(self, key):
    runs.append(key)
    try:
        raise KeyError(key)
    except KeyError as error:
        self.retry(exc=error, countdown=0)

print(twice_in_vain.get_cached("k"), asyncio.run(twice_in_vain.aget_cached("a")), runs)
runs.clear()
print(error_of(in_vain.get_cached, "k"), error_of(in_vain.get_cached, "k"), len(runs))
print(error_of(in_vain.delay, "k").partition(":")[0])
"""
    values, errors, plain = script(text).splitlines()
    assert values == "k a ['k', 'k', 'k', 'a', 'a', 'a']"
    assert errors == "KeyError: 'k' KeyError: 'k' 6"
    assert plain == ("Retry" if propagates else "returned <EagerResult")  # as ever


def test_wrong_options_at_import(script: Callable[..., str]) -> None:
    """A wrong option of the decorator is refused when the module is imported, by its name."""
    text = """
for wrong in ({"ttl": -1}, {"ttl": 1, "wait_timout": 3}, {"ttl": 1, "ignore": ["nope"]}, {"ttl": 1, "key": "{nope}"}):
    print(error_of(lambda: memolocked_task(**wrong)(lambda key: key)))
"""
    *told, coroutine = script(
        text + "\nasync def later(key): ...\nprint(error_of(memolocked_task(ttl=1), later))"
    ).splitlines()
    assert coroutine.startswith("OptionError: later is an async function")
    assert all(line.startswith("OptionError: ") for line in told)
    assert [name in line for name, line in zip(["ttl", "wait_timout", "ignore", "key"], told, strict=True)] == [
        True
    ] * 4


def test_task_without_options() -> None:
    """A task of our class without options says how to give them, and still runs."""
    app = make("memory://", "redis://127.0.0.1:1/0", "x").app

    @app.task(base=MemoLockTask, shared=False)
    def bare(key: str) -> str:
        return key

    with pytest.raises(ValueError, match="has no memolock options"):
        bare.get_cached("k")
    assert bare("k") == "k"


@pytest.fixture
def silent() -> Iterator[str]:
    """A broker that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"amqp://guest:secret@127.0.0.1:{listening.getsockname()[1]}//"


def test_broker_down(server: Server, prefix: str, key: str) -> None:
    """When the broker is down all who wait hear so, and the key is free again."""
    made = make("amqp://guest:secret@127.0.0.1:1//", server.url, prefix)
    waiters = [in_background(made.stock.get_cached, key) for _ in range(5)]
    for waiter in waiters:
        with pytest.raises(DispatchError, match=r"amqp://guest:\*\*@127\.0\.0\.1:1//") as caught:
            waiter.result(20)
        assert "secret" not in str(caught.value)
    keys = made.stock.memo.call((key,), {}).keys
    assert not made.records.exists(keys.all[1])


def test_broker_frozen(server: Server, prefix: str, silent: str, key: str) -> None:
    """A broker that never answers holds a caller no longer than `dispatch_lease`."""
    made = make(silent, server.url, prefix)
    with pytest.raises(DispatchError, match=r"did not take a message within 0\.5 s"):
        made.stock.with_options(dispatch_lease=0.5).get_cached(key)


#: Several commands in one process, which read the arguments that a shell would give them.
COMMANDS = """
import json, sys
from celery.bin.celery import celery
from click.testing import CliRunner

found = [CliRunner().invoke(celery, words) for words in json.loads(sys.argv[1])]
print(json.dumps([each.output for each in found]))
"""


def test_command_line(server: Server, prefix: str, key: str, forks: Forks) -> None:
    """Operators look at, drop and renew values; without an app the command refuses."""
    made = make(server.url, server.url, prefix)
    made.stock.set_cached({"pieces": 7}, key)
    environment = {**os.environ, "SHOP_BROKER": server.url, "SHOP_STORE": server.url, "SHOP_PREFIX": prefix}
    ours = ["-A", "tests.workers.shop", "memolock"]
    arguments = ["shop.stock", "--args", f'["{key}"]']
    command = [sys.executable, "-m", "celery", *ours, "peek", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, '{"pieces": 7}'), done.stderr
    commands = [["memolock", "peek", *arguments]]  # the others load the app
    commands += [[*ours, command, *arguments] for command in ("invalidate", "peek", "refresh")]
    commands += [[*ours, "peek", "shop.nope"], [*ours, "peek", "shop.stock", "--args", "["]]
    commands += [[*ours, "peek", "shop.stock", *wrong] for wrong in (["-a", '"q1"'], ["-k", "[1]"], ["-a", '{"q": 1}'])]
    done = forks.run(COMMANDS, json.dumps(commands), folder=ROOT, environment=environment)
    no_app, dropped, gone, started, unknown, malformed, *misshapen = json.loads(done.stdout.splitlines()[-1])
    assert dropped.strip() == "dropped"
    assert "no value is stored" in gone
    assert "started" in started
    assert "shop.stock" in unknown
    assert "no JSON" in malformed
    for each in misshapen:
        assert """Error: --args takes a JSON list, as '["q1"]', and --kwargs an object, as '{"n": 1}'""" in each
    assert "name the app" in no_app
