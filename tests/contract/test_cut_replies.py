"""A script ran, its reply got lost, and the client's own retry ran it again: nobody may notice.

Each case is played twice, on two keys: in peace, and with the reply of its last step cut; for each driver, as each has
a retry of its own. Answer, keys and notices have to be the same; where a repeat may differ, because nobody acts on the
difference, it is said here how.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import redis

from celery_memolock.codec import Packed, pack_error
from celery_memolock.effects import (
    Acquire,
    Claim,
    Confirm,
    Disown,
    Expire,
    Invalidate,
    Leave,
    Put,
    Renew,
    Report,
    Requeue,
    Run,
    Script,
    Settle,
    Withdraw,
    Won,
    new_nonce,
)
from celery_memolock.errors import FlightFailed
from celery_memolock.keys import Keys
from celery_memolock.options import Options
from celery_memolock.rooms import Place
from celery_memolock.server import Server
from celery_memolock.store import Store
from celery_memolock.testing import Link
from celery_memolock.wire import script_of
from tests.contract.conftest import Open, opened

pytestmark = pytest.mark.usefixtures("patient")

# Times are multiples of 600 s, of which a slow machine's milliseconds are no visible part.
OPTIONS = Options(ttl=600, lease=600, dispatch_lease=1200, queue_timeout=1800, max_crashes=2, max_overlap=1)
PARK = 2400.0
VALUE = Packed("application/json utf-8 - =", b"1")
FAILED = pack_error(FlightFailed("failed"))
CRASHED = pack_error(FlightFailed("crashed"))


@dataclass
class Stage:
    """One key, and the steps that bring it into a state. Another process listens, too, where the steps say so."""

    keys: Keys
    store: Store
    other: Store
    client: Any

    def acquire(self, *, mode: Any = "miss", seen: str = "", following: str = "", sequence: int | None = 1) -> Acquire:
        return Acquire(
            self.keys, OPTIONS, new_nonce(), mode, seen, following, sequence, 600.0 if sequence else 0.0, PARK, CRASHED
        )

    def claim(self, fence: str, *, retries: int = 0, redelivered: bool = False, options: Options = OPTIONS) -> Claim:
        return Claim(self.keys, options, fence, new_nonce(), "holder", retries, redelivered, PARK, CRASHED)

    def settle(self, run: Run, kind: Any = "V", *, ttl: float = 600.0, fleeting: bool = False) -> Settle:
        return Settle(self.keys, run, kind, VALUE if kind == "V" else FAILED, ttl, ttl, PARK, fleeting)

    def put(self) -> Put:
        return Put(self.keys, new_nonce(), VALUE, 600.0, 600.0, PARK, False)

    def pending(self) -> str:
        """A flight that was won by a caller in the other process."""
        won = self.other.run(self.acquire())
        assert isinstance(won, Won)
        return won.fence

    def queued(self) -> str:
        fence = self.pending()
        assert self.other.run(Confirm(self.keys, fence, 1800.0))
        return fence

    def running(self) -> Run:
        run = self.other.run(self.claim(self.queued()))
        assert isinstance(run, Run)
        return run

    def aside(self) -> Run:
        """A run that an invalidation moved aside."""
        run = self.running()
        self.other.run(Invalidate(self.keys, new_nonce(), 30.0))
        return run

    def lapse(self) -> None:
        """Let the flight's lease pass."""
        self.client.hset(self.keys.all[1], "lease_until", f"{(time.time() - 1) * 1e6:.0f}")
        self.client.delete(self.keys.all[3])

    def crash(self) -> Run:
        """A run whose worker died, so that its lease passed."""
        run = self.running()
        self.lapse()
        return run


Case = Callable[[Stage], Script]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    """Add a case: it prepares a stage and returns the effect whose reply is to be cut."""
    CASES[make.__name__] = make
    return make


# ---- Acquire


@case
def acquire_wins(stage: Stage) -> Script:
    return stage.acquire()


