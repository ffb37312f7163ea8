"""Steps of the protocol on real servers, driven as callers and workers drive them, by threads and by an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis

from celery_memolock import ConfigurationError, StoreUnavailable
from celery_memolock.codec import Codec, Entry, Packed, pack_error
from celery_memolock.effects import (
    Acquire,
    Attempts,
    Claim,
    Confirm,
    Defer,
    Disown,
    Done,
    Expire,
    Hold,
    Invalidate,
    Leave,
    Put,
    Renew,
    Requeue,
    Run,
    Settle,
    Skip,
    Waiting,
    Withdraw,
    Won,
    new_nonce,
)
from celery_memolock.keys import Keys
from celery_memolock.options import Options
from celery_memolock.protocol import Place
from celery_memolock.server import Server
from celery_memolock.store import Store, Stores
from celery_memolock.testing import Link
from tests.contract.conftest import Open
from tests.workers.shop import FromAsyncio

OPTIONS = Options(ttl=60)
BRIEF = Options(ttl=60, lease=0.2, dispatch_lease=0.1)
CODEC = Codec("t", OPTIONS)
FAILED = pack_error(KeyError("k"))


@pytest.fixture
def store(any_server: Server, prefix: str, open_store: Open) -> Store:
    """A store at each kind of server, for each driver."""
    made: Store = open_store(any_server.url, prefix)
    return made


@pytest.fixture
def client(any_server: Server) -> Iterator[redis.Redis]:
    """A plain client of the same server."""
    with redis.Redis.from_url(any_server.url) as made:
        yield made


@pytest.fixture
def keys(prefix: str) -> Keys:
    """A key that no other test uses."""
    return Keys.of(prefix, f"t:1:{new_nonce()}")


def acquire(store: Store, keys: Keys, options: Options = OPTIONS, **changed: Any) -> Any:
    values: dict[str, Any] = {"nonce": new_nonce(), "mode": "miss", "seen": "", "following": "", "register": 1}
    values["wanted"] = 30.0
    return store.run(Acquire(keys, options, park=30.0, crashed=FAILED, **{**values, **changed}))


def claim(store: Store, keys: Keys, fence: str, options: Options = OPTIONS, **changed: Any) -> Any:
    values: dict[str, Any] = {"nonce": new_nonce(), "holder": "h/1/2", "retries": 0, "redelivered": False}
    return store.run(Claim(keys, options, fence, park=30.0, crashed=FAILED, **{**values, **changed}))


def settle(store: Store, keys: Keys, run: Run, value: Any, fleeting: bool = False) -> str:
    return str(store.run(Settle(keys, run, "V", CODEC.pack(value), 60.0, 60.0, 30.0, fleeting)))


def listening(client: redis.Redis, store: Store) -> Any:
    """Listen to the store's own channel beside it."""
    pubsub = client.pubsub(ignore_subscribe_messages=False)
    pubsub.subscribe(store.inbox.channel)
    assert pubsub.get_message(timeout=5)["type"] == "subscribe"
    return pubsub


def until(true: Any) -> Any:
    """Ask again and again, up to ten seconds."""
    for _ in range(1000):
        found = true()
        if found:
            return found
        threading.Event().wait(0.01)
    raise AssertionError("it never became true")


def test_the_way_of_a_flight(store: Store, client: redis.Redis, keys: Keys) -> None:
    """PENDING, QUEUED, RUNNING, settled; and each key on the way has a time to live."""
    won = acquire(store, keys, Options(ttl=60))
    assert isinstance(won, Won)
    assert acquire(store, keys).state == "P"
    assert store.run(Confirm(keys, won.fence, 300.0)) is True
    assert acquire(store, keys).state == "Q"
    run = claim(store, keys, won.fence, Options(ttl=60))
    assert run == Run(won.fence, 1)
    assert store.run(Confirm(keys, won.fence, 300.0)) is False
    assert acquire(store, keys).state == "R"
    for name in client.scan_iter(f"*{keys.tag}*"):
        assert client.pttl(name) > 0
    assert settle(store, keys, run, [1]) == "OK"
    done = acquire(store, keys)
    assert isinstance(done, Done)
    assert CODEC.unpack(Entry.parse(done.raw)) == [1]
    assert client.pttl(keys.entry) > 0
    assert not client.exists(keys.all[1])


