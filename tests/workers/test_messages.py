"""Messages as workers get them in practice: with headers of others, spoilt, too late, and ended before their run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import signals

from celery_memolock import FlightFailed, OptionError, StoreUnavailable
from celery_memolock.server import Server
from tests.workers.conftest import in_background, until
from tests.workers.shop import WAYS_OUT, Shop, Sold, make

AnyShop = tuple[Shop, str, str]


@pytest.fixture(params=["beside", "within", "within both"])
def instrumented(request: pytest.FixtureRequest) -> Iterator[None]:
    """An instrumentation that adds headers, as Celery nests them, to all that this process sends.

    Ours stay beside the nested ones, or are moved in there together with all others that are not Celery's.
    """

    def nest(headers: dict[str, Any], **_: Any) -> None:
        headers["headers"] = {"trace-id": "0af7651916cd43dd", "baggage": {"memolock": 1}}
        inner = headers["headers"]
        if request.param == "within both":
            inner["headers"] = inner = {}
        if "within" in request.param and "memolock" in headers:
            inner["memolock"] = headers.pop("memolock")

    signals.before_task_publish.connect(nest)
    yield
    signals.before_task_publish.disconnect(nest)


@pytest.mark.usefixtures("instrumented")
def test_nested_headers(any_shop: AnyShop, key: str) -> None:
    """A flight is one beside the headers of others: its value, its retries, its refresh and its failure."""
    made, *_ = any_shop
    assert made.stock.get_cached(key) == [key, "stock"]
    assert made.retrying.get_cached(f"{key} again", 1) == 1
    assert made.flaky.get_cached(f"{key} again and again", 3) == 3
    with pytest.raises(Sold):
        made.failing.get_cached(f"{key} in vain")
    made.stock.set_cached("old", key)
    made.tasks["stock"].refresher(key).delay()
    until(lambda: made.stock.peek(key) == [key, "stock"])
    assert [made.ran(each) for each in (key, f"{key} again", f"{key} again and again")] == [2, 2, 4]


@pytest.mark.parametrize(
    ("start", "error", "text"),
    [
        ("too early", Sold, "too early"),
        ("around", Sold, "around"),
        ("ignored", FlightFailed, "'shop.hooked' ended without a value: Ignore: by its class"),
    ],
)
def test_ended_before_its_run(any_shop: AnyShop, key: str, start: str, error: type[Exception], text: str) -> None:
    """What a hook does in place of the run is told to all who wait, and the key is free again."""
    made, *_ = any_shop
    for _ in range(2):
        with pytest.raises(error, match=text):
            made.hooked.get_cached(f"{start}:{key}")
    assert made.ran(f"{start}:{key}") == 0


@pytest.mark.parametrize("start", ["plain", "again", "instead"])
def test_around_its_run(any_shop: AnyShop, key: str, start: str) -> None:
    """A class's `__call__` may add to the run, retry it or stand for it: the value is what it is with `delay`."""
    made, *_ = any_shop
    value = made.hooked.get_cached(f"{start}:{key}")
    assert value == ("without a run" if start == "instead" else ["around", f"{start}:{key}"])
    assert made.tasks["hooked"].delay(f"{start}:{key}").get(timeout=30) == value


def test_left_by_no_error(server: Server, start_worker: Callable[..., Any], key: str) -> None:
    """A run that ends by what no `except Exception` sees is told by its name, from one run, long before its lease."""
    made, _ = start_worker(server.url, server.url, "--concurrency", str(len(WAYS_OUT)))
    waiters = {way: in_background(made.leaving.get_cached, f"{key} {way}", way) for way in WAYS_OUT}
    for way, waiter in waiters.items():
        with pytest.raises(FlightFailed, match=rf"'shop\.leaving' ended without a value: {way}: ") as told:
            waiter.result(60)
        assert "raise WAYS_OUT[way]\n" in str(told.value.__cause__)
        assert made.ran(f"{key} {way}") == 1


FENCE = f"{time.time_ns() // 1000}-abc"
ENTRY = "memolock:1:e:{shop.stock:1:5}"


@pytest.mark.parametrize(
    "ticket",
    [
        "garbage",
        17,
        [],
        {},
        {"refresh": "perhaps"},
        {"refresh": True, "beat": {"a": 1}},
        {"refresh": True, "beat": ["a"]},
        {"entry": None, "fence": None, "chain": None, "options": None},
        {"entry": ENTRY},
        {"entry": "memolock:2:e:{of tomorrow}", "fence": FENCE, "chain": [], "options": {}},
        {"entry": "no key", "fence": FENCE, "chain": [], "options": {}},
        {"entry": ENTRY, "fence": "no fence", "chain": [], "options": {}},
        {"entry": ENTRY, "fence": FENCE, "chain": [[1], None, 5], "options": {"lease": None, "ttl": "soon"}},
        {"entry": ENTRY, "fence": FENCE, "chain": 5, "options": [1], "server": {}, "of tomorrow": 1},
    ],
    ids=lambda ticket: str(ticket).replace(FENCE, "fence")[:60],
)
def test_spoilt_ticket(any_shop: AnyShop, key: str, ticket: Any) -> None:
    """A ticket that is spoilt, or of another version, harms no worker; the task that it came with is not run."""
    made, *_ = any_shop
    task = made.tasks["stock"]
    for options in ({}, {"expires": -10}):
        task.apply_async((f"{key} spoilt",), headers={"memolock": ticket}, **options)
    assert made.stock.get_cached(key) == [key, "stock"]
    assert made.ran(f"{key} spoilt") == 0