@case
def acquire_wins_and_claims(stage: Stage) -> Script:
    return replace(stage.acquire(), holder="h/1/2")


@case
def acquire_joins(stage: Stage) -> Script:
    stage.queued()
    return stage.acquire()


@case
def acquire_finds_a_value(stage: Stage) -> Script:
    stage.other.run(stage.put())
    return stage.acquire()


@case
def acquire_replaces_an_unreadable_value(stage: Stage) -> Script:
    return stage.acquire(seen=stage.other.run(stage.put()))


@case
def acquire_wins_a_refresh(stage: Stage) -> Script:
    stage.other.run(stage.put())
    return stage.acquire(mode="force", sequence=None)


@case
def acquire_asks_for_a_refresh_after_the_run(stage: Stage) -> Script:
    stage.running()
    return stage.acquire(mode="force", sequence=None)


@case
def acquire_takes_over_what_nobody_claimed(stage: Stage) -> Script:
    stage.queued()
    stage.lapse()
    return stage.acquire()


@case
def acquire_takes_over_from_a_dead_worker(stage: Stage) -> Script:
    return stage.acquire(following=stage.crash().fence)


@case
def acquire_follows_a_run_moved_aside(stage: Stage) -> Script:
    return stage.acquire(following=stage.aside().fence)


@case
def acquire_gets_what_was_parked(stage: Stage) -> Script:
    run = stage.running()
    stage.other.run(stage.settle(run, "E", ttl=0.0))
    return stage.acquire(following=run.fence)


def last_crash(stage: Stage) -> Run:
    fence = stage.crash().fence
    run = stage.other.run(stage.claim(fence))
    assert isinstance(run, Run)
    stage.lapse()
    return run


@case
def acquire_finds_the_last_crash(stage: Stage) -> Script:
    return stage.acquire(following=last_crash(stage).fence)


@case
def acquire_finds_the_last_crash_as_a_newcomer(stage: Stage) -> Script:
    last_crash(stage)
    return stage.acquire()


@case
def acquire_finds_the_last_crash_and_keeps_its_error(stage: Stage) -> Script:
    last_crash(stage)
    return replace(stage.acquire(), options=replace(OPTIONS, error_ttl=600))


# ---- Confirm


@case
def confirm_queues(stage: Stage) -> Script:
    return Confirm(stage.keys, stage.pending(), 1800.0)


@case
def confirm_comes_late(stage: Stage) -> Script:
    return Confirm(stage.keys, stage.running().fence, 1800.0)


# ---- Claim


@case
def claim_runs(stage: Stage) -> Script:
    return stage.claim(stage.queued())


@case
def claim_runs_before_the_confirmation(stage: Stage) -> Script:
    return stage.claim(stage.pending())


@case
def claim_runs_after_a_crash(stage: Stage) -> Script:
    return stage.claim(stage.crash().fence)


@case
def claim_runs_a_retry(stage: Stage) -> Script:
    run = stage.running()
    stage.other.run(Requeue(stage.keys, run, 1, 1800.0))
    return stage.claim(run.fence, retries=1)


@case
def claim_waits_for_the_first_delivery(stage: Stage) -> Script:
    return stage.claim(stage.running().fence, redelivered=True)


@case
def claim_waits_for_a_run_moved_aside(stage: Stage) -> Script:
    stage.aside()
    return stage.claim(stage.queued())


@case
def claim_skips_a_duplicate(stage: Stage) -> Script:
    return stage.claim(stage.running().fence)


@case
def claim_finds_the_last_crash(stage: Stage) -> Script:
    return stage.claim(last_crash(stage).fence)


@case
def claim_skips_what_nobody_wants(stage: Stage) -> Script:
    fence = stage.queued()
    stage.other.run(Leave(stage.keys, Place(fence, 1)))
    stage.client.hset(stage.keys.all[1], "wanted_until", "0")
    return stage.claim(fence, options=dataclasses.replace(OPTIONS, skip_abandoned=True))