def test_repeated_win(store: Store, keys: Keys) -> None:
    """A winner whose reply was lost asks again, and is still the winner."""
    nonce = new_nonce()
    assert acquire(store, keys, nonce=nonce).fence == acquire(store, keys, nonce=nonce).fence
    assert isinstance(acquire(store, keys), Waiting)


def test_expired_between_a_run_and_its_retry(store: Store, keys: Keys) -> None:
    """A run that goes on beside its own retry read older data: another run is asked for after it."""
    run = claim(store, keys, acquire(store, keys).fence)
    assert store.run(Requeue(keys, run, 1, 30.0)) == "OK"
    store.run(Expire(keys, 60.0))
    assert settle(store, keys, run, "old") == "AGAIN"


def test_won_and_claimed_in_one_step(store: Store, client: redis.Redis, keys: Keys) -> None:
    """A winner that computes claims its flight as it acquires it; a repeat finds it so, and others wait for the run."""
    nonce = new_nonce()
    won = acquire(store, keys, nonce=nonce, holder="h/1/2")
    assert won.run == Run(won.fence, 1)
    assert acquire(store, keys, nonce=nonce, holder="h/1/2").run == won.run
    assert client.hmget(keys.all[1], "holder", "attempt", "state") == [b"h/1/2", b"1", b"R"]
    assert (acquire(store, keys, holder="h/1/3").state, acquire(store, keys).fence) == ("R", won.fence)
    assert isinstance(claim(store, keys, won.fence), Skip)
    assert settle(store, keys, won.run, 1) == "OK"
    assert CODEC.unpack(Entry.parse(acquire(store, keys).raw)) == 1


def test_not_claimed_beside_too_many_runs(store: Store, keys: Keys) -> None:
    """Where `max_overlap` runs of the key are alive it is won only, and waits for its claim."""
    for _ in range(OPTIONS.max_overlap):
        assert acquire(store, keys, holder="h/1/2").run is not None
        store.run(Invalidate(keys, new_nonce(), 30.0))
    won = acquire(store, keys, holder="h/1/2")
    assert won.run is None
    assert isinstance(claim(store, keys, won.fence), Defer)


def test_take_over_doubles_the_lease(store: Store, keys: Keys) -> None:
    """Each take-over of a flight that nobody claimed may last twice as long, up to sixteen times."""
    leases = []
    for _ in range(3):
        won = until(lambda: (reply := acquire(store, keys, BRIEF)) and isinstance(reply, Won) and reply)
        leases.append(round(won.lease, 3))
    assert leases == [0.1, 0.2, 0.4]


def test_take_over_of_a_silent_run(store: Store, client: redis.Redis, keys: Keys) -> None:
    """A run without a sign of life is taken over; its waiters are rung, and its outcome is refused."""
    heard = listening(client, store)
    first = acquire(store, keys)
    run = claim(store, keys, first.fence)
    assert store.run(Renew(keys, run, 0.2)) == "CONTINUE"
    second = until(lambda: (reply := acquire(store, keys)) and isinstance(reply, Won) and reply)
    assert heard.get_message(timeout=5)["data"] == first.fence.encode() + b"\n"
    assert settle(store, keys, run, "late") == "REFUSED"
    assert store.run(Renew(keys, run, 0.2)) == "LOST"
    assert not client.exists(keys.entry)
    assert second.fence > first.fence


