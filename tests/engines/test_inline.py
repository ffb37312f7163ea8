"""What is the inline engine's own: `MemoLock`, its clients and its memoized functions."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import inspect
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import pydantic
import pytest
import redis
import redis.asyncio
import uvloop

from celery_memolock import (
    MISS,
    ArgumentError,
    ConfigurationError,
    EncodeError,
    FlightFailed,
    MemoLock,
    OptionError,
    Progress,
    ReentrantFlight,
    StoreUnavailable,
    TaskFailed,
    WaitTimeout,
    aio,
    current_flight,
)
from celery_memolock.external import settle
from celery_memolock.server import Server
from celery_memolock.testing import Link
from tests.conftest import commands_run
from tests.workers.conftest import ROOT, in_background, until

COMMON: dict[str, Any] = {"ttl": 60, "lease": 1.0, "poll_interval": 0.5}


@pytest.fixture
def memo(server: Server, prefix: str) -> Iterator[MemoLock]:
    """A MemoLock of the test's own."""
    with MemoLock(server.url, prefix=prefix, **COMMON) as made:
        yield made


@pytest.fixture
def another(server: Server, prefix: str) -> Iterator[MemoLock]:
    """What another process would have: the same values, nothing else in common."""
    with MemoLock(server.url, prefix=prefix, **COMMON) as made:
        yield made


class Fetch:
    """What computes a value, counts how often, and waits for a gate if it is to."""

    def __init__(self, value: Any = "value", *, gated: bool = False) -> None:
        self.value = value
        self.ran = 0
        self.threads: list[threading.Thread] = []
        self.began = threading.Event()
        self.gate = threading.Event()
        if not gated:
            self.gate.set()

    def __call__(self, *_: Any) -> Any:
        self.ran += 1
        self.threads.append(threading.current_thread())
        self.began.set()
        assert self.gate.wait(20)
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


class Asked:
    """A client's methods, asked as they are or each through its twin for asyncio."""

    def __init__(self, client: Any, driver: str) -> None:
        self._client = client
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        if self._driver == "threads":
            return getattr(self._client, name)
        twin = getattr(self._client, f"a{name}")
        return lambda *args, **kwargs: asyncio.run(twin(*args, **kwargs))


def entry_of(memo: Any, key: Any) -> str:
    """Return the name of a value on the server."""
    name: str = memo._memo.call((key,), {}).keys.entry
    return name


def waiting(memo: Any, key: Any) -> int:
    """How many processes, or MemoLocks of one, wait for a key."""
    fields = memo._server.store._client.hkeys(memo._memo.call((key,), {}).keys.all[1])
    return sum(name.startswith(b"w:") for name in fields)


# ---- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ttl",
    [7, 7.5, timedelta(seconds=7), len, lambda value: timedelta(seconds=len(value))],
    ids=["int", "float", "timedelta", "function", "function of a timedelta"],
)
def test_ttl_of_a_call(memo: MemoLock, ttl: Any) -> None:
    """A number, a `timedelta`, or a function of the value."""
    assert memo.get("k", lambda: "a value", ttl=ttl) == "a value"
    client: redis.Redis = memo._server.store._client
    left: Any = client.pttl(entry_of(memo, "k"))
    assert 5_000 < left <= 7_500


def test_ttl_is_missing(server: Server, prefix: str) -> None:
    """Where nobody says for how long a value may be served, nothing is computed; what stores nothing needs no ttl."""
    fetch = Fetch()
    with MemoLock(server.url, prefix=prefix) as memo:
        for call in (
            lambda: memo.get("k", fetch),
            lambda: memo.set("k", 1),
            lambda: memo.refresh("k", fetch),
            lambda: memo.get_many(["k"], fetch),
            lambda: memo.client("kind").get("k", fetch),
            lambda: asyncio.run(memo.aget("k", fetch)),
            lambda: memo.memoize()(fetch.__call__),
        ):
            with pytest.raises(OptionError, match="ttl is missing"):
                call()
        assert memo.peek("k") is MISS
        assert memo.invalidate("k") is False
        assert memo.client("kind", ttl=5).get("k", fetch) == "value"
        assert memo.get("k", fetch, ttl=5) == "value"
    assert fetch.ran == 2


def test_cache_if_of_a_call(memo: MemoLock) -> None:
    """Whether a value is stored may be said by the call that computes it."""
    assert memo.get("k", lambda: 1, cache_if=lambda value: value > 1) == 1
    assert memo.peek("k") is MISS
    assert memo.get("k", lambda: 2, cache_if=lambda value: value > 1) == 2
    assert memo.peek("k") == 2


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
@pytest.mark.parametrize("ttl", [10**10, timedelta.max])
def test_for_ever(memo: MemoLock, ttl: Any, driver: str) -> None:
    """A value that is to be fresh for ever can be made stale all the same."""
    asked = Asked(memo, driver)
    asked.set("k", "old", ttl=ttl, stale_ttl=60)
    assert asked.get_entry("k", Fetch(), ttl=ttl, stale_ttl=60).state == "fresh"
    assert asked.expire("k", stale_ttl=60)
    assert asked.get_entry("k", Fetch(), ttl=ttl, stale_ttl=60).state == "stale"


@pytest.mark.parametrize("option", ["key", "tags"])
def test_coroutine_functions_of_a_client(memo: MemoLock, option: str) -> None:
    """Nobody would await what they give."""

    async def later(_: Any) -> Any:
        return "k"

    with pytest.raises(OptionError, match=f"{option}=.* must be a plain function"):
        memo.client("c", **{option: later})
    with pytest.raises(OptionError, match=r"tags=.* must be a plain function"):
        memo.get("k", Fetch(), tags=later)


def test_tags_of_a_call(memo: MemoLock) -> None:
    """A list of tags, or a function of the key; of a client, of a call to `get`, and of one to `set`."""
    by_key = memo.client("pages", tags=lambda page: [f"site {page[0]}"])
    by_key.get("a1", Fetch())
    by_key.get("b1", Fetch())
    memo.get("k1", Fetch(), tags=["site a"])
    memo.get("k2", Fetch(), tags=lambda key: [f"tag of {key}"])
    memo.set("k3", "value", tags=["site a"])
    assert memo.invalidate_tag("site a") == 3
    assert [by_key.peek("a1"), by_key.peek("b1"), memo.peek("k1"), memo.peek("k3")] == [MISS, "value", MISS, MISS]
    assert memo.invalidate_tag("tag of k2") == 1


def test_wait_timeout_of_a_call(memo: MemoLock) -> None:
    """Who waits may be in more of a hurry than the others."""
    fetch = Fetch(gated=True)
    runner = in_background(memo.get, "k", fetch)
    fetch.began.wait(20)
    with pytest.raises(WaitTimeout, match="no value of task"):
        memo.get("k", fetch, wait_timeout=0.1)
    fetch.gate.set()
    assert runner.result(20) == "value"


def test_time_out_of_a_crowd(memo: MemoLock) -> None:
    """Each of those who time out at once hears what it waited for, and few of them ask: threads, a loop, a batch."""
    fetch, client = Fetch(gated=True), memo.client("crowd", lease=60, poll_interval=60, max_poll_interval=60)
    runner = in_background(client.get, "k", fetch)
    fetch.began.wait(20)
    server = memo._server.store._client
    before = commands_run(server, "evalsha")

    async def ask() -> list[Any]:
        single = [client.aget("k", fetch, wait_timeout=2) for _ in range(500)]
        batch = client.aget_many(["k"] * 20, fetch, wait_timeout=2, return_exceptions=True)
        *errors, of_batch = await asyncio.gather(*single, batch, return_exceptions=True)
        return [*errors, *of_batch]

    in_loop = in_background(asyncio.run, ask())
    heard: list[Any] = []
    for each in [in_background(client.get, "k", fetch, wait_timeout=2) for _ in range(20)]:
        with pytest.raises(WaitTimeout) as caught:
            each.result(20)
        heard.append(caught.value)
    heard += in_loop.result(20)
    asked = commands_run(server, "evalsha") - before
    fetch.gate.set()
    assert runner.result(20) == "value"
    assert len(heard) == 540
    assert {(type(error), error.state, error.key) for error in heard} == {(WaitTimeout, "RUNNING", "crowd:1:k")}
    assert all(f"RUNNING for {error.seconds_in_state:.1f} s" in str(error) for error in heard)
    assert asked < 100  # looks and questions


def test_options_that_cannot_be_hashed(memo: MemoLock) -> None:
    """An option's value may be a dict or a list."""
    fetch = Fetch(KeyError("gone"))
    for _ in range(2):
        with pytest.raises(KeyError):
            memo.get("k", fetch, cache_errors={LookupError: 30}, tags=["a"])
    assert fetch.ran == 1
    with pytest.raises(OptionError, match="no type of exception"):
        memo.get("k", fetch, cache_errors={1: 30})