# ---- Renew, Requeue


@case
def renew_goes_on(stage: Stage) -> Script:
    return Renew(stage.keys, stage.crash(), 600.0)


@case
def renew_of_a_run_moved_aside(stage: Stage) -> Script:
    return Renew(stage.keys, stage.aside(), 600.0)


@case
def renew_as_it_is_handed_out(stage: Stage) -> Script:
    return Renew(stage.keys, stage.running(), 600.0, external=True)


@case
def renew_of_a_lost_run(stage: Stage) -> Script:
    run = stage.crash()
    stage.other.run(stage.claim(run.fence))
    return Renew(stage.keys, run, 600.0)


@case
def requeue_goes_on(stage: Stage) -> Script:
    return Requeue(stage.keys, stage.running(), 1, 1800.0)


@case
def requeue_of_a_run_moved_aside(stage: Stage) -> Script:
    return Requeue(stage.keys, stage.aside(), 1, 1800.0)


@case
def requeue_of_a_lost_run(stage: Stage) -> Script:
    run = stage.running()
    stage.other.run(stage.put())
    return Requeue(stage.keys, run, 1, 1800.0)


# ---- Settle, Disown


@case
def settle_with_a_value(stage: Stage) -> Script:
    return stage.settle(stage.running())


@case
def settle_with_a_fleeting_value(stage: Stage) -> Script:
    return stage.settle(stage.running(), fleeting=True)


@case
def settle_with_a_value_that_is_not_stored(stage: Stage) -> Script:
    stage.other.run(stage.put())
    won = stage.other.run(stage.acquire(mode="force"))
    assert isinstance(won, Won)
    run = stage.other.run(stage.claim(won.fence))
    assert isinstance(run, Run)
    return stage.settle(run, ttl=0.0)


@case
def settle_with_an_error(stage: Stage) -> Script:
    return stage.settle(stage.running(), "E", ttl=0.0)


@case
def settle_with_an_error_to_keep(stage: Stage) -> Script:
    return stage.settle(stage.running(), "E")


@case
def settle_of_a_failed_dispatch(stage: Stage) -> Script:
    return stage.settle(Run(stage.pending(), 0), "E", ttl=0.0)


@case
def settle_when_a_refresh_was_asked_for(stage: Stage) -> Script:
    run = stage.running()
    stage.other.run(stage.acquire(mode="force", sequence=None))
    return stage.settle(run)


@case
def settle_with_an_error_when_a_refresh_was_asked_for(stage: Stage) -> Script:
    run = stage.running()
    stage.other.run(stage.acquire(mode="force", sequence=None))
    return stage.settle(run, "E", ttl=0.0)


@case
def settle_from_outside_when_a_refresh_was_asked_for(stage: Stage) -> Script:
    run = stage.running()
    stage.other.run(Renew(stage.keys, run, 600.0, external=True))
    stage.other.run(stage.acquire(mode="force", sequence=None))
    return replace(stage.settle(run), keep=1200.0)


@case
def settle_of_a_run_moved_aside(stage: Stage) -> Script:
    return stage.settle(stage.aside())


@case
def settle_of_a_run_moved_aside_when_a_refresh_was_asked_for(stage: Stage) -> Script:
    run = stage.running()
    stage.other.run(stage.acquire(mode="force", sequence=None))
    stage.other.run(Invalidate(stage.keys, new_nonce(), 30.0))
    return stage.settle(run)


@case
def settle_of_a_lost_run(stage: Stage) -> Script:
    run = stage.running()
    stage.other.run(stage.put())
    return stage.settle(run)


@case
def disown_for_others_to_take_over(stage: Stage) -> Script:
    return Disown(stage.keys, stage.running().fence, "holder", None, PARK)


@case
def disown_with_an_error(stage: Stage) -> Script:
    return Disown(stage.keys, stage.running().fence, "holder", FAILED, PARK)