def test_late_sign_of_life_revives(store: Store, keys: Keys) -> None:
    """Until somebody takes over, a renewal after the lease revives it, and an outcome counts."""
    won = acquire(store, keys)
    run = claim(store, keys, won.fence, BRIEF)
    threading.Event().wait(0.3)
    assert store.run(Renew(keys, run, 60.0)) == "CONTINUE"
    assert isinstance(acquire(store, keys), Waiting)
    assert settle(store, keys, run, 1) == "OK"


def test_heartbeat(store: Store, keys: Keys) -> None:
    """The heartbeat keeps the lease of a run for as long as it is held."""
    won = acquire(store, keys)
    run = claim(store, keys, won.fence, Options(ttl=60, lease=1))
    store.hold(Hold(keys, run, 1.0, 60.0))
    for _ in range(100):
        assert isinstance(acquire(store, keys), Waiting)
        threading.Event().wait(0.02)
    store.release(run)
    until(lambda: isinstance(acquire(store, keys), Won))


def test_older_message_does_the_work(store: Store, keys: Keys) -> None:
    """Under a backlog the first message to arrive runs the current flight; the newer message then finds it running."""
    old = acquire(store, keys, BRIEF)
    new = until(lambda: (reply := acquire(store, keys)) and isinstance(reply, Won) and reply)
    assert claim(store, keys, old.fence, Options(ttl=60)) == Run(new.fence, 1)
    assert "duplicate" in claim(store, keys, new.fence).reason
    assert isinstance(claim(store, keys, new.fence, redelivered=True), Defer)


def test_notices(store: Store, client: redis.Redis, prefix: str) -> None:
    """A small outcome rides along with its notice; for a larger one the notice says: look again."""
    heard = listening(client, store)
    for value, rides in (("x" * 3000, True), ("x" * 5000, False)):
        keys = Keys.of(prefix, f"t:1:{new_nonce()}")
        won = acquire(store, keys)
        settle(store, keys, claim(store, keys, won.fence), value)
        fence, _, raw = heard.get_message(timeout=5)["data"].partition(b"\n")
        assert fence.decode() == won.fence
        assert raw == (client.get(keys.entry) if rides else b"")


def test_fleeting_value_is_parked(store: Store, keys: Keys) -> None:
    """A value that may be gone before a waiter looks is kept for those who wait."""
    won = acquire(store, keys)
    run = claim(store, keys, won.fence)
    store.run(Settle(keys, run, "V", CODEC.pack(1), 0.01, 0.01, 30.0, True))
    threading.Event().wait(0.05)
    assert isinstance(acquire(store, keys, following=won.fence), Done)
    assert isinstance(acquire(store, keys), Won)


def test_error_back_off(store: Store, client: redis.Redis, keys: Keys) -> None:
    """A failed key gives its error to new callers for `error_ttl`; invalidating, or setting, clears that."""
    for clear in (
        lambda: store.run(Invalidate(keys, new_nonce(), 30.0)),
        lambda: store.run(Put(keys, "a", CODEC.pack(1), 60, 60, 30, False)),
    ):
        won = acquire(store, keys)
        run = claim(store, keys, won.fence)
        store.run(Settle(keys, run, "E", FAILED, 60.0, 60.0, 30.0))
        done = acquire(store, keys)
        assert Entry.parse(done.raw).failed
        clear()
        assert not client.exists(keys.all[2])


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("told_by", ["a caller", "a redelivery", "the main process"])
def test_error_back_off_of_what_no_run_told(store: Store, keys: Keys, told_by: str, refresh: bool) -> None:
    """So does one whose worker died; not if a refresh was asked for meanwhile, which falls to the next caller."""
    options = Options(ttl=60, lease=60, dispatch_lease=60, max_crashes=1, error_ttl=60)
    run = claim(store, keys, acquire(store, keys).fence, BRIEF if told_by != "the main process" else options)
    if refresh:
        assert isinstance(acquire(store, keys, mode="force", register=None), Waiting)
    if told_by == "the main process":
        assert store.run(Disown(keys, run.fence, "h/1/2", FAILED, 30.0, 60.0))
    elif told_by == "a caller":
        until(lambda: isinstance(acquire(store, keys, options, following=run.fence), Done))
    else:
        until(lambda: "too many" in getattr(claim(store, keys, run.fence, options, redelivered=True), "reason", ""))
    assert Entry.parse(acquire(store, keys, following=run.fence).raw).failed
    assert isinstance(acquire(store, keys, options), Won if refresh else Done)