@pytest.mark.parametrize(
    "option",
    [{"nested": "dispatch"}, {"refresh_every": 5}, {"refresh_calls": [("k",)]}, {"skip_abandoned": True}],
    ids=lambda option: next(iter(option)),
)
def test_options_of_messages(memo: MemoLock, option: dict[str, Any]) -> None:
    """Nothing is sent here, so what says how is refused wherever it is given."""
    fetch = Fetch()
    for call in (
        lambda: MemoLock(ttl=1, **option),
        lambda: memo.client("kind", **option),
        lambda: memo.memoize(**option)(lambda key: key),
        lambda: memo.get("k", fetch, **option),
        lambda: memo.expire("k", **option),
    ):
        with pytest.raises(OptionError, match=f"{next(iter(option))} is for queues"):
            call()
    assert fetch.ran == 0


@pytest.mark.parametrize(
    "option",
    [
        {"serializer": "pickle"},
        {"accept": ("json",)},
        {"compression": "zstd"},
        {"prefix": "other"},
        {"version": 2},
        {"local_ttl": 5},
        {"typed": True},
        {"ignore": ("k",)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_the_stored_form(memo: MemoLock, option: dict[str, Any]) -> None:
    """What all callers of a value have to agree on cannot be said by one of them."""
    fetch = Fetch()
    with pytest.raises(OptionError, match="cannot be set for one call"):
        memo.get("k", fetch, **option)
    assert fetch.ran == 0


def test_wrong_options(memo: MemoLock) -> None:
    """A name that is none and a value that makes no sense are refused, also after one that is equal to it."""
    without_ttl = MemoLock(eager=True)
    for each in (memo, without_ttl, without_ttl.client("kind")):
        with pytest.raises(OptionError, match=r"unknown memolock option 'ttll' \(did you mean 'ttl'\?\); known are: "):
            each.get("k", Fetch(), ttll=5)
    assert memo.get("k", Fetch(), ttl=1) == "value"
    with pytest.raises(OptionError, match="ttl=True"):
        memo.get("k", Fetch(), ttl=True)
    with pytest.raises(OptionError, match="typed has no meaning"):
        memo.client("kind", typed=True)
    with pytest.raises(OptionError, match="ignore has no meaning"):
        memo.client("kind", ignore=("key",))


# ---- clients ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Day:
    """What a client of these tests names its values with."""

    site: str
    day: date


@dataclass
class Visits:
    """A value of a type of its own."""

    day: date
    count: int


class Page(pydantic.BaseModel):
    """Another."""

    title: str
    changed: date


DAY = Day("a", date(2026, 1, 2))


def visits_of(memo: MemoLock) -> Any:
    """Return a client with a key function, a type, a serializer and defaults of its own."""
    return memo.client(
        "visits", key=lambda day: f"{day.site}/{day.day}", of=Visits, serializer="msgpack", ttl=7, error_ttl=30
    )


def test_a_client(memo: MemoLock, another: MemoLock) -> None:
    """Its key function, its type, its serializer and its defaults hold for all of its methods, and in each process."""
    visits, elsewhere = visits_of(memo), visits_of(another)
    found = visits.get(DAY, lambda: Visits(DAY.day, 3))
    assert found == Visits(DAY.day, 3)
    assert elsewhere.peek(DAY) == found
    assert elsewhere.peek(DAY) is not found
    raw: Any = memo._server.store._client.get(entry_of(visits, DAY))
    assert b"\xa5count\x03" in raw, "no msgpack"
    elsewhere.set(DAY, Visits(DAY.day, 4))
    assert visits.get_many([DAY], Fetch()) == [Visits(DAY.day, 4)]
    assert visits.get_entry(DAY, Fetch()).value == Visits(DAY.day, 4)
    assert visits.invalidate_many([DAY, Day("b", DAY.day)]) == [True, False]
    failing = Fetch(KeyError("gone"))
    for each in (visits, elsewhere):
        with pytest.raises(KeyError):
            each.get(DAY, failing)
    assert failing.ran == 1
    assert visits.invalidate_all() == 0


def test_a_client_of_a_model(memo: MemoLock, another: MemoLock) -> None:
    """A pydantic model comes back as one, and what is none is no value."""
    pages, elsewhere = memo.client("pages", of=Page), another.client("pages", of=Page)
    page = Page(title="tea", changed=DAY.day)
    assert pages.get("tea", lambda: page) == page
    assert elsewhere.get("tea", Fetch()) == page
    with pytest.raises(EncodeError, match="changed"):
        pages.get("salt", lambda: {"title": 7})  # type: ignore[arg-type, return-value]
    assert pages.peek("salt") is MISS


def test_clients_are_apart(memo: MemoLock) -> None:
    """Each name has its values, and `invalidate_all` drops those alone."""
    ones, twos = memo.client("ones"), memo.client("twos")
    assert [each.get("k", Fetch(value)) for each, value in ((ones, 1), (twos, 2), (memo, 0))] == [1, 2, 0]
    assert ones.invalidate_all() == 1
    assert [ones.peek("k"), twos.peek("k"), memo.peek("k")] == [MISS, 2, 0]


def test_clients_of_names_with_colons(memo: MemoLock) -> None:
    """They are apart, too: a colon in a name begins neither its version nor a key."""
    users, of_one, profiles = (memo.client(name) for name in ("user", "user:1", "user:profile"))
    of_one.set("7", "of user:1")
    profiles.set("7", "profile")
    assert users.peek("1:7") is MISS
    assert users.invalidate_all() == 0
    assert [of_one.peek("7"), profiles.peek("7")] == ["of user:1", "profile"]
    assert profiles.invalidate_all() == 1


def test_wrong_keys(memo: MemoLock) -> None:
    """A key that is no text is an `ArgumentError`, of `get`, of a key function, and of each in a list."""
    fetch = Fetch()
    for key in (None, 5, "", b"k", ("k",), "{k}", "k\ud800"):
        with pytest.raises(ArgumentError):
            memo.get(key, fetch)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError):
            memo.get_many(["k", key], lambda key: key)  # type: ignore[list-item]
    numbers: Any = memo.client("numbers", key=lambda number: number)
    with pytest.raises(ArgumentError, match="gave 5"):
        numbers.get(5, fetch)
    broken: Any = memo.client("broken", key=lambda number: number.name)
    with pytest.raises(AttributeError, match="name"):  # an error of the function's own
        broken.get(5, fetch)
    assert fetch.ran == 0


# ---- errors ----------------------------------------------------------------------------------------------------


class Sold(Exception):
    """An error that can be rebuilt from its arguments."""


class Odd(Exception):
    """One that cannot."""

    def __init__(self, *, article: str) -> None:
        super().__init__(f"no {article}", article)


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
@pytest.mark.parametrize("error", [Sold("tea", 7), Odd(article="tea")], ids=["Sold", "Odd"])
def test_errors(memo: MemoLock, another: MemoLock, error: Exception, driver: str) -> None:
    """Who computes gets its own error, the very object; others get one like it, or a `TaskFailed` that names it."""
    fetch = Fetch(error, gated=True)

    def ask(memo: MemoLock) -> Any:
        return memo.get("k", fetch) if driver == "threads" else asyncio.run(memo.aget("k", fetch))

    runner = in_background(ask, memo)
    fetch.began.wait(20)
    waiters = [in_background(ask, each) for each in (memo, another)]
    until(lambda: waiting(memo, "k") == 2)
    time.sleep(0.05)  # the waiter of the same MemoLock is in no list of the server's
    fetch.gate.set()
    assert runner.exception(20) is error
    for waiter in waiters:
        told = waiter.exception(20)
        assert told is not error
        if isinstance(error, Sold):
            assert isinstance(told, Sold)
            assert told.args == ("tea", 7)
        else:
            assert isinstance(told, TaskFailed)
            assert told.type_name.endswith(":Odd")
            assert "no tea" in told.message
        assert "Remote" in type(told.__cause__).__name__
    assert fetch.ran == 1


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_cancelled_from_within(memo: MemoLock, driver: str) -> None:
    """A fetch that ends by a cancellation of its own is a failure for all, and ends nobody who waits."""
    ran: list[int] = []

    async def fetch() -> None:
        ran.append(1)
        inner = asyncio.ensure_future(asyncio.sleep(60))
        inner.cancel()
        await inner

    async def ask() -> list[Any]:
        return await asyncio.gather(*(memo.aget("k", fetch) for _ in range(3)), return_exceptions=True)

    if driver == "threads":
        with pytest.raises(FlightFailed, match="cancelled from within"):
            memo.get("k", fetch)
    else:
        assert [type(each) for each in asyncio.run(ask())] == [FlightFailed] * 3
    assert len(ran) <= 3, "a caller may come when the run of another is over, but computes once at the most"


def test_stop_iteration(memo: MemoLock, another: MemoLock) -> None:
    """It is no error that a future or a coroutine can carry: all hear of it as a `RuntimeError`, from each driver."""
    fetch = Fetch(StopIteration(7), gated=True)

    async def called() -> Any:
        return fetch()

    async def ask() -> list[Any]:
        asked = [asyncio.ensure_future(each.aget("k", fetch)) for each in (memo, another)]
        await asyncio.to_thread(fetch.began.wait, 20)
        while waiting(memo, "k") < 2:
            await asyncio.sleep(0.01)
        fetch.gate.set()
        one = await asyncio.gather(*asked, return_exceptions=True)
        return one + await asyncio.gather(memo.aget("k2", called), return_exceptions=True)

    found = asyncio.run(asyncio.wait_for(ask(), 20))
    for call in (
        lambda: memo.get("k", fetch),
        lambda: memo.get_many(["k"], fetch),
        MemoLock(eager=True).aget("k", fetch, ttl=1),
    ):
        with pytest.raises(RuntimeError, match="StopIteration") as raised:
            call() if callable(call) else asyncio.run(call)
        found.append(raised.value)
    assert [type(error) for error in found] == [RuntimeError] * 6


# ---- memoize ---------------------------------------------------------------------------------------------------


class Site:
    """A class with memoized methods."""

    def __init__(self, memo: MemoLock, name: str) -> None:
        self.name = name
        self.ran: list[str] = []

        class Inner(Site):
            @memo.memoize(name="one", ignore=("self",))
            def one(self, page: str = "index") -> str:
                self.ran.append(page)
                return f"{self.name} {page}"

            @memo.memoize(name="two", key=lambda self, page: f"{self.name}/{page}", local_ttl=30)
            async def two(self, page: str) -> str:
                self.ran.append(page)
                return f"{self.name} {page}"

            @staticmethod
            @memo.memoize(name="three")
            def three(page: str) -> str:
                return f"static {page}"

            @classmethod
            @memo.memoize(name="four", ignore=("cls",))
            def four(cls, page: str) -> str:
                return f"{cls.__name__} {page}"

        self.__class__ = Inner


def test_methods(memo: MemoLock) -> None:
    """A method's `self` is left out of the key, or is part of it; what it is bound to goes for all its methods."""
    site: Any = Site(memo, "a")
    assert [site.one(), site.one("index"), site.one(page="index")] == ["a index"] * 3
    assert site.ran == ["index"]
    assert site.one.peek() == site.one.peek("index") == type(site).one.peek(site, "index") == "a index"
    assert site.one.get_cached_many([("index",), ("tea",)]) == ["a index", "a tea"]
    assert site.one.with_options(force_refresh=True).get_cached("tea") == "a tea"
    assert site.ran == ["index", "tea", "tea"]
    assert [site.one.invalidate("tea"), site.one.invalidate("tea")] == [True, False]
    assert site.one.peek("index") == "a index"
    site.one.set_cached("set", "tea")
    assert site.one("tea") == "set"
    assert site.one.__wrapped__(site, "tea") == "a tea"


def test_methods_from_asyncio(memo: MemoLock) -> None:
    """So it is with coroutine functions, and where values are kept in the process."""
    sites: list[Any] = [Site(memo, name) for name in "ab"]

    async def ask() -> None:
        for _ in range(2):
            assert [await site.two("x") for site in sites] == ["a x", "b x"]
        assert await sites[0].two.ainvalidate("x") is True
        assert await sites[0].two.apeek("x") is MISS
        assert await sites[1].two.apeek("x") == "b x"

    asyncio.run(ask())
    assert [site.ran for site in sites] == [["x"], ["x"]]


def with_session(function: Any) -> Any:
    """Add an argument in front, behind the object of a method."""

    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, "session", *args, **kwargs)

    return wrapper


def traced(function: Any) -> Any:
    """Add nothing."""
    return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))