@case
def disown_with_an_error_to_keep(stage: Stage) -> Script:
    return Disown(stage.keys, stage.running().fence, "holder", FAILED, PARK, 600.0)


@case
def disown_of_a_message(stage: Stage) -> Script:
    return Disown(stage.keys, stage.queued(), "", None, PARK)


# ---- Put, Invalidate, Leave


@case
def put_a_first_value(stage: Stage) -> Script:
    return stage.put()


@case
def put_over_a_value(stage: Stage) -> Script:
    stage.other.run(stage.put())
    return stage.put()


@case
def put_ends_a_flight(stage: Stage) -> Script:
    stage.running()
    return stage.put()


def unstored(stage: Stage) -> Script:
    return replace(stage.put(), ttl=0.0, keep=0.0)


@case
def put_of_a_value_that_is_not_stored(stage: Stage) -> Script:
    return unstored(stage)


@case
def put_of_a_value_that_is_not_stored_over_another(stage: Stage) -> Script:
    stage.other.run(stage.put())
    return unstored(stage)


@case
def put_of_a_value_that_is_not_stored_ends_a_flight(stage: Stage) -> Script:
    stage.running()
    return unstored(stage)


@case
def invalidate_a_value(stage: Stage) -> Script:
    stage.other.run(stage.put())
    return Invalidate(stage.keys, new_nonce(), 30.0)


@case
def invalidate_nothing(stage: Stage) -> Script:
    return Invalidate(stage.keys, new_nonce(), 30.0)


@case
def invalidate_a_run(stage: Stage) -> Script:
    stage.running()
    return Invalidate(stage.keys, new_nonce(), 30.0)


@case
def invalidate_what_waits(stage: Stage) -> Script:
    stage.queued()
    return Invalidate(stage.keys, new_nonce(), 30.0)


@case
def invalidate_between_two_attempts(stage: Stage) -> Script:
    stage.other.run(Requeue(stage.keys, stage.running(), 1, 1800.0))
    return Invalidate(stage.keys, new_nonce(), 30.0)


@case
def expire_a_value(stage: Stage) -> Script:
    stage.other.run(replace(stage.put(), keep=1200.0))
    return Expire(stage.keys, 600.0)


@case
def expire_nothing(stage: Stage) -> Script:
    return Expire(stage.keys, 600.0)


@case
def expire_during_a_run(stage: Stage) -> Script:
    stage.running()
    return Expire(stage.keys, 600.0)


@case
def report_of_a_run(stage: Stage) -> Script:
    run = stage.running()
    stage.store.run(stage.acquire())
    return Report(stage.keys, run, 1, b"[0.5]")


@case
def withdraw_what_won(stage: Stage) -> Script:
    acquire = stage.acquire()
    stage.store.run(acquire)
    return Withdraw(stage.keys, acquire.nonce, PARK)


@case
def withdraw_what_began_to_run(stage: Stage) -> Script:
    acquire = replace(stage.acquire(), holder="h/1/2")
    stage.store.run(acquire)
    stage.other.run(stage.acquire())
    return Withdraw(stage.keys, acquire.nonce, PARK)


@case
def withdraw_what_joined(stage: Stage) -> Script:
    stage.running()
    acquire = stage.acquire()
    stage.store.run(acquire)
    return Withdraw(stage.keys, acquire.nonce, PARK)


@case
def leave_the_last(stage: Stage) -> Script:
    return Leave(stage.keys, Place(stage.store.run(stage.acquire()).fence, 1))


@case
def leave_others_behind(stage: Stage) -> Script:
    fence = stage.queued()
    stage.store.run(stage.acquire())
    return Leave(stage.keys, Place(fence, 1))


@case
def leave_a_place_that_was_renewed(stage: Stage) -> Script:
    fence = stage.store.run(stage.acquire()).fence
    stage.store.run(stage.acquire(sequence=2))
    return Leave(stage.keys, Place(fence, 1))