def test_error_of_a_run_moved_aside_is_not_kept(store: Store, keys: Keys) -> None:
    """Nor is one of a flight that an invalidation moved aside: newcomers want another run anyway."""
    run = claim(store, keys, acquire(store, keys).fence)
    store.run(Invalidate(keys, new_nonce(), 30.0))
    assert store.run(Disown(keys, run.fence, "h/1/2", FAILED, 30.0, 60.0))
    assert isinstance(acquire(store, keys), Won)


def test_detached_outcome_is_for_its_waiters_alone(store: Store, client: redis.Redis, keys: Keys) -> None:
    """What an invalidation moved aside is parked for those who follow it, and never stored."""
    won = acquire(store, keys)
    run = claim(store, keys, won.fence)
    store.run(Invalidate(keys, new_nonce(), 30.0))
    assert acquire(store, keys, following=won.fence).fence == won.fence
    newcomer = acquire(store, keys)
    assert isinstance(newcomer, Won)
    assert store.run(Renew(keys, run, 10.0)) == "DETACHED"
    assert settle(store, keys, run, "old") == "DETACHED"
    assert isinstance(acquire(store, keys, following=won.fence), Done)
    assert isinstance(acquire(store, keys), Waiting)
    assert not client.exists(keys.entry)


def test_overlap_is_bounded(store: Store, keys: Keys) -> None:
    """However often a key is invalidated, at most two of its runs are alive."""
    long = Options(ttl=60)
    for _ in range(2):
        assert isinstance(claim(store, keys, acquire(store, keys).fence, long), Run)
        store.run(Invalidate(keys, new_nonce(), 30.0))
    third = acquire(store, keys)
    deferred = claim(store, keys, third.fence, long)
    assert isinstance(deferred, Defer)
    assert 0 < deferred.delay <= 10


def test_retry_that_the_server_did_not_hear_of(store: Store, keys: Keys) -> None:
    """Its message says that it is a later one; it waits for the lease of the earlier run, which may be alive."""
    won = acquire(store, keys)
    first = claim(store, keys, won.fence, replace(BRIEF, lease=1.0))
    assert isinstance(claim(store, keys, won.fence, retries=1), Defer)
    run = until(lambda: found if isinstance(found := claim(store, keys, won.fence, retries=1), Run) else None)
    assert run == Run(won.fence, 2)
    assert settle(store, keys, first, "old") == "REFUSED"


def test_old_message_does_not_cut_a_retry_short(store: Store, keys: Keys) -> None:
    """A message of an older flight does not run the current one before its retry is due, nor count from the start."""
    slow = Options(ttl=60, dispatch_lease=0.05)
    old = acquire(store, keys, slow)
    new = until(lambda: found if isinstance(found := acquire(store, keys, slow), Won) else None)
    run = claim(store, keys, new.fence)
    assert store.run(Requeue(keys, run, 1, 60.0)) == "OK"
    assert isinstance(claim(store, keys, old.fence), Skip)
    assert claim(store, keys, new.fence, retries=1) == Run(new.fence, 2)


def test_refresh_between_a_run_and_its_retry(store: Store, keys: Keys) -> None:
    """With ``retry(throw=False)`` the earlier run may settle; a refresh that was asked for meanwhile still comes."""
    run = claim(store, keys, acquire(store, keys).fence)
    assert store.run(Requeue(keys, run, 1, 60.0)) == "OK"
    assert isinstance(acquire(store, keys, mode="force"), Waiting)
    assert settle(store, keys, run, "old") == "AGAIN"