def test_decorated_methods(memo: MemoLock) -> None:
    """Below a decorator a method is one still, by whichever way it is called."""

    class Site:
        @memo.memoize(ignore=["self"])
        @with_session
        def page(self, session: str, name: str) -> str:
            return f"{session} {name}"

        @memo.memoize(ignore=["self"])
        @traced
        def plain(self, name: str) -> str:
            return name

        @classmethod
        @memo.memoize(ignore=["cls"])
        @traced
        def of_class(cls, name: str) -> str:
            return name

    site: Any = Site()
    of_class: Any = Site
    for name in ("a", "b"):
        assert site.page(name) == of_class.page.get_cached(site, name) == site.page.peek(name) == f"session {name}"
        assert site.plain(name) == site.plain(name=name) == site.plain.peek(name) == name
        assert of_class.of_class(name) == site.of_class(name) == name


def test_static_and_class_methods(memo: MemoLock) -> None:
    """`memoize` goes below the decorators of Python."""
    site: Any = Site(memo, "a")
    # From Python 3.13 on a class method does not tell what it wraps of its class.
    of_class: tuple[Any, ...] = (type(site),) if sys.version_info >= (3, 13) else ()
    for each in (site, type(site)):
        assert [each.three("x"), each.three.peek("x")] == ["static x"] * 2
        assert [each.four("x"), each.four.peek(*of_class, "x")] == ["Inner x"] * 2


def test_a_memoized_function(memo: MemoLock) -> None:
    """It looks like the function that it wraps, and `__wrapped__` is that one, which computes each time."""
    ran: list[Any] = []

    @memo.memoize(ttl=5)
    def area(width: int, height: int = 1) -> int:
        """Multiply."""
        ran.append((width, height))
        return width * height

    assert [area(2, 3), area(2, height=3), area(height=3, width=2)] == [6, 6, 6]
    assert ran == [(2, 3)]
    assert (area.__name__, area.__doc__) == ("area", "Multiply.")  # type: ignore[attr-defined]
    assert str(inspect.signature(area)) == "(width: 'int', height: 'int' = 1) -> 'int'"
    assert area.__wrapped__(2, 3) == 6
    assert len(ran) == 2
    with pytest.raises(TypeError, match="width"):
        area()  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="ttl"):
        memo.memoize(ttl=-1)(lambda: 1)


@MemoLock(eager=True, ttl=5).memoize()
def doubled(number: int) -> int:
    """A memoized function that is found by its name."""
    return 2 * number


class Prices:
    """A class whose memoized method is found by its name."""

    @MemoLock(eager=True, ttl=5).memoize(ignore=["self"])
    async def price(self, article: str) -> int:
        return len(article)


def test_pickling() -> None:
    """A memoized function, or method, is pickled and copied as functions are."""
    for each in (doubled, Prices.price):
        assert pickle.loads(pickle.dumps(each)) is each
        assert copy.copy(each) is copy.deepcopy(each) is each
    price = pickle.loads(pickle.dumps(Prices().price))
    assert asyncio.run(price("tea")) == 3


def test_what_cannot_be_memoized(memo: MemoLock) -> None:
    """What has no name needs one, and Python's own decorators of methods go above."""
    doubled = functools.partial(pow, 2)
    with pytest.raises(OptionError, match="a partial has no name"):
        memo.memoize()(doubled)
    assert memo.memoize(name="doubled")(doubled)(3) == 8
    for decorator in (staticmethod, classmethod):
        with pytest.raises(OptionError, match=f"below {decorator.__name__}"):
            memo.memoize()(decorator(lambda key: key))  # type: ignore[arg-type]
    wrong: Any = memo.memoize
    for misplaced in (5, lambda key: key, "name"):
        with pytest.raises(OptionError, match=r"write @memo\.memoize\(ttl=5\), with all options by name"):
            wrong(misplaced)


def test_a_coroutine_function(memo: MemoLock) -> None:
    """To call it is to be awaited; its blocking methods run it in a loop of their own."""
    loops: list[Any] = []

    @memo.memoize()
    async def double(number: int) -> int:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return 2 * number

    async def ask() -> tuple[int, Any]:
        return await double(1), asyncio.get_running_loop()

    value, loop = asyncio.run(ask())
    assert (value, loops) == (2, [loop])
    assert double.get_cached(2) == 4
    assert loops[1] is not loop
    assert memo.get("k", lambda: double.__wrapped__(3)) == 6


def test_a_blocking_call_in_a_loop(memo: MemoLock) -> None:
    """What would wait for a loop that it blocks itself is refused."""

    async def fetch() -> int:
        return 1

    async def ask() -> None:
        with pytest.raises(ConfigurationError, match="with an a in front"):
            memo.get("k", fetch)

    asyncio.run(ask())
    assert asyncio.run(memo.aget("k", fetch)) == 1


