"""A state machine against a real server: every step in every order, with a simple model of one key as its oracle.

The steps are those of callers, workers, brokers and operators. What takes time in life is a step here: a lease that
passes, an entry that expires, a message that is lost, doubled or late.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from benchmarks.chaos.broken import MUTANTS, OF_FRESHNESS, break_build
from celery_memolock import wire
from celery_memolock.codec import Codec, Entry, pack_error
from celery_memolock.effects import (
    Acquire,
    Claim,
    Confirm,
    Defer,
    Disown,
    Done,
    Expire,
    Index,
    Invalidate,
    Leave,
    Members,
    Put,
    Renew,
    Requeue,
    Run,
    Settle,
    Skip,
    Waiting,
    Won,
    new_nonce,
)
from celery_memolock.errors import FlightFailed
from celery_memolock.keys import Keys, TagKeys
from celery_memolock.options import Options
from celery_memolock.rooms import Place
from celery_memolock.server import Server
from celery_memolock.testing import Fault, Link
from tests.contract.conftest import opened
from tests.workers.shop import Loop

pytestmark = pytest.mark.usefixtures("patient")

OPTIONS = Options(ttl=600, lease=600, dispatch_lease=600, queue_timeout=600, max_crashes=3, max_overlap=2)
CODEC = Codec("machine", OPTIONS)
CRASHED = pack_error(FlightFailed("crashed"))
FAILED = pack_error(FlightFailed("failed"))
PARK = 600.0
NAMED = 3600.0  # longer than any entry is kept


@dataclass
class Flight:
    """What the model knows of a flight."""

    fence: str
    state: str = "P"
    attempt: int = 0
    retries: int = 0
    crashes: int = 0
    lapsed: bool = False
    holder: str = ""
    again: bool = False
    started: int = 0


@dataclass(frozen=True)
class Working:
    """A worker in the middle of a run; `version` is what it read from the source at its start."""

    run: Run
    version: int
    holder: str


@dataclass
class Caller:
    """A caller that waits. `floor` is what had been invalidated before its call.

    One that forces wants none of the runs that had begun `before` its call; `since` is when the server saw it first.
    """

    floor: int
    following: str
    sequence: int = 0
    forces: bool = False
    before: frozenset[tuple[str, int]] = frozenset()
    since: int = 0


@dataclass
class Model:
    """One key."""

    version: int = 0
    entry: tuple[str, int] | None = None
    stale: bool = False
    entry_started: int = 0
    settled: dict[str, int] = field(default_factory=dict)
    flight: Flight | None = None
    aside: dict[str, Flight] = field(default_factory=dict)
    parked: dict[str, int | None] = field(default_factory=dict)
    alive: set[tuple[str, int]] = field(default_factory=set)


class OneKey(RuleBasedStateMachine):
    """The rules are the steps; each compares the server's answer with the model's."""

    stores: ClassVar[dict[str, Any]]  # by driver
    client: redis.Redis
    link: Link

    def __init__(self) -> None:
        super().__init__()
        self.store: Any = self.stores["threads"]
        self.keys = Keys.of("machine", f"t:1:{new_nonce()}")
        self.tags = TagKeys.of("machine", "t", [new_nonce()])
        self.model = Model()
        self.callers: list[Caller] = []
        self.undispatched: list[str] = []
        self.messages: list[tuple[str, int]] = []
        self.working: list[Working] = []
        self.ran: set[tuple[str, int]] = set()
        self.sequence = 0
        self.lost: Fault | None = None

    @initialize(driver=st.sampled_from(["threads", "asyncio"]))
    def asked_by(self, driver: str) -> None:
        """All steps of one order are asked by one driver, which takes turns with the other."""
        self.store = self.stores[driver]

    # ---- callers

    def look(self, caller: Caller) -> Any:
        self.sequence += 1
        mode: Any = "force" if caller.forces else "miss"
        place = caller.following, self.sequence
        reply = self.store.run(
            Acquire(self.keys, OPTIONS, new_nonce(), mode, "", *place, 30.0, PARK, CRASHED, caller.since)
        )
        model = self.model
        first = caller.forces and not caller.since
        if caller.following in model.parked:
            self.check_done(reply, model.parked[caller.following], caller)
        elif caller.following in model.aside and not model.aside[caller.following].lapsed:
            assert isinstance(reply, Waiting)
            assert reply.fence == caller.following
        elif model.entry is not None and self.is_good(caller):
            self.check_done(reply, model.entry[1], caller)
        elif model.flight is not None and not model.flight.lapsed:
            assert isinstance(reply, Waiting)
            assert (reply.fence, reply.state) == (model.flight.fence, model.flight.state)
            too_early = first or model.flight.state != "R" or model.flight.started < caller.since
            if caller.forces and model.flight.attempt and too_early:
                model.flight.again = True
        else:
            crashes = 0
            if model.flight is not None:
                crashes = model.flight.crashes + (model.flight.state == "R")
                if model.flight.state == "R" and crashes >= OPTIONS.max_crashes:
                    self.check_done(reply, None, caller)
                    model.parked[model.flight.fence] = None
                    model.flight = None
                    return
            assert isinstance(reply, Won)
            model.flight = Flight(reply.fence, crashes=crashes, again=model.flight is not None and model.flight.again)
            self.undispatched.append(reply.fence)
        if isinstance(reply, Waiting | Won):
            caller.following, caller.sequence = reply.fence, self.sequence
            caller.since = caller.since or reply.now
            if caller not in self.callers:
                self.callers.append(caller)

    def is_good(self, caller: Caller) -> bool:
        """Whether the stored value will do."""
        if caller.forces:
            return bool(caller.since) and self.model.entry_started >= caller.since
        return not self.model.stale

    def check_done(self, reply: Any, version: int | None, caller: Caller) -> None:
        assert isinstance(reply, Done)
        entry = Entry.parse(reply.raw)
        assert entry.failed == (version is None)
        if version is not None:
            assert CODEC.unpack(entry) == version
            assert version >= caller.floor, "a caller got data older than an invalidation before its call"
        if caller.forces and entry.started < caller.since:
            caller.following = ""  # it looks on
            return
        if caller.forces and version is not None:
            run = entry.fence, self.model.settled.get(entry.fence, 0)
            assert run not in caller.before, "a forced call got a run that had begun before it"
        if caller in self.callers:
            self.callers.remove(caller)

    @rule(
        then=st.sampled_from(["confirm", "claim", "claim", "no confirm", "nothing", "store", "only tell"]),
        doubled=st.booleans(),
        forces=st.sampled_from([False, False, True]),
    )
    def call(self, then: str, doubled: bool, forces: bool) -> None:
        """Most flights go on at once: steps drawn one by one would hardly ever come so far.

        A call that forces wants a value whose computing starts after it.
        """
        self.look(Caller(self.model.version, "", forces=forces, before=frozenset(self.ran)))
        if self.undispatched and then != "nothing":
            self.dispatch_now(then != "no confirm")
            self.messages += self.messages[-1:] * doubled
            if then in ("claim", "store", "only tell"):
                self.claim_now(self.messages[-1], False)
            if then in ("store", "only tell") and self.working:
                work = self.working.pop()
                self.settle_or_fail(work.run, work.version, then == "store")

    @precondition(lambda self: self.callers)
    @rule(data=st.data())
    def look_again(self, data: st.DataObject) -> None:
        self.look(data.draw(st.sampled_from(self.callers)))

    @precondition(lambda self: self.callers)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        caller = data.draw(st.sampled_from(self.callers))
        self.callers.remove(caller)
        self.store.run(Leave(self.keys, Place(caller.following, caller.sequence)))

    # ---- the broker

    @precondition(lambda self: self.undispatched)
    @rule(confirmed=st.booleans())
    def dispatch(self, confirmed: bool) -> None:
        self.dispatch_now(confirmed)

    def dispatch_now(self, confirmed: bool) -> None:
        fence = self.undispatched.pop()
        self.messages.append((fence, 0))
        if confirmed:
            flight = self.model.flight
            expected = flight is not None and flight.fence == fence and flight.state != "R"
            assert self.store.run(Confirm(self.keys, fence, 600.0)) is expected
            if flight is not None and expected and flight.state == "P":
                flight.state, flight.lapsed = "Q", False

    @precondition(lambda self: self.undispatched)
    @rule()
    def dispatch_fails(self) -> None:
        self.settle_or_fail(Run(self.undispatched.pop(), 0), None)

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def message_doubled(self, data: st.DataObject) -> None:
        self.messages.append(data.draw(st.sampled_from(self.messages)))

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def message_lost(self, data: st.DataObject) -> None:
        self.messages.remove(data.draw(st.sampled_from(self.messages)))

    # ---- workers

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), redelivered=st.booleans())
    def claim(self, data: st.DataObject, redelivered: bool) -> None:
        self.claim_now(data.draw(st.sampled_from(self.messages)), redelivered)

    def claim_now(self, message: tuple[str, int], redelivered: bool) -> None:
        self.messages.remove(message)
        fence, retries = message
        holder = f"holder-{new_nonce()}"
        self.store.run(Index(self.tags, self.keys.entry, NAMED))
        effect = Claim(self.keys, OPTIONS, fence, new_nonce(), holder, retries, redelivered, PARK, CRASHED)
        reply = self.store.run(effect)
        assert self.store.run(effect) == reply or not isinstance(reply, Run), "a repeat must get the same answer"
        flight = self.model.flight
        if flight is None:
            assert isinstance(reply, Skip)
            return
        if retries < flight.retries:
            assert isinstance(reply, Skip)
            return
        if flight.fence != fence:
            older = int(fence.split("-")[0]) <= int(flight.fence.split("-")[0])
            if flight.state == "R" or not older:
                assert isinstance(reply, Skip)
                return
        elif flight.state == "R":
            if not flight.lapsed:
                deferred = redelivered or retries > flight.retries
                assert isinstance(reply, Defer if deferred else Skip)
                if deferred:
                    self.messages.append(message)
                return
            flight.crashes += retries == flight.retries
            if retries == flight.retries and flight.crashes >= OPTIONS.max_crashes:
                assert isinstance(reply, Skip)
                self.model.parked[flight.fence] = None
                self.model.flight = None
                return
        if len(self.model.alive) >= OPTIONS.max_overlap:
            assert isinstance(reply, Defer)
            # The repeat of a deferred claim is a second question, and may be counted as a crash only once.
            flight.state, flight.lapsed = "Q", False
            self.messages.append(message)
            return
        assert isinstance(reply, Run)
        flight.attempt += 1
        flight.state, flight.retries, flight.lapsed, flight.holder = "R", retries, False, holder
        flight.again = False
        flight.started = int(self.client.hget(self.keys.all[1], "started") or 0)  # type: ignore[arg-type]
        assert reply == Run(flight.fence, flight.attempt)
        assert (reply.fence, reply.attempt) not in self.ran, "one attempt ran twice"
        self.ran.add((reply.fence, reply.attempt))
        self.model.alive.add((reply.fence, reply.attempt))
        self.working.append(Working(reply, self.model.version, holder))

    @precondition(lambda self: self.working)
    @rule(data=st.data(), fails=st.booleans(), stored=st.sampled_from([True, True, False]))
    def settle(self, data: st.DataObject, fails: bool, stored: bool) -> None:
        work = data.draw(st.sampled_from(self.working))
        self.working.remove(work)
        self.settle_or_fail(work.run, None if fails else work.version, stored)

    def settle_or_fail(self, run: Run, version: int | None, stored: bool = False) -> None:
        """With a value, which may be for those alone who wait, or with an error."""
        kind, outcome = ("E", FAILED) if version is None else ("V", CODEC.pack(version))
        ttl = 600.0 if version is not None and stored else 0.0
        effect = Settle(self.keys, run, kind, outcome, ttl, 2 * ttl, PARK)  # type: ignore[arg-type]
        answer = self.store.run(effect)
        model = self.model
        if model.flight is not None and (model.flight.fence, model.flight.attempt) == (run.fence, run.attempt):
            assert answer == ("AGAIN" if model.flight.again else "OK")
            started = model.flight.started
            model.flight = None
            model.settled[run.fence] = run.attempt
            model.alive.discard((run.fence, run.attempt))
            if version is None:
                model.parked[run.fence] = None
            elif stored:
                model.entry, model.stale, model.entry_started = (run.fence, version), False, started
            else:
                model.entry, model.parked[run.fence] = None, version
        elif run.fence in model.aside and model.aside[run.fence].attempt == run.attempt:
            if model.aside[run.fence].again and model.flight is None and model.entry is None:
                assert answer == "AGAIN"
            else:
                assert answer == "DETACHED" or (answer == "OK" and self.lost is not None and self.lost.count)
            del model.aside[run.fence]
            model.settled[run.fence] = run.attempt
            model.alive.discard((run.fence, run.attempt))
            model.parked[run.fence] = version
        else:
            known = run.fence in model.parked or (model.entry is not None and model.entry[0] == run.fence)
            assert answer == ("OK" if known else "REFUSED")
        if answer != "REFUSED":
            assert self.store.run(effect) == ("AGAIN" if answer == "AGAIN" else "OK"), "a repeat must not be refused"

    @precondition(lambda self: self.working)
    @rule(data=st.data(), heard=st.sampled_from([True, True, False]), goes_on=st.booleans())
    def retry(self, data: st.DataObject, heard: bool, goes_on: bool) -> None:
        """The message is sent again, even if the server did not hear of it; with throw=False the run goes on."""
        work = data.draw(st.sampled_from(self.working))
        if not goes_on:
            self.working.remove(work)
        flight = self.model.flight
        retries = 1 + (flight.retries if flight else 0)
        if not heard:
            self.messages.append((work.run.fence, retries))
            return
        answer = self.store.run(Requeue(self.keys, work.run, retries, 600.0))
        if flight is not None and (flight.fence, flight.attempt) == (work.run.fence, work.run.attempt):
            assert answer == "OK"
            flight.state, flight.retries, flight.lapsed = "Q", retries, False
            self.messages.append((work.run.fence, retries))
        elif work.run.fence in self.model.aside and self.model.aside[work.run.fence].attempt == work.run.attempt:
            assert answer == "DETACHED"
            del self.model.aside[work.run.fence]
        else:
            assert answer == "LOST"
            return
        self.model.alive.discard((work.run.fence, work.run.attempt))

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        work = data.draw(st.sampled_from(self.working))
        answer = self.store.run(Renew(self.keys, work.run, 600.0))
        found = "LOST"
        for name, flight in (("CONTINUE", self.model.flight), ("DETACHED", self.model.aside.get(work.run.fence))):
            if flight and flight.state == "R" and (flight.fence, flight.attempt) == (work.run.fence, work.run.attempt):
                flight.lapsed = False
                found = name
                self.model.alive.add((work.run.fence, work.run.attempt))
                break
        assert answer == found

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def worker_dies_unseen(self, data: st.DataObject) -> None:
        self.working.remove(data.draw(st.sampled_from(self.working)))

    @precondition(lambda self: self.working)
    @rule(data=st.data(), told=st.booleans())
    def worker_dies_seen(self, data: st.DataObject, told: bool) -> None:
        """The main process knows: without an outcome others may take over, with one the flight fails."""
        work = data.draw(st.sampled_from(self.working))
        self.working.remove(work)
        concerned = self.store.run(Disown(self.keys, work.run.fence, work.holder, FAILED if told else None, PARK))
        for home in (self.model.flight, self.model.aside.get(work.run.fence)):
            if home is not None and home.state == "R" and home.holder == work.holder:
                assert concerned
                self.model.alive.discard((work.run.fence, work.run.attempt))
                if told:
                    self.model.parked[home.fence] = None
                    self.model.aside.pop(home.fence, None)
                    if home is self.model.flight:
                        self.model.flight = None
                else:
                    home.lapsed = True
                return
        assert not concerned

    # ---- the link

    @rule(script=st.sampled_from(["acquire", "confirm", "claim", "renew", "settle", "put", "leave"]))
    def next_reply_is_lost(self, script: str) -> None:
        """The server will run a script and the link break before its reply; the repeat must get the same answer.

        The other scripts' repeats may answer otherwise, to the same end: see test_cut_replies.py.
        """
        self.whole_again()
        self.lost = self.link.cut_reply(containing=wire.load(script).sha.encode())

    @rule()
    def connections_break(self) -> None:
        self.whole_again()
        self.link.drop()

    def whole_again(self) -> None:
        """One fault at a time: a repeat that fails as well is an error to its caller."""
        if self.lost is not None:
            self.lost.end()
        self.store.get(self.keys)  # over a new connection, if the old one is broken

    def teardown(self) -> None:
        self.whole_again()
        # The invariants look through all keys, and what thousands of examples leave would make that slow.
        for key in [*self.client.scan_iter(f"*{self.keys.tag}*"), *self.tags.all]:
            self.client.delete(key)

    # ---- operators and time

    @precondition(lambda self: self.model.flight is not None and not self.model.flight.lapsed)
    @rule()
    def refresh(self) -> None:
        """What began before a refresh is never its last word."""
        flight = self.model.flight
        assert flight is not None
        reply = self.store.run(Acquire(self.keys, OPTIONS, new_nonce(), "force", "", "", None, 30.0, PARK, CRASHED))
        assert isinstance(reply, Waiting)
        assert reply.fence == flight.fence
        flight.again = flight.again or flight.attempt > 0

    @precondition(lambda self: self.model.entry is not None or self.model.flight is not None)
    @rule(by_tag=st.booleans())
    def invalidate(self, by_tag: bool) -> None:
        model = self.model
        model.version += 1
        if by_tag and self.keys.entry not in self.store.ask(Members(self.tags, 0))[1]:
            # Nothing that has read anything may be missing there.
            assert model.entry is None
            assert model.flight is None or model.flight.attempt == 0
            return
        assert self.store.run(Invalidate(self.keys, new_nonce(), 30.0)) is (model.entry is not None)
        model.entry = None
        if model.flight is not None:
            if model.flight.state == "R":
                model.aside[model.flight.fence] = model.flight
                model.flight = None
            elif model.flight.state == "Q" and model.flight.attempt:
                model.flight.attempt += 1

    @precondition(lambda self: self.model.flight is not None)
    @rule(expire=st.booleans())
    def set_or_expire(self, expire: bool) -> None:
        model = self.model
        if expire:
            self.expire()
            return
        self.store.run(Index(self.tags, self.keys.entry, NAMED))
        effect = Put(self.keys, new_nonce(), CODEC.pack(model.version), 600.0, 1200.0, PARK, False)
        fence = self.store.run(effect)
        assert self.store.run(effect) == fence
        model.entry, model.stale = (fence, model.version), False
        model.entry_started = Entry.parse(self.store.get(self.keys) or b"").started
        model.flight = None

    def expire(self) -> None:
        """The gentle form: the value is stale from now on, and after a run comes another."""
        model = self.model
        assert self.store.run(Expire(self.keys, 600.0)) is (model.entry is not None)
        model.stale = True
        if model.flight is not None and model.flight.attempt:
            model.flight.again = True

    @precondition(lambda self: self.model.entry is not None)
    @rule(softly=st.booleans())
    def entry_expires(self, softly: bool) -> None:
        if softly:
            self.expire()
            return
        self.client.delete(self.keys.entry)
        self.model.entry = None

    @precondition(lambda self: self.model.flight is not None or self.model.aside)
    @rule()
    def leases_pass(self) -> None:
        """All of them at once, and the runs no longer count as alive."""
        past = f"{(time.time() - 1) * 1e6:.0f}"
        flight = self.keys.all[1]
        if self.model.flight is not None:
            self.client.hset(flight, "lease_until", past)
            self.model.flight.lapsed = True
        for fence, aside in self.model.aside.items():
            self.client.hset(flight.replace(":f:", f":d:{fence}:"), "lease_until", past)
            aside.lapsed = True
        self.client.delete(self.keys.all[3])
        self.model.alive.clear()

    # ---- what always holds

    @invariant()
    def every_key_has_a_time_to_live(self) -> None:
        for key in self.client.scan_iter(f"*{self.keys.tag}*"):
            assert self.client.pttl(key) != -1, key

    @invariant()
    def an_index_outlives_what_it_names(self) -> None:
        """Asked of the servers' own clocks: what is to happen when the time has come needs no waiting for it."""
        if self.model.entry is not None:
            kept: Any = self.client.pttl(self.keys.entry)
            assert all(self.client.pttl(index) > kept for index in self.tags.all)

    @invariant()
    def the_server_agrees(self) -> None:
        model = self.model
        raw: Any = self.client.get(self.keys.entry)
        assert (raw is None) == (model.entry is None)
        if raw is not None and model.entry is not None:
            entry = Entry.parse(raw)
            assert (entry.fence, CODEC.unpack(entry)) == model.entry
            assert model.entry[1] == model.version, "a stored value was computed before the last invalidation"
        state: Any = self.client.hmget(self.keys.all[1], "fence", "state", "attempt")
        if model.flight is None:
            assert state == [None, None, None]
        else:
            flight = model.flight
            assert state == [flight.fence.encode(), flight.state.encode(), str(flight.attempt).encode()]


@pytest.fixture
def machine(any_server: Server, loop: Loop) -> Iterator[type[OneKey]]:
    """The machine at a server."""
    with Link(any_server.url) as OneKey.link:
        OneKey.stores = {each: opened(OneKey.link.url, "machine", each) for each in ("threads", "asyncio")}
        OneKey.client = redis.Redis.from_url(any_server.url)
        yield OneKey
        for store in OneKey.stores.values():
            store.close()
        OneKey.client.close()


def test_every_order_of_steps(machine: type[OneKey]) -> None:
    """Whatever the order, the server does what the model does, and S1, S2, S3 and S6 hold."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


@pytest.mark.slow
@pytest.mark.timeout(600)  # a rare order of steps may take a while to be found
@pytest.mark.parametrize("mutant", [*MUTANTS, *OF_FRESHNESS])
def test_broken_builds_are_caught(mutant: str, machine: type[OneKey], monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine finds each of the deliberately broken scripts."""
    monkeypatch.setattr(wire, "load", wire.load)  # put back what break_build replaces
    break_build(mutant)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=20_000,  # it ends with the first that is found: of a thousand now and then none is
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
                phases=[Phase.generate],
                print_blob=False,
            ),
        )