def test_refresh_before_a_retry_needs_no_other(store: Store, keys: Keys) -> None:
    """A run that began after the refresh was asked for is all that was wanted."""
    won = acquire(store, keys)
    run = claim(store, keys, won.fence)
    assert isinstance(acquire(store, keys, mode="force"), Waiting)
    assert store.run(Requeue(keys, run, 1, 60.0)) == "OK"
    assert settle(store, keys, claim(store, keys, won.fence, retries=1), "new") == "OK"


@pytest.mark.parametrize("holder", ["", "h/1/2"])
def test_withdrawn_win(store: Store, keys: Keys, holder: str) -> None:
    """A caller that does not learn that it won leaves no flight behind that nobody runs; that is no crash."""
    acquire(store, keys, nonce="lost", holder=holder)
    store.run(Withdraw(keys, "lost", 30.0))
    assert isinstance(acquire(store, keys, replace(OPTIONS, max_crashes=1), holder=holder), Won)


@pytest.mark.parametrize("mode", ["miss", "force"])
def test_withdrawn_before_it_came(store: Store, client: redis.Redis, keys: Keys, mode: str) -> None:
    """It begins nothing when it comes after all."""
    store.run(Withdraw(keys, "late", 30.0))
    acquire(store, keys, nonce="late", mode=mode, holder="h/1/2")
    assert client.exists(keys.all[1]) == 0


def test_withdrawn_look(store: Store, keys: Keys) -> None:
    """What another call won, and runs, is not touched."""
    run = claim(store, keys, acquire(store, keys).fence)
    acquire(store, keys, nonce="lost")
    store.run(Withdraw(keys, "lost", 30.0))
    assert settle(store, keys, run, 7) == "OK"


@pytest.mark.parametrize("since", ["nothing", "a flight", "a value"])
def test_refresh_before_an_invalidation(store: Store, keys: Keys, since: str) -> None:
    """A run that was moved aside is followed by the one that was asked for, unless another began after it."""
    run = claim(store, keys, acquire(store, keys).fence)
    assert isinstance(acquire(store, keys, mode="force", register=None), Waiting)
    store.run(Invalidate(keys, new_nonce(), 30.0))
    if since == "a flight":
        assert isinstance(acquire(store, keys), Won)
    elif since == "a value":
        store.run(Put(keys, new_nonce(), CODEC.pack(1), 60.0, 60.0, 30.0, False))
    assert settle(store, keys, run, "old") == ("AGAIN" if since == "nothing" else "DETACHED")
    assert Entry.parse(acquire(store, keys, following=run.fence).raw).fence == run.fence


def test_leave_removes_only_its_own(store: Store, client: redis.Redis, keys: Keys) -> None:
    """A registration is removed by its own sequence, and not by an older one."""
    won = acquire(store, keys, register=1)
    acquire(store, keys, register=2)
    store.run(Leave(keys, Place(won.fence, 1)))
    assert [name for name in client.hkeys(keys.all[1]) if name.startswith(b"w:")]  # type: ignore[union-attr]
    state, _ = store.run(Leave(keys, Place(won.fence, 2)))
    assert state == "P"
    assert not [name for name in client.hkeys(keys.all[1]) if name.startswith(b"w:")]  # type: ignore[union-attr]


def test_attempts(store: Store, keys: Keys) -> None:
    """How often a worker has begun a flight is known while that goes on."""
    assert store.ask(Attempts(keys, "")) == 0
    won = acquire(store, keys)
    assert store.ask(Attempts(keys, won.fence)) == 0
    run = claim(store, keys, won.fence)
    assert store.run(Requeue(keys, run, 1, 30.0)) == "OK"
    for fence in (won.fence, ""):
        assert store.ask(Attempts(keys, fence)) == 1
    assert store.ask(Attempts(keys, "17-abc")) == 0