def test_the_loop_is_not_blocked(memo: MemoLock) -> None:
    """A plain function is run in a thread while the loop goes on, and a call that waits blocks it no more."""
    fetch = Fetch(gated=True)
    plain = memo.memoize(name="plain")(lambda key: fetch())

    async def ask() -> None:
        asked = [asyncio.ensure_future(each) for each in (plain.aget_cached("k"), plain.aget_cached("k"))]
        while not fetch.began.is_set():
            await asyncio.sleep(0)
        for _ in range(20):  # ticks, with the fetch under way all the time
            await asyncio.sleep(0.001)
        assert not any(each.done() for each in asked)
        fetch.gate.set()
        assert await asyncio.gather(*asked) == ["value"] * 2

    asyncio.run(ask())
    assert fetch.threads != [threading.main_thread()]
    assert fetch.ran == 1


def test_exit_does_not_wait_for_what_was_given_up(server: Server, prefix: str) -> None:
    """A process whose loop is in a thread ends, whatever a plain function still does in another."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _GIVES_UP, server.url, prefix], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "gave up\n", "")
    assert time.monotonic() - began < 20


_GIVES_UP = """
import asyncio, sys, threading
from celery_memolock import MemoLock

memo = MemoLock(sys.argv[1], prefix=sys.argv[2], ttl=60)
begun = threading.Event()

def fetch():
    begun.set()
    threading.Event().wait(40)

async def main():
    asked = asyncio.ensure_future(memo.aget("k", fetch))
    await asyncio.to_thread(begun.wait)
    asked.cancel()
    await asyncio.wait([asked])
    gave_up.set()
    await asyncio.sleep(40)

gave_up = threading.Event()
threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
gave_up.wait()
print("gave up")
"""


def test_threads_for_plain_functions() -> None:
    """At most so many calls run at a time, in as few threads as that takes; each has its result, or its error."""
    pool = aio.Daemons(2, "memolock-run-tested")
    gate = threading.Event()

    def name() -> str:
        return threading.current_thread().name

    def threads() -> list[bool]:
        return [each.daemon for each in threading.enumerate() if each.name == "memolock-run-tested"]

    assert pool.submit(name).result(10) == "memolock-run-tested"
    until(lambda: pool._free == 1)
    assert pool.submit(divmod, 7, 2).result(10) == (3, 1)
    assert threads() == [True]
    until(lambda: pool._free == 1)
    calls = [pool.submit(gate.wait, 20) for _ in range(5)]
    assert calls[4].cancel()
    assert threads() == [True] * 2
    assert not calls[2].running()
    gate.set()
    assert [each.result(10) for each in calls[:4]] == [True] * 4
    with pytest.raises(ZeroDivisionError):
        pool.submit(divmod, 1, 0).result(10)
    assert threads() == [True] * 2


def test_slow_functions_hold_up_nothing_else(
    memo: MemoLock, another: MemoLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many plain functions keep threads busy, the first use of a server and a cancellation need no turn."""
    fetch = Fetch(gated=True)
    pools = [ThreadPoolExecutor(2) for _ in range(2)]
    for name, pool in zip(("_threads", "_runners"), pools, strict=True):
        monkeypatch.setattr(aio, name, pool)

    async def quick() -> str:
        return "quick"

    async def ask() -> None:
        slow = [asyncio.ensure_future(memo.aget(f"k{number}", fetch)) for number in range(4)]
        while fetch.ran < 2:  # more do not run at a time
            await asyncio.sleep(0.01)
        assert await asyncio.wait_for(another.aget("k", quick), 10) == "quick"
        with pytest.raises(WaitTimeout):
            await another.aget("k0", fetch, wait_timeout=0.1)
        fetch.gate.set()
        assert await asyncio.gather(*slow) == ["value"] * 4

    try:
        asyncio.run(ask())
    finally:
        fetch.gate.set()
        for pool in pools:
            pool.shutdown()


# ---- waiting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["coroutine", "plain"])
def test_cancelled(memo: MemoLock, another: MemoLock, kind: str) -> None:
    """To cancel the caller that computes ends only its own waiting: the fetch goes on for the others."""
    fetch = Fetch(gated=True)

    async def called() -> Any:
        return await asyncio.to_thread(fetch)

    async def ask() -> None:
        what = called if kind == "coroutine" else fetch
        runner = asyncio.ensure_future(memo.aget("k", what))
        await asyncio.to_thread(fetch.began.wait, 20)
        waiters = [asyncio.ensure_future(each.aget("k", what)) for each in (memo, another)]
        while waiting(memo, "k") < 2:
            await asyncio.sleep(0.01)
        runner.cancel()
        with pytest.raises(asyncio.CancelledError):
            await runner
        fetch.gate.set()
        assert await asyncio.gather(*waiters) == ["value"] * 2

    asyncio.run(ask())
    assert fetch.ran == 1


def test_a_loop_that_ends(memo: MemoLock, another: MemoLock) -> None:
    """What is computed in a loop ends with it, and who waits takes over at once, not after the lease."""
    began = threading.Event()

    async def fetch() -> None:
        began.set()
        await asyncio.sleep(60)

    async def ask() -> None:
        with pytest.raises(WaitTimeout):
            await memo.aget("k", fetch, wait_timeout=0.2, lease=30)

    leaving = in_background(asyncio.run, ask())
    began.wait(20)
    assert in_background(another.get, "k", lambda: "taken over").result(10) == "taken over"
    leaving.result(10)


def test_computing_is_no_waiting(memo: MemoLock) -> None:
    """In a thread `wait_timeout` counts no time that the caller computes; in a loop it does, and the fetch goes on."""

    def fetch() -> str:
        time.sleep(0.3)
        return "value"

    assert memo.get("of a thread", fetch, wait_timeout=0.1) == "value"

    async def ask() -> Any:
        with pytest.raises(WaitTimeout):
            await memo.aget("of a loop", fetch, wait_timeout=0.1)
        return await memo.aget("of a loop", Fetch("another"))

    assert asyncio.run(ask()) == "value"


def test_many(memo: MemoLock) -> None:
    """One call for several keys: what is stored is read, what is missing computed, the first error raised."""
    memo.set("b", "stored")
    asked: list[str] = []

    def fetch(key: str) -> str:
        asked.append(key)
        return f"value of {key}"

    assert memo.get_many("abc", fetch) == ["value of a", "stored", "value of c"]
    assert asked == ["a", "c"]

    def failing(key: str) -> str:
        raise Sold(key)

    with pytest.raises(Sold, match="d"):
        memo.get_many("ade", failing)
    assert memo.get_many([], failing) == []

    async def called(key: str) -> str:
        asked.append(key)
        await asyncio.sleep(0)
        return f"value of {key}"

    async def ask() -> None:
        assert await memo.aget_many("abf", called, ttl=5) == ["value of a", "stored", "value of f"]
        assert await memo.aget_many("agb", fetch) == ["value of a", "value of g", "stored"]
        assert await memo.ainvalidate_many("abz") == [True, True, False]

    asyncio.run(ask())
    assert asked == ["a", "c", "f", "g"]


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_each_of_many_for_itself(memo: MemoLock, driver: str) -> None:
    """With `return_exceptions` the failure of one key stands in its place, and the others are done."""
    asked = Asked(memo, driver)
    assert asked.set_many({"a": 1, "b": 2}.items(), ttl=5) == [None, None]

    def fetch(key: str) -> str:
        if key == "sold":
            raise Sold(key)
        return f"value of {key}"

    found = asked.get_many(["a", "sold", "{", "c"], fetch, ttl=5, return_exceptions=True)
    assert [found[0], found[3]] == [1, "value of c"]
    assert [type(found[1]), type(found[2])] == [Sold, ArgumentError]
    done = asked.set_many([("a", 7), ("{", 8), ("b", object())], return_exceptions=True)
    assert [type(each) for each in done] == [type(None), ArgumentError, EncodeError]
    dropped = asked.invalidate_many(["a", "{", "z"], return_exceptions=True)
    assert [dropped[0], type(dropped[1]), dropped[2]] == [True, ArgumentError, False]
    assert [asked.peek(key) for key in "abc"] == [MISS, 2, "value of c"]
    for call in (lambda: asked.set_many([("{", 1)]), lambda: asked.invalidate_many(["{"])):
        with pytest.raises(ArgumentError):
            call()


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_progress_of_an_invalidation(memo: MemoLock, driver: str) -> None:
    """A tag, or all of a client, of many values is gone through in batches, and each is told of."""
    asked = Asked(memo.client("many", tags=["t"]), driver)
    for invalidate in (asked.invalidate_all, lambda **options: asked.invalidate_tag("t", **options)):
        asked.set_many((f"{number}", number) for number in range(1200))
        seen: list[int] = []
        assert invalidate(on_progress=seen.append) == 1200
        assert len(seen) > 2
        assert seen[-1] == 1200


# ---- in the background -----------------------------------------------------------------------------------------