# ---- what is compared


@dataclass(frozen=True)
class Outcome:
    """What there is to notice, without what differs from one play to the next."""

    answer: Any
    state: dict[str, Any]
    notices: list[str]


class Plain:
    """Gives fences names in the order of their appearance, and blurs times."""

    def __init__(self, keys: Keys) -> None:
        self._tag = keys.tag
        self._fences: dict[str, str] = {}

    def __call__(self, value: Any) -> Any:
        match value:
            case bytes():
                return self(value.decode())
            case str():
                text = re.sub(r"\d{16}-[0-9a-f]{16}", self._name, value.replace(self._tag, "TAG"))
                text = re.sub(r"\d{16}", "INSTANT", text)
                return re.sub(r"(INSTANT INSTANT) \d+ ", r"\1 DURATION ", text)
            case int() if value > 10**15:
                return "INSTANT"
            case float():
                return round(value / 100) * 100
            case dict():
                return {self(key): self(item) for key, item in sorted(value.items())}
            case list() | tuple():
                return [self(item) for item in value]
            case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
                return type(value).__name__, self(dataclasses.astuple(value))
        return value

    def _name(self, match: re.Match[str]) -> str:
        return self._fences.setdefault(match[0], f"FENCE{len(self._fences) + 1}")


def state_of(stage: Stage) -> dict[str, Any]:
    """Return all keys of a stage: what is in them, and their time to live."""
    found: dict[str, Any] = {}
    for name in stage.client.scan_iter(f"*{stage.keys.tag}*"):
        kind = stage.client.type(name)
        if kind == b"hash":
            content: Any = stage.client.hgetall(name)
            content.pop(b"claim", None)  # random
            content[b"lease_ms"] = float(content[b"lease_ms"]) / 1000
        elif kind == b"zset":
            content = stage.client.zrange(name, 0, -1)
        else:
            content = stage.client.get(name)
        # An answer that is remembered is kept under its call's nonce, which is random.
        found[re.sub(r":a:[0-9a-f]{16}:", ":a:NONCE:", name.decode())] = (content, stage.client.pttl(name) / 1000)
    return found


class Theatre:
    """A server, a link to it, a process that acts over the link, and another one that does not."""

    def __init__(self, link: Link, url: str, prefix: str, driver: str) -> None:
        self._link = link
        self._prefix = prefix
        self._store = opened(link.url, prefix, driver)
        self._other = Store.from_url(url, prefix)
        self._client: Any = redis.Redis.from_url(url)
        self._ears = self._client.pubsub(ignore_subscribe_messages=True)
        self._ears.subscribe(self._store.inbox.channel, self._other.inbox.channel)
        for _ in range(2):
            self._ears.get_message(timeout=10.0)

    def close(self) -> None:
        for each in (self._ears, self._client, self._store, self._other):
            each.close()

    def play(self, make: Case, fault: Callable[[Script], bytes | None]) -> Outcome:
        """Play a case; `fault` says which command's reply is cut, if any."""
        stage = Stage(Keys.of(self._prefix, f"t:1:{new_nonce()}"), self._store, self._other, self._client)
        effect = make(stage)
        self._notices()
        cut = fault(effect)
        if cut is None:
            answer = stage.store.run(effect)
        else:
            with self._link.cut_reply(containing=cut) as lost:
                answer = stage.store.run(effect)
                assert lost.count == 1
        plain = Plain(stage.keys)
        return Outcome(plain(answer), plain(state_of(stage)), plain(self._notices()))

    def _notices(self) -> list[str]:
        """Return what was published since the last time."""
        self._client.publish(self._other.inbox.channel, "that is all")
        heard: list[str] = []
        while (message := self._ears.get_message(timeout=10.0)) is None or message["data"] != b"that is all":
            if message is not None:
                heard.append(message["data"].decode())
        return heard