def test_flushed_scripts(store: Store, client: redis.Redis, keys: Keys) -> None:
    """Scripts that the server has forgotten are sent again, one by one and in a pipeline."""
    won = acquire(store, keys)
    client.script_flush()
    run = claim(store, keys, won.fence)
    client.script_flush()
    assert store.run_all([Renew(keys, run, 1.0), Renew(keys, Run("1-a", 1), 1.0)]) == ["CONTINUE", "LOST"]


def test_full_server(store: Store, prefix: str, keys: Keys, any_server: Server) -> None:
    """A full server refuses new flights, and a small outcome of one that runs still reaches its waiters."""
    with redis.Redis.from_url(any_server.url) as client:
        heard = listening(client, store)
        run = claim(store, keys, acquire(store, keys).fence)
        client.config_set("maxmemory", "1")
        try:
            with pytest.raises(StoreUnavailable, match="refused a command"):
                acquire(store, Keys.of(prefix, "t:1:other"))
            assert settle(store, keys, run, "small") == "OK"
            assert b"small" in heard.get_message(timeout=5)["data"]
        finally:
            client.config_set("maxmemory", "0")


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server of one test alone, to be struck by its faults."""
    with Server() as started:
        yield started


def test_frozen_server_holds_nobody_beyond_its_patience(
    own_server: Server, open_store: Open, prefix: str, keys: Keys
) -> None:
    """Who has little time passes that on to the socket; so does giving up a registration, where no time is left."""
    store = open_store(own_server.url, prefix)
    assert isinstance(acquire(store, keys), Won)
    own_server.freeze()
    for ask in (
        lambda: store.get(keys, 0.1),
        lambda: acquire(store, keys, wanted=0.1),
        lambda: store.run(Leave(keys, Place("", 1))),
    ):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="did not answer in time"):
            ask()
        assert time.monotonic() - began < 4  # of the five seconds of the connection's own time-out
    own_server.thaw()
    assert isinstance(acquire(store, keys), Won | Waiting)


def test_refused_subscription(own_server: Server, open_store: Open, prefix: str) -> None:
    """Who may not listen is told so at once, with the server's reason, until the rights are given."""
    user = redis.Redis.from_url(own_server.url)
    user.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "resetchannels", "+@all")
    store = open_store(own_server.url.replace("://", "://app:pw@"), prefix)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=f"refused a subscription: .*channel.*&{prefix}:"):
            store.listen(60.0)
        assert time.monotonic() - began < 20
    user.execute_command("ACL", "SETUSER", "app", f"&{prefix}:*")
    until(lambda: store.inbox.listening)
    store.listen(0.0)


def test_refused_log_in_of_the_listener(own_server: Server, open_store: Open, prefix: str, keys: Keys) -> None:
    """A password that has changed since the first command is told at once, too, until the right one is back."""
    user = redis.Redis.from_url(own_server.url)
    user.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all")
    store = open_store(own_server.url.replace("://", "://app:pw@"), prefix)
    assert store.get(keys) is None
    user.execute_command("ACL", "SETUSER", "app", "resetpass", ">other")
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="refused the log-in: "):
            store.listen(60.0)
        assert time.monotonic() - began < 20
    user.execute_command("ACL", "SETUSER", "app", ">pw")
    until(lambda: store.inbox.listening)
    store.listen(0.0)


@pytest.mark.parametrize("protocol", ["", "?protocol=2", "?protocol=3"])
def test_password_that_nobody_asked_for(protocol: str, own_server: Server, open_store: Open, prefix: str) -> None:
    """What the commands' connections may do, the listener may: neither stalls where the other goes on."""
    store = open_store(own_server.url.replace("://", "://:pw@") + protocol, prefix)
    told = []
    for ask in (lambda: store.get(Keys.of(prefix, "k")), lambda: store.listen(60.0)):
        began = time.monotonic()
        try:
            ask()
        except StoreUnavailable as refused:
            told.append(str(refused).partition(": ")[0])
        assert time.monotonic() - began < 20
    assert told in ([], [f"Redis at {store.address} refused the log-in"] * 2)