def test_refresh(memo: MemoLock) -> None:
    """A value is computed anew beside its callers, who get the old one until then; a second refresh joins the first."""
    memo.set("k", "old")
    fetch = Fetch("new", gated=True)
    assert memo.refresh("k", fetch) is True
    fetch.began.wait(20)
    assert memo.get("k", Fetch()) == "old"
    fetch.gate.set()
    until(lambda: memo.peek("k") == "new")
    assert fetch.threads != [threading.current_thread()]


def test_refresh_from_asyncio(memo: MemoLock) -> None:
    """So it is in a loop, where it is the loop that goes on with it."""
    began, gate = asyncio.Event(), asyncio.Event()

    async def fetch() -> str:
        began.set()
        await gate.wait()
        return "new"

    async def ask() -> None:
        await memo.aset("k", "old")
        assert await memo.arefresh("k", fetch) is True
        await began.wait()
        assert await memo.aget("k", Fetch()) == "old"
        gate.set()
        while await memo.apeek("k") != "new":
            await asyncio.sleep(0.01)

    asyncio.run(ask())


def test_a_refresh_that_fails(memo: MemoLock) -> None:
    """It leaves the old value, and no trace of its own."""
    memo.set("k", "old")
    fetch = Fetch(Sold())
    memo.refresh("k", fetch)
    flight = memo._memo.call(("k",), {}).keys.all[1]
    until(lambda: fetch.ran and not memo._server.store._client.exists(flight))
    assert memo.get("k", Fetch()) == "old"


def test_expire(memo: MemoLock) -> None:
    """An expired value is stale: served where that is allowed, else computed anew."""
    memo.set("k", "old", stale_ttl=60)
    assert memo.expire("k", stale_ttl=60) is True
    assert memo.get_entry("k", Fetch("new", gated=False), stale_ttl=60).state == "stale"
    until(lambda: memo.peek("k") == "new")
    assert memo.expire("k") is True
    assert memo.peek("k") is MISS
    assert asyncio.run(memo.aexpire("k")) is False
    assert memo.get("k", Fetch("newest")) == "newest"


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_stale_while_revalidate(memo: MemoLock, driver: str) -> None:
    """A stale value is returned at once, however long it takes to compute the next one beside the caller."""
    options = {"stale_ttl": 60}
    memo.set("k", "old", **options)
    memo.expire("k", **options)
    fetch = Fetch("new", gated=True)

    async def ask() -> None:
        assert await memo.aget("k", fetch, **options) == "old"
        await asyncio.to_thread(fetch.began.wait, 20)
        assert await memo.aget("k", fetch, **options) == "old"
        fetch.gate.set()
        while await memo.apeek("k") != "new":
            await asyncio.sleep(0.01)

    if driver == "asyncio":
        asyncio.run(ask())
    else:
        assert memo.get("k", fetch, **options) == "old"
        fetch.began.wait(20)
        assert memo.get("k", fetch, **options) == "old"
        fetch.gate.set()
        until(lambda: memo.peek("k") == "new")
        assert fetch.threads != [threading.current_thread()]
    assert fetch.ran == 1


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_a_refresh_that_has_to_wait(memo: MemoLock, driver: str) -> None:
    """One that may not begin yet, as too many runs of its key are alive, begins when they have ended."""
    first, second = Fetch("first", gated=True), Fetch("second")
    runner = in_background(memo.get, "k", first, max_overlap=1)
    first.began.wait(20)
    memo.invalidate("k")  # so that it counts no more, and is alive

    async def ask() -> None:
        assert await memo.arefresh("k", second, max_overlap=1) is True
        while (
            not (fields := await asyncio.to_thread(memo._server.store._client.hgetall, flight))
            or fields[b"state"] != b"Q"
        ):
            await asyncio.sleep(0.01)
        first.gate.set()
        while await memo.apeek("k") != "second":
            await asyncio.sleep(0.01)

    flight = memo._memo.call(("k",), {}).keys.all[1]
    if driver == "asyncio":
        asyncio.run(ask())
    else:
        assert memo.refresh("k", second, max_overlap=1) is True
        until(lambda: memo._server.store._client.hget(flight, "state") == b"Q")
        first.gate.set()
        until(lambda: memo.peek("k") == "second")
    assert runner.result(20) == "first"
    assert [first.ran, second.ran] == [1, 1]


def test_slow_refreshes_hold_up_no_other_values(memo: MemoLock, another: MemoLock) -> None:
    """As many as run at a time hold up neither those of another MemoLock nor a refresh that is sent somewhere."""
    slow = Fetch(gated=True)
    try:
        for number in range(20):
            memo.refresh(f"k{number}", slow)
        until(lambda: slow.ran >= 8)
        another.set("k", "old", stale_ttl=60)
        another.expire("k", stale_ttl=60)
        assert another.get("k", Fetch("new"), stale_ttl=60) == "old"
        until(lambda: another.peek("k") == "new", 5)
    finally:
        slow.gate.set()


# ---- what a run says -------------------------------------------------------------------------------------------


def test_progress(memo: MemoLock) -> None:
    """In a loop the caller that computes hears how far its own run is, as those do who wait."""
    gates = [asyncio.Event() for _ in range(3)]

    @memo.memoize()
    async def reporting(key: str) -> str:
        for step, gate in enumerate(gates):
            current_flight.progress(step / 2, f"step {step}")
            await gate.wait()
        return key

    async def follow() -> list[float]:
        found = []
        async for progress in reporting.afollow("k"):
            found.append(progress.fraction)
            gates[len(found) - 1].set()
        return found

    async def ask() -> None:
        heard: list[Progress] = []
        patient = reporting.with_options(on_progress=heard.append)
        assert await follow() == [0.0, 0.5, 1.0]
        await reporting.ainvalidate("k")
        for gate in gates:
            gate.clear()
        asked = asyncio.ensure_future(patient.aget_cached("k"))
        for step in range(3):
            while len(heard) <= step:
                await asyncio.sleep(0.01)
            gates[step].set()
        assert await asked == "k"
        assert [each.message for each in heard] == ["step 0", "step 1", "step 2"]
        assert [progress async for progress in reporting.afollow("k")] == []

    asyncio.run(ask())


def test_follow(memo: MemoLock) -> None:
    """A client's fetch is followed until its value is there, or its error."""
    heard = asyncio.Event()

    async def fetch() -> str:
        current_flight.progress(0.5, "half")
        await heard.wait()
        return "value"

    async def failing() -> str:
        raise Sold

    async def ask() -> None:
        async for progress in memo.afollow("k", fetch, ttl=5):
            assert progress == Progress(0.5, "half")
            heard.set()
        assert heard.is_set()
        assert await memo.aget("k", failing) == "value"
        assert [progress async for progress in memo.afollow("k", failing)] == []
        with pytest.raises(Sold):
            _ = [progress async for progress in memo.afollow("another", failing)]

    asyncio.run(ask())


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_external(memo: MemoLock, driver: str) -> None:
    """With `external=True` the fetch hands its token out, and whoever has it brings the value."""
    tokens: list[str] = []

    def hand_out() -> str:
        tokens.append(current_flight.token)
        return "no value"

    def ask() -> Any:
        options: dict[str, Any] = {"external": True, "external_timeout": 30}
        return (
            memo.get("k", hand_out, **options)
            if driver == "threads"
            else asyncio.run(memo.aget("k", hand_out, **options))
        )

    asked = in_background(ask)
    until(lambda: tokens)
    assert settle(memo._server.store._client, tokens[0], {"price": 7}) == "OK"
    assert asked.result(20) == {"price": 7}
    assert memo.peek("k") == {"price": 7}
    assert len(tokens) == 1


def test_nested(memo: MemoLock) -> None:
    """A fetch may ask for other keys; one that asks for its own, if through others, hears so at once."""
    inner = Fetch(1)
    assert memo.get("outer", lambda: memo.get("inner", inner) + memo.get("inner", inner)) == 2
    assert inner.ran == 1
    with pytest.raises(ReentrantFlight, match="circle"):
        memo.get("circle", lambda: memo.get("between", lambda: memo.get("circle", inner)))

    async def around() -> Any:
        return await memo.aget("loop", across)

    async def across() -> Any:
        return await memo.aget("in between", around)

    with pytest.raises(ReentrantFlight, match="loop"):
        asyncio.run(around())
    assert [memo.peek(key) for key in ("circle", "between", "loop", "in between")] == [MISS] * 4


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_each_of_several_hears_its_own(memo: MemoLock, driver: str) -> None:
    """Of several that fail each raises its own error, though one caller computes them all."""

    async def fails(key: str) -> Any:
        await asyncio.sleep(0.01)
        raise LookupError(key)

    calls = [(key,) for key in "abc"]
    each = memo.memoize(name="each")(fails)
    if driver == "threads":
        found = each.get_cached_many(calls, return_exceptions=True)
    else:
        found = asyncio.run(each.aget_cached_many(calls, return_exceptions=True))
    assert [str(error) for error in found] == ["a", "b", "c"]