@pytest.fixture(scope="module")
def theatre(server: Server, driver: str) -> Iterator[Theatre]:
    """The two processes."""
    with Link(server.url) as link:
        theatre = Theatre(link, server.url, f"cut-{driver}-{new_nonce()}", driver)
        yield theatre
        theatre.close()


@pytest.fixture(scope="module", params=["EVALSHA", "EVAL"])
def outcomes(request: pytest.FixtureRequest, theatre: Theatre, server: Server) -> Callable[[Case], tuple[Outcome, ...]]:
    """Play a case in peace and with a lost reply, of a script that the server knew and of one that it did not.

    What was played is remembered: several tests look at it.
    """

    def fault(effect: Script) -> bytes:
        with redis.Redis.from_url(server.url) as client:
            if request.param == "EVALSHA":
                client.script_load(script_of(effect).text)
                return script_of(effect).sha.encode()
            client.script_flush()
            return b"$4\r\nEVAL\r\n"

    @cache
    def played(make: Case) -> tuple[Outcome, ...]:
        return theatre.play(make, lambda _: None), theatre.play(make, fault)

    return played


#: What a repeat answers where it is another answer that leads to the same deeds.
OTHER_ANSWERS: dict[str, Any] = {
    "claim_finds_the_last_crash": ("Skip", ["the flight is over"]),
    "claim_skips_what_nobody_wants": ("Skip", ["the flight is over"]),
    "requeue_of_a_run_moved_aside": "LOST",
    "settle_of_a_run_moved_aside": "OK",
    "disown_with_an_error": False,
    "disown_with_an_error_to_keep": False,
}

#: Where a repeat tells those who wait to look a second time.
SECOND_NOTICES = ("disown_for_others_to_take_over", "disown_of_a_message", "report_of_a_run")

#: Where a repeat uses up one more number of an attempt.
SKIPPED_ATTEMPTS = ("invalidate_between_two_attempts",)


@pytest.mark.parametrize("name", CASES)
def test_answer(name: str, outcomes: Callable[[Case], tuple[Outcome, ...]]) -> None:
    """The caller gets the answer of the run whose reply was lost."""
    peace, fault = outcomes(CASES[name])
    if name in OTHER_ANSWERS:
        assert peace.answer != OTHER_ANSWERS[name]
        assert fault.answer == OTHER_ANSWERS[name]
    else:
        assert fault.answer == peace.answer


@pytest.mark.parametrize("name", CASES)
def test_state(name: str, outcomes: Callable[[Case], tuple[Outcome, ...]]) -> None:
    """The server keeps, and tells those who wait, what it would have if the script had run once."""
    peace, fault = outcomes(CASES[name])
    expected = copy.deepcopy(peace.state)
    if name in SKIPPED_ATTEMPTS:
        (flight,) = (content for content, _ in expected.values() if "attempt" in content)
        flight["attempt"] = str(int(flight["attempt"]) + 1)
    assert fault.state == expected
    assert fault.notices == peace.notices * (2 if name in SECOND_NOTICES else 1)


def test_renewals_in_one_round_trip(server: Server, prefix: str, open_store: Open) -> None:
    """The heartbeat renews many leases with one pipeline: each run hears what it would have heard without the fault."""
    with Link(server.url) as link, redis.Redis.from_url(server.url) as client:
        other, store = open_store(server.url, prefix), open_store(link.url, prefix)
        stages = [Stage(Keys.of(prefix, f"t:1:{new_nonce()}"), store, other, client) for _ in range(3)]
        runs = [stages[0].running(), stages[1].aside(), Run(stages[2].queued(), 1)]
        renewals = [Renew(stage.keys, run, 600.0) for stage, run in zip(stages, runs, strict=True)]
        client.script_load(script_of(renewals[0]).text)
        with link.cut_reply(containing=script_of(renewals[0]).sha.encode()) as lost:
            assert store.run_all(renewals) == ["CONTINUE", "DETACHED", "LOST"]
            assert lost.count == 1