def test_many_wait_for_a_subscription(own_server: Server, prefix: str) -> None:
    """In asyncio each waits for no longer than it said, however many do."""
    store = Store.from_url(own_server.url, prefix)
    own_server.freeze()

    async def main() -> list[Any]:
        return await asyncio.gather(*(store.alisten(0.3) for _ in range(200)), return_exceptions=True)

    began = time.monotonic()
    told = asyncio.run(main())
    assert time.monotonic() - began < 20  # and not for a minute, in turn
    assert all("did not acknowledge a subscription in 0.3 s" in str(each) for each in told)
    own_server.thaw()
    store.listen(10.0)
    store.close()


def test_connections_are_shared_and_bounded(store: Store, client: redis.Redis, keys: Keys) -> None:
    """300 threads share at most 100 connections, and each gets its own answer."""
    values = {number: Keys.of(keys.tag[:8], f"t:1:{number}") for number in range(300)}
    for number, each in values.items():
        client.set(each.entry, number, px=60000)
    before = int(client.info("clients")["connected_clients"])
    barrier = threading.Barrier(300)
    wrong = []

    def ask(number: int) -> None:
        barrier.wait()
        got = {store.get(values[number]) for _ in range(20)}
        if got != {str(number).encode()}:
            wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert int(client.info("clients")["connected_clients"]) - before <= 100


def test_connections_closed_by_the_server(store: Store, client: redis.Redis, keys: Keys) -> None:
    """An idle connection that the server closed is replaced in passing."""
    assert store.get(keys) is None
    client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert store.get(keys) is None


def test_password_is_not_shown(open_store: Open) -> None:
    """Errors name the address, without user and password."""
    store = open_store("redis://user:secret@127.0.0.1:1/3", "p")
    with pytest.raises(StoreUnavailable, match=r"redis://127\.0\.0\.1:1/3") as caught:
        store.get(Keys.of("p", "t"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h:7/2", "redis://h:7/2"),
        ("rediss://h:7/2?ssl_cert_reqs=CERT_NONE", "rediss://h:7/2"),
        ("unix:///tmp/s?db=3", "unix:///tmp/s"),
        ("redis+socket:///tmp/s?virtual_host=3", "unix:///tmp/s"),
        ("redis+socket://:pw@/tmp/s", "unix:///tmp/s"),
        ("redis://a:1;redis://b:2", "redis://a:1/0"),
        ("redis://a:1/2;", "redis://a:1/2"),
        ("redis://:p;w@a:1/2;redis://:p;w@b:2", "redis://a:1/2"),
    ],
)
def test_urls(url: str, address: str) -> None:
    """The client's, kombu's and Celery's spellings are understood."""
    store = Store.from_url(url, "p")
    assert store.address == address
    store.close()


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        (
            "socket://:p;w@/s?virtual_host=3&socket_timeout=2",
            {"db": 3, "password": "p;w", "socket_timeout": 2.0},
        ),
        ("redis+socket:///tmp/s?db=3&client_name=a%20b", {"db": 3, "client_name": "a b"}),
        ("redis://:p%3Bw@h/1?socket_timeout=2", {"db": 1, "password": "p;w", "socket_timeout": 2.0}),
        ("rediss://:CERT_NONE@h?ssl_cert_reqs=CERT_NONE", {"password": "CERT_NONE", "ssl_cert_reqs": "none"}),
    ],
)
def test_settings_in_urls(url: str, settings: dict[str, Any]) -> None:
    """Whatever the spelling, password and query count."""
    store = Store.from_url(url, "p")
    found = store._client.connection_pool.connection_kwargs
    assert {name: found[name] for name in settings} == settings
    store.close()


def test_bad_url() -> None:
    """A URL that cannot be used is a configuration error."""
    with pytest.raises(ConfigurationError, match="the URL of memolock's Redis cannot be used"):
        Store.from_url("http://h", "p")