def test_many_are_computed_in_turn(memo: MemoLock, another: MemoLock) -> None:
    """What is not being computed yet is not claimed: others may begin it, so may a fetch of another one of them."""
    order: list[str] = []
    began, go_on = threading.Event(), threading.Event()

    def compute(key: str) -> Any:
        order.append(key)
        if key == "a":
            began.set()
            assert go_on.wait(20)
            return memo.get("c", lambda: compute("c")) + 1
        return {"b": 20, "c": 30}[key]

    asked = in_background(memo.get_many, ["a", "b", "c"], compute, max_crashes=1)
    assert began.wait(20)
    assert another.get("b", lambda: 2, max_crashes=1) == 2
    go_on.set()
    assert asked.result(20) == [31, 2, 30]
    assert order == ["a", "c"]


def test_the_patience_of_each_of_many(memo: MemoLock) -> None:
    """To compute the others takes nothing from a call's time to wait."""
    found = memo.get_many(["a", "b", "c"], lambda key: time.sleep(0.8) or "x" * 5000 + key, wait_timeout=2)
    assert len(found) == 3


@pytest.mark.parametrize("size", [10, 10_000])
def test_who_waits_beside_the_one_that_computes(memo: MemoLock, another: MemoLock, size: int) -> None:
    """A thread of the process that computes learns at once what comes from elsewhere, as all others do."""
    fetch = Fetch(gated=True)
    runner = in_background(memo.get, "k", fetch)
    assert fetch.began.wait(20)
    waiter = in_background(memo.get, "k", fetch)
    until(lambda: len(memo._server.store.inbox.rooms._flights) == 1 and _seats(memo) == 2)
    another.set("k", "x" * size)
    assert waiter.result(20) == "x" * size
    assert not runner.done()
    fetch.gate.set()
    assert runner.result(20)


def _seats(memo: MemoLock) -> int:
    return sum(len(room.seats) for room in memo._server.store.inbox.rooms._flights.values())


def test_cancelled_at_any_moment(memo: MemoLock, prefix: str) -> None:
    """Whenever a caller is cancelled, no flight is left that nobody runs."""
    client = memo._server.store._client

    async def one(moment: float, key: str) -> None:
        asked = asyncio.ensure_future(memo.aget(key, aone, lease=20))
        await asyncio.sleep(moment)
        asked.cancel()
        await asyncio.wait([asked])

    async def aone() -> int:
        return 1

    async def all_of_them() -> None:
        for number in range(200):
            await one(number * 0.00001, f"k{number}")

    asyncio.run(all_of_them())
    left = until(
        lambda: [name for name in client.scan_iter(f"{prefix}:1:f:*") if client.hget(name, "state") != b"Q"] or [0]
    )
    until(lambda: not [name for name in client.scan_iter(f"{prefix}:1:f:*") if client.hget(name, "state") != b"Q"])
    assert left is not None
    assert memo.get_many([f"k{number}" for number in range(200)], lambda _: 2, wait_timeout=2)


def test_time_out_of_a_look(server: Server, memo: MemoLock, another: MemoLock) -> None:
    """A caller whose time ends while the server is silent leaves nothing behind, though that one heard it after all."""
    client = memo._server.store._client
    assert asyncio.run(memo.aget("warm", lambda: 1)) == 1

    async def ask() -> None:
        await memo.aget("other", lambda: 1)
        client.execute_command("CLIENT", "PAUSE", 600, "WRITE")
        with pytest.raises(WaitTimeout):
            await memo.aget("k", lambda: 1, wait_timeout=0.2, lease=30)
        await asyncio.sleep(0.6)

    asyncio.run(ask())
    assert another.get("k", lambda: 2, wait_timeout=5) == 2


ABANDONED = """
import asyncio, sys
from celery_memolock import MemoLock

url, prefix, what = sys.argv[1:]
memo = MemoLock(url, prefix=prefix, ttl=60, lease=0.5)
loop = asyncio.new_event_loop()
if what == "look":
    loop.run_until_complete(memo.aget("warm", lambda: 1))
    memo._server.store._client.execute_command("CLIENT", "PAUSE", 300, "WRITE")

async def fetch():
    print("began", flush=True)
    began.set()
    await asyncio.sleep(1000)

began = asyncio.Event()

async def begin():
    task = asyncio.ensure_future(memo.aget("k", fetch))
    await (asyncio.sleep(0.1) if what == "look" else began.wait())

loop.run_until_complete(begin())
if what != "stopped":
    loop.close()
with MemoLock(url, prefix=prefix, ttl=60, lease=0.5) as another:
    print(another.get("k", lambda: 7, wait_timeout=25), memo.get("k", lambda: 8, wait_timeout=25))
"""