def test_another_server(server: Server, own_server: Server, start_worker: Callable[..., Any], key: str) -> None:
    """A worker that keeps its values elsewhere than its callers says so, with both addresses, as nobody else can."""
    _, worker = start_worker(server.url, server.url, prefix=f"elsewhere-{key}")
    made = make(server.url, own_server.url, f"elsewhere-{key}", server.url)
    with pytest.raises(TimeoutError):
        made.stock.with_options(wait_timeout=1).get_cached(key)
    line = until(lambda: [line for line in worker.log.read_text().splitlines() if "finds no flight" in line])
    assert "ERROR" in line[0]
    assert server.url in line[0]
    assert own_server.url in line[0]


def test_one_address_for_two_servers(server: Server, start_worker: Callable[..., Any], key: str) -> None:
    """Where callers and worker call two servers by one name the worker notices by what it never finds.

    A message that comes after its flight's end finds what that left, and is no sign of anything.
    """
    made, worker = start_worker(server.url, server.url, "--concurrency", "1")
    prefix = made.app.conf.memolock_prefix
    sent: list[Any] = []

    def note(headers: dict[str, Any], **_: Any) -> None:
        sent.append({name: value for name, value in headers["memolock"].items() if name != "id"})

    signals.before_task_publish.connect(note)
    made.stock.get_cached(key)
    with pytest.raises(Sold):
        made.failing.with_options(error_ttl=0).get_cached(key)
    signals.before_task_publish.disconnect(note)
    late = [{**ticket, "server": "redis://by-another-name"} for ticket in sent * 3]
    strange = [
        {"entry": f"{prefix}:1:e:{{shop.stock:1:{number}}}", "fence": FENCE, "server": server.url}
        for number in range(3)
    ]
    for number, ticket in enumerate([*late, *strange], 1):
        task = made.tasks["failing" if "failing" in ticket["entry"] else "stock"]
        task.apply_async((f"{key} late",), headers={"memolock": ticket})
        until(lambda: worker.log.read_text().count("the flight is over") == number)  # noqa: B023
        assert "finds no flight" not in worker.log.read_text() or number == len(late + strange)
    until(lambda: "finds no flight" in worker.log.read_text())
    assert made.ran(f"{key} late") == 0


@pytest.mark.parametrize("name", ["memolock_laese", "memolock_redis_url"])
def test_wrong_option_in_the_worker_alone(
    server: Server, start_worker: Callable[..., Any], key: str, name: str
) -> None:
    """A worker whose own configuration is wrong tells those who wait, by the error that it has itself."""
    made, _ = start_worker(server.url, server.url, misspelt=name)
    with pytest.raises(Exception, match=name):
        made.stock.get_cached(key)


@pytest.mark.parametrize(
    ("user", "path", "why"), [("", "/99", "DB index is out of range"), ("nobody:pw@", "/0", "No permissions")]
)
def test_worker_that_its_server_turns_away(
    own_server: Server, start_worker: Callable[..., Any], key: str, user: str, path: str, why: str
) -> None:
    """A worker whose server has no such user's rights, or database, tells those who wait."""
    client = redis.Redis.from_url(own_server.url)
    client.execute_command("ACL", "SETUSER", "nobody", "on", ">pw", "~nothing", "+@all")
    url = own_server.url.replace("://", f"://{user}").removesuffix("/0") + path
    made, _ = start_worker(own_server.url, own_server.url, "--concurrency", "1", misspelt=f"memolock_redis_url={url}")
    with pytest.raises(StoreUnavailable, match=why):
        made.stock.get_cached(key)


def test_other_code_in_the_worker(server: Server, start_worker: Callable[..., Any], key: str) -> None:
    """A worker that has the task without memolock, or without its options, tells those who wait, and logs it."""
    made, worker = start_worker(server.url, server.url, module="tests.workers.skewed")
    for each in (key, f"again {key}"):
        with pytest.raises(FlightFailed, match=r"'shop\.stock' is an ordinary task on its worker"):
            made.stock.get_cached(each)
    with pytest.raises(LookupError, match=key):
        made.stock.get_cached(f"failing {key}")
    with pytest.raises(OptionError, match=r"'shop\.sourced' has no memolock options"):
        made.sourced.get_cached(key)
    assert worker.log.read_text().count("its flight came to nothing") == 4


def test_refused_message(any_shop: AnyShop, key: str) -> None:
    """A message in a serializer that the worker does not accept is told to those who wait."""
    made, *_ = any_shop
    with pytest.raises(FlightFailed, match=r"refused the message: ContentDisallowed: .* pickle"):
        made.pickled.get_cached(key)