def test_unix_socket(open_store: Open, prefix: str, keys: Keys) -> None:
    """Everything works over a unix socket."""
    with Server(unix_socket=True) as server:
        store = open_store(server.url, prefix)
        store.listen(5.0)
        won = acquire(store, keys)
        settle(store, keys, claim(store, keys, won.fence), 1)
        assert isinstance(acquire(store, keys), Done)


def test_fork(store: Store) -> None:
    """A forked child has an inbox of its own."""
    store.listen(5.0)
    channel = store.inbox.channel
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            FromAsyncio.loop = None  # its thread is the parent's
            store.listen(5.0)
            os.write(writing, store.inbox.channel.encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 200).decode() not in ("", channel)
    os.close(reading)
    os.close(writing)
    assert store.inbox.channel == channel


def test_close_leaves_nothing(any_server: Server, open_store: Open, client: redis.Redis, prefix: str) -> None:
    """A closed store leaves no thread and no connection."""
    before, connected = threading.active_count(), len(client.client_list())
    store = open_store(any_server.url, prefix)
    assert store.get(Keys.of(prefix, "t")) is None
    store.listen(5.0)
    store.hold(Hold(Keys.of(prefix, "t"), Run("1-a", 1), 1.0, 1.0))
    assert len(client.client_list()) > connected
    store.close()
    assert threading.active_count() == before
    until(lambda: len(client.client_list()) <= connected)


def test_close_with_a_command_under_way(server: Server, open_store: Open, prefix: str) -> None:
    """Its connection is closed as soon as it has its reply, or at once, and then it is told."""
    with Link(server.url) as link:
        store = open_store(link.url, prefix)
        key = Keys.of(prefix, "t")
        store.get(key)

        def get() -> None:
            with contextlib.suppress(StoreUnavailable):
                store.get(key)

        with link.deaf("replies") as fault:
            asking = threading.Thread(target=get)
            asking.start()
            assert fault.wait()
            store.close()
        asking.join()
        until(lambda: link.connections == 0)


def test_collected_with_its_owner(server: Server, prefix: str) -> None:
    """Whoever collects an owner that was dropped does not wait for threads that a silent server holds up."""

    class Owner:
        pass

    def own() -> list[str]:
        names = ("memolock-inbox", "memolock-tracker", "memolock-heart")
        return sorted(each.name for each in threading.enumerate() if each.name in names and each not in before)

    before = threading.enumerate()
    with Link(server.url) as link:
        stores, owner = Stores(), Owner()
        store = stores.of(owner, lambda _: Store.from_url(link.url, prefix))
        store.listen(5.0)
        store.local("t", Options(ttl=60, local_ttl=60))
        store.hold(Hold(Keys.of(prefix, "t"), Run("1-a", 1), 60.0, 60.0))
        assert len(own()) == 3
        until(lambda: link.connections == 2)
        with link.deaf() as fault:
            link.drop()
            assert fault.wait(2)  # the listener and the tracker have connected again, and wait for a first answer
            began = time.monotonic()
            del store, owner
            gc.collect()
            assert time.monotonic() - began < 4  # of the five seconds of a connection's own time-out
            assert len(own()) > 0
        until(lambda: own() == [])
        until(lambda: link.connections == 0)


def test_unreadable_is_absent(store: Store, client: redis.Redis, keys: Keys) -> None:
    """What is not of our making counts as absent, and is replaced."""
    client.set(keys.entry, "garbage", px=60_000)
    won = acquire(store, keys)
    assert isinstance(won, Won)
    settle(store, keys, claim(store, keys, won.fence), 1)
    assert isinstance(acquire(store, keys), Done)


def test_nothing_unknown_is_decoded(keys: Keys) -> None:
    """The packed form names what it is."""
    assert CODEC.pack(1) == Packed("application/json utf-8 - =", b"1")