@pytest.mark.parametrize("what", ["stopped", "closed", "look"])
def test_loop_that_is_left_in_the_middle(server: Server, prefix: str, what: str) -> None:
    """A run, or a look, that nobody drives any more holds up nobody for longer than the run's lease."""
    command = [sys.executable, "-W", "ignore", "-c", ABANDONED, server.url, prefix, what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["7 7"], done.stderr
    assert ("began" in done.stdout) is (what != "look")


def test_loop_that_ends_in_mid_run(memo: MemoLock, another: MemoLock) -> None:
    """A plain function goes on in its thread when the loop of its caller ends, and the flight with it."""
    fetch = Fetch("first", gated=True)

    async def give_up() -> None:
        asking = asyncio.create_task(memo.aget("k", fetch))
        assert await asyncio.to_thread(fetch.began.wait, 20)
        asking.cancel()

    ended = in_background(asyncio.run, give_up())
    assert fetch.began.wait(20)
    waiter = in_background(another.get, "k", lambda: "a second run")
    pause = threading.Event()
    assert not pause.wait(1.5)
    assert not waiter.done()
    fetch.gate.set()
    assert waiter.result(20) == "first"
    ended.result(20)


def test_what_a_call_outside_of_the_flight_says(memo: MemoLock) -> None:
    """What is computed without a flight, though in a fetch, speaks of no flight: not of the outer one."""
    nowhere = MemoLock("redis://127.0.0.1:1/0", ttl=60, on_redis_error="compute")
    seen: list[bool] = []

    def inner() -> int:
        seen.append(bool(current_flight))
        current_flight.ttl = 0
        return 1

    async def ainner() -> int:
        return inner()

    assert memo.get("k", lambda: nowhere.get("k", inner)) == 1
    assert memo.get("a", lambda: asyncio.run(nowhere.aget("a", ainner))) == 1
    assert (memo.peek("k"), memo.peek("a"), seen) == (1, 1, [False, False])


def test_the_same_key_on_two_servers(memo: MemoLock, prefix: str) -> None:
    """A near and a far cache may use the same key."""
    with Server() as far, MemoLock(far.url, prefix=prefix, **COMMON) as second:
        assert memo.get("k", lambda: second.get("k", lambda: 7)) == 7
        with pytest.raises(ReentrantFlight):
            memo.get("c", lambda: second.get("c", lambda: memo.get("c", lambda: 7)))


def test_what_outlives_a_fetch_is_no_part_of_it(memo: MemoLock) -> None:
    """What a fetch started may ask for its key when it has ended."""

    async def later(ended: asyncio.Event) -> Any:
        await ended.wait()
        return await memo.aget("k", lambda: "a second run")

    async def ask() -> None:
        ended = asyncio.Event()
        started: list[asyncio.Task[Any]] = []

        async def fetch() -> str:
            started.append(asyncio.ensure_future(later(ended)))
            return "first"

        assert await memo.aget("k", fetch) == "first"
        ended.set()
        assert await started[0] == "first"

    asyncio.run(ask())


def test_progress_does_not_block_the_loop(memo: MemoLock) -> None:
    """A coroutine reports without waiting for the server."""

    async def fetch() -> float:
        began = time.monotonic()
        client.execute_command("CLIENT", "PAUSE", 2000, "ALL")
        for step in (0.0, 0.5, 1.0):
            current_flight.progress(step, f"step {step}")
        return time.monotonic() - began

    client = memo._server.store._client
    assert asyncio.run(memo.aget("k", fetch)) < 1


def test_local_caches_of_one_name(server: Server, memo: MemoLock, prefix: str) -> None:
    """Clients of one name, with prefixes or local limits of their own, share none of what is kept locally."""
    with MemoLock(server.url, prefix=f"{prefix}b", **COMMON) as other:
        first, second = (each.client("users", local_ttl=30) for each in (memo, other))
        brief = memo.client("users", local_ttl=0.2)
        assert [each.get("k", lambda: 1) for each in (first, second, brief)] == [1] * 3
        until(lambda: [each.get_entry("k", lambda: 1).source for each in (first, second)] == ["local"] * 2)
        client = redis.Redis.from_url(server.url)
        for each in (prefix, f"{prefix}b"):
            (name,) = client.scan_iter(f"{each}:1:e:*")
            client.delete(name)
        assert until(lambda: [each.get("k", lambda: 2) for each in (first, second)] == [2] * 2)


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_what_a_refresh_in_the_background_asks_for(memo: MemoLock, driver: str) -> None:
    """A fetch does not wait for the refresh of a stale value that it takes, so that may wait for the fetch."""
    stale: dict[str, Any] = {"stale_ttl": 60}
    asked = threading.Event()
    memo.get("inner", lambda: 0, **stale)
    memo.expire("inner", **stale)

    def outer() -> Any:
        found = memo.get("inner", inner, **stale)
        assert asked.wait(20)
        return found

    def inner() -> Any:
        asked.set()
        return memo.get("outer", lambda: "a second run") + 1

    async def aouter() -> Any:
        found = await memo.aget("inner", ainner, **stale)
        assert await asyncio.to_thread(asked.wait, 20)
        return found

    async def ainner() -> Any:
        asked.set()
        return await memo.aget("outer", aouter) + 1

    async def both() -> None:
        assert await memo.aget("outer", aouter) == 0
        while await memo.apeek("inner") != 1:
            await asyncio.sleep(0.01)

    if driver == "threads":
        assert memo.get("outer", outer) == 0
        until(lambda: memo.peek("inner") == 1)
    else:
        asyncio.run(asyncio.wait_for(both(), 20))


# ---- connections and processes ---------------------------------------------------------------------------------


def own_threads() -> set[threading.Thread]:
    """Return the threads that belong to some MemoLock."""
    pools = ("memolock-aio", "memolock-run", "memolock-send", "memolock-link")  # of the process, or of a test
    alive = threading.enumerate()
    return {each for each in alive if each.name.startswith("memolock-") and not each.name.startswith(pools)}


def use(memo: MemoLock) -> None:
    """Have all that a MemoLock starts started, as well in a loop."""
    fetch = Fetch(gated=True)
    runner = in_background(memo.get, "k", fetch, lease=0.1)
    fetch.began.wait(20)
    waiter = in_background(memo.get, "k", fetch)
    fetch.gate.set()
    assert [runner.result(20), waiter.result(20)] == ["value"] * 2
    kept = memo.client("kept", local_ttl=5)
    assert kept.get("k", lambda: 1) == 1
    assert asyncio.run(memo.aget("other", lambda: 2)) == 2
    memo.invalidate("k")
    memo.invalidate("other")


def test_close(server: Server, prefix: str) -> None:
    """After `close` no thread and no connection is left; and the object works again, until the next `close`."""
    before = own_threads()
    with Link(server.url) as link:
        memo = MemoLock(link.url, prefix=prefix, **COMMON)
        memo.close()  # it was never used
        for close in (memo.close, lambda: asyncio.run(memo.aclose()), memo.__exit__):
            use(memo)
            assert link.connections > 0
            assert own_threads() - before
            close()
            until(lambda: link.connections == 0)
            assert own_threads() == before
            memo.close()  # once more does no harm

        async def in_a_loop() -> None:
            async with MemoLock(link.url, prefix=prefix, **COMMON) as other:
                assert await other.aget("k", lambda: 1) == 1
            while link.connections:
                await asyncio.sleep(0.01)

        asyncio.run(in_a_loop())
        with MemoLock(link.url, prefix=prefix, **COMMON) as other:
            assert other.get("k", Fetch()) == 1
        until(lambda: link.connections == 0)
    assert own_threads() == before


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_close_while_others_wait(memo: MemoLock, another: MemoLock, driver: str) -> None:
    """Who waits hears so at once, and what is being computed is stored."""
    fetch = Fetch(gated=True)

    def ask(memo: MemoLock) -> Any:
        return memo.get("k", fetch) if driver == "threads" else asyncio.run(memo.aget("k", fetch))

    runner = in_background(ask, memo)
    fetch.began.wait(20)
    waiter = in_background(ask, another)
    until(lambda: waiting(memo, "k") == 2)
    another.close()
    with pytest.raises(StoreUnavailable, match="were closed while the call waited"):
        waiter.result(10)
    memo.close()
    fetch.gate.set()
    with pytest.raises(StoreUnavailable, match="were closed while the call waited"):
        runner.result(10)
    until(lambda: another.peek("k") == "value")
    assert fetch.ran == 1


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_close_waits_for_the_background(server: Server, prefix: str, driver: str) -> None:
    """What is computed beside its callers comes to its end."""
    fetch = Fetch("new", gated=True)

    async def ask() -> None:
        async with MemoLock(server.url, prefix=prefix, **COMMON) as memo:
            await memo.arefresh("k", called)

    async def called() -> Any:
        return await asyncio.to_thread(fetch)

    def use() -> None:
        with MemoLock(server.url, prefix=prefix, **COMMON) as memo:
            memo.refresh("k", fetch)

    closing = in_background(use) if driver == "threads" else in_background(asyncio.run, ask())
    fetch.began.wait(20)
    assert not closing.done()
    fetch.gate.set()
    closing.result(20)
    with MemoLock(server.url, prefix=prefix, **COMMON) as memo:
        assert memo.peek("k") == "new"


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_what_a_close_leaves_behind(
    another: MemoLock, server: Server, prefix: str, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes too long is another's at once, whether it was begun or not, and no lease is waited for."""
    monkeypatch.setattr("celery_memolock.engines.inline.LAST", 0.1)
    monkeypatch.setattr("celery_memolock.bounded._MOST_WORKING", 1)
    fetch = Fetch(gated=True)
    options: dict[str, Any] = {"prefix": prefix, **COMMON, "lease": 30.0}

    async def ask() -> None:
        async with MemoLock(server.url, **options) as memo:
            for key in ("k1", "k2"):
                await memo.arefresh(key, called)
            await asyncio.to_thread(fetch.began.wait, 20)
        await asyncio.to_thread(look)

    async def called() -> None:
        fetch.began.set()
        await asyncio.sleep(60)

    def look() -> None:
        for key in ("k1", "k2"):
            flight = another._memo.call((key,), {}).keys.all[1]
            fields: Any = another._server.store._client.hmget(flight, "state", "crashes")
            assert fields == [b"Q", b"0"]
            assert another.get(key, lambda: "anew", wait_timeout=10) == "anew"

    try:
        if driver == "asyncio":
            asyncio.run(ask())
        else:
            with MemoLock(server.url, **options) as memo:
                for key in ("k1", "k2"):
                    memo.refresh(key, fetch)
                fetch.began.wait(20)
            look()
    finally:
        fetch.gate.set()


EXIT = """
import time
memo.refresh("k", lambda: time.sleep(0.3) or "new")
if sys.argv[3:]:
    memo.close()
"""


#: There CPython starts no thread any more once the main one has ended, not even for those that still run (gh-113964).
NO_THREAD_AT_THE_END = (3, 12) <= sys.version_info < (3, 12, 3)


@pytest.mark.parametrize(
    "how", [pytest.param("", marks=pytest.mark.skipif(NO_THREAD_AT_THE_END, reason="CPython's gh-113964")), "closed"]
)
def test_the_end_of_a_process(memo: MemoLock, server: Server, prefix: str, how: str) -> None:
    """A script that ends waits for what it began in the background, whether it closes its MemoLock or not."""
    in_a_process(IN_A_PROCESS + EXIT, server, prefix, *[how][: bool(how)])
    assert memo.peek("k") == "new"


def test_a_forgotten_one(server: Server, prefix: str) -> None:
    """One that nobody holds any more closes itself."""
    with Link(server.url) as link:
        MemoLock(link.url, prefix=prefix, **COMMON).get("k", lambda: 1)

        def collected() -> bool:
            gc.collect()
            return link.connections == 0

        until(collected)


IN_A_PROCESS = """
import os, sys
from celery_memolock import MemoLock
memo = MemoLock(sys.argv[1], prefix=sys.argv[2], ttl=60)
"""

FORK = """
import asyncio
memo.get("before", lambda: 1)                # starts the listener and makes connections
pid = os.fork()
who = "child" if pid == 0 else "parent"
for key in (who, "a" + who):
    value = memo.get(key, lambda: key) if key == who else asyncio.run(memo.aget(key, lambda: key))
    assert memo.get("before", lambda: 2) == 1
    os.write(1, f"{value}\\n".encode())      # both write to one pipe: a line at once
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""

GREENLETS = """
import gevent, time
ran = []
def fetch():
    ran.append(1)
    time.sleep(0.1)                          # gevent's by now, so others come in meanwhile
    return "value"
for call in (lambda: memo.get("k", fetch), lambda: memo.get_many(["k"], lambda key: fetch())[0]):
    memo.invalidate("k")
    jobs = [gevent.spawn(call) for _ in range(100)]
    ticks = gevent.spawn(lambda: [time.sleep(0.01) for _ in range(5)])
    gevent.joinall([*jobs, ticks], raise_error=True)
    print(len(ran), {job.value for job in jobs})
memo.close()
"""


def in_a_process(code: str, server: Server, prefix: str, *arguments: str) -> list[str]:
    """Run some code with a MemoLock in a process of its own → the lines that it printed."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, server.url, prefix, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_fork_after_use(server: Server, prefix: str) -> None:
    """Parent and child both go on, each with a listener and connections of its own."""
    assert sorted(in_a_process(IN_A_PROCESS + FORK, server, prefix)) == ["achild", "aparent", "child", "parent"]


def test_gevent(server: Server, prefix: str) -> None:
    """With gevent's patches a hundred greenlets share one fetch, and the others go on."""
    code = f"from gevent import monkey; monkey.patch_all()\n{IN_A_PROCESS}{GREENLETS}"
    assert in_a_process(code, server, prefix) == ["1 {'value'}", "2 {'value'}"]


def test_a_client_as_argument(server: Server, prefix: str) -> None:
    """A `redis.Redis` gives its settings, and keeps its own connections, which `close` does not touch."""
    with redis.Redis.from_url(server.url, decode_responses=True, client_name="mine") as client:
        memo = MemoLock(client, prefix=prefix, **COMMON)
        assert memo.get("k", lambda: "é") == "é"
        assert asyncio.run(memo.aget("k", Fetch())) == "é"
        names: Any = [each["name"] for each in client.client_list()]
        assert names.count("mine") > 1
        memo.close()
        assert client.exists(entry_of(memo, "k")) == 1
        until(lambda: [each["name"] for each in client.client_list()].count("mine") == 1)
        memo.close()


def test_the_server(server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment may name it; what is no address is refused, and so is a client of another kind."""
    monkeypatch.setenv("MEMOLOCK_REDIS_URL", server.url)
    with MemoLock(prefix=prefix, ttl=5) as memo:
        assert memo.get("k", lambda: 1) == 1
    monkeypatch.delenv("MEMOLOCK_REDIS_URL")
    with pytest.raises(ConfigurationError, match="MEMOLOCK_REDIS_URL"):
        MemoLock(ttl=5).get("k", lambda: 1)
    with pytest.raises(ConfigurationError, match="redis of MemoLock cannot be used"):
        MemoLock("http://localhost", ttl=5).get("k", lambda: 1)
    for wrong in (redis.asyncio.Redis(), 5):
        with pytest.raises(ConfigurationError, match="not a "):
            MemoLock(wrong, ttl=5)  # type: ignore[arg-type]


def test_eager(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `eager=True` and no server all is computed in the caller, and nothing is kept."""
    monkeypatch.delenv("MEMOLOCK_REDIS_URL", raising=False)
    memo = MemoLock(eager=True, prefix=prefix, local_ttl=5, **COMMON)
    fetch = Fetch()
    double = memo.memoize(name="double")(lambda number: 2 * number)
    for _ in range(2):
        assert memo.get("k", fetch) == "value"
        assert asyncio.run(memo.aget("k", fetch)) == "value"
        assert double(2) == 4
        assert memo.get_many(["a", "b"], lambda key: key) == ["a", "b"]
    assert fetch.ran == 4
    assert fetch.threads[0] is threading.current_thread()
    memo.set("k", 1)
    assert memo.peek("k") is MISS
    assert [memo.invalidate("k"), memo.expire("k"), memo.refresh("k", fetch)] == [False] * 3
    assert [memo.invalidate_all(), memo.invalidate_tag("t")] == [0, 0]
    with pytest.raises(Sold):
        memo.get("k", Fetch(Sold()))
    memo.close()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("driver", ["threads", "asyncio"])
@pytest.mark.parametrize("option", ["ttl", "cache_if"])
def test_a_failing_function_of_an_option(server: Server, prefix: str, option: str, driver: str, eager: bool) -> None:
    """It is an error of the call and no missing server: it is raised after one run, by `get` and by `set`."""
    with MemoLock(server.url, eager=eager, prefix=prefix, **COMMON) as memo:
        fetch = Fetch()
        options: dict[str, Any] = {option: lambda value: value["missing"]}
        asked = Asked(memo, driver)
        with pytest.raises(OptionError, match=option):
            asked.get("k", fetch, **options)
        assert fetch.ran == 1
        with pytest.raises(OptionError, match=option):
            asked.set("k", "value", **options)


@pytest.mark.parametrize("driver", ["threads", "asyncio"])
def test_eager_with_a_server(server: Server, prefix: str, driver: str) -> None:
    """With a server values are kept, nothing is done beside the caller, and a server that goes away is no error."""
    with Link(server.url) as link, MemoLock(link.url, eager=True, prefix=prefix, **COMMON) as memo:

        def get(key: str, fetch: Any, **options: Any) -> Any:
            if driver == "threads":
                return memo.get(key, fetch, **options)
            return asyncio.run(memo.aget(key, fetch, **options))

        assert [get("k", Fetch(1)), get("k", Fetch(2))] == [1, 1]
        memo.expire("k", stale_ttl=60)
        assert get("k", Fetch(3), stale_ttl=60) == 1
        assert memo.peek("k") == 3, "it is refreshed before the call returns"
        assert memo.refresh("k", Fetch(4)) is True
        assert memo.peek("k") == 4
        with link.cut():
            assert get("k", Fetch(5)) == 5
        assert get("k", Fetch(6)) == 4


def test_no_server(server: Server, prefix: str) -> None:
    """Else a server that is away is an error, and nothing is computed."""
    fetch = Fetch()
    with Link(server.url) as link, MemoLock(link.url, prefix=prefix, **COMMON) as memo, link.cut():
        for call in (lambda: memo.get("k", fetch), lambda: asyncio.run(memo.aget("k", fetch)), lambda: memo.peek("k")):
            with pytest.raises(StoreUnavailable):
                call()  # type: ignore[no-untyped-call]
    assert fetch.ran == 0


def test_several_in_one_process(server: Server, prefix: str) -> None:
    """Those of one prefix and name share their values and fetches; each is closed for itself."""
    fetch = Fetch(gated=True)
    ours = [MemoLock(server.url, prefix=prefix, **COMMON) for _ in range(3)]
    asked = [in_background(each.get, "k", fetch) for each in ours for _ in range(2)]
    until(lambda: waiting(ours[0], "k") == 3)
    ours_by_name = MemoLock(server.url, prefix=prefix, name="other", **COMMON)
    assert ours_by_name.get("k", lambda: "of another name") == "of another name"
    with MemoLock(server.url, prefix=f"{prefix}-2", **COMMON) as apart:
        assert apart.get("k", lambda: "of another prefix") == "of another prefix"
    fetch.gate.set()
    assert [each.result(20) for each in asked] == ["value"] * 6
    assert fetch.ran == 1
    for each in ours:
        each.close()
    assert ours_by_name.get("k", Fetch()) == "of another name"
    ours_by_name.close()


def test_several_loops(memo: MemoLock) -> None:
    """Loops of several threads, some of them uvloop's, and threads without one share a fetch."""
    fetch = Fetch(gated=True)
    ways: list[Callable[[], Any]] = [
        *(lambda run=run: run(ask()) for run in (asyncio.run, uvloop.run) for _ in range(2)),
        lambda: [memo.get("k", fetch)] * 5,
    ]

    async def ask() -> list[Any]:
        return await asyncio.gather(*(memo.aget("k", fetch) for _ in range(5)))

    with ThreadPoolExecutor(len(ways)) as pool:
        asked = [pool.submit(way) for way in ways]
        fetch.began.wait(20)
        fetch.gate.set()
        assert [each.result(20) for each in asked] == [["value"] * 5] * 5
    assert fetch.ran == 1


def test_uvloop(memo: MemoLock) -> None:
    """All of it works on uvloop: values, errors, a refresh beside the caller, and a cancelled caller."""

    async def fetch() -> int:
        await asyncio.sleep(0.01)
        return 1

    async def ask() -> None:
        assert await asyncio.gather(*(memo.aget("k", fetch) for _ in range(50))) == [1] * 50
        with pytest.raises(Sold):
            await memo.aget("failing", Fetch(Sold()))
        assert await memo.arefresh("k", Fetch(2)) is True
        while await memo.apeek("k") != 2:
            await asyncio.sleep(0.01)
        runner = asyncio.ensure_future(memo.aget("cancelled", fetch))
        await asyncio.sleep(0.005)
        runner.cancel()
        assert await memo.aget("cancelled", fetch) == 1

    uvloop.run(ask())
