"""Who looks for whom: the callers of one process, walked by hand and at random."""

from __future__ import annotations

import math
import random

import pytest

from celery_memolock.errors import StoreUnavailable
from celery_memolock.rooms import Broken, Look, Place, Progressed, Rooms, Seat, Settled, Told, Turn

POLLS = (1.0, 5.0)


def rooms() -> Rooms:
    return Rooms(lambda: 1.0, lambda _: None, lambda: 0.0)


def seat() -> Seat:
    return Seat()


def enter(made: Rooms, key: str = "k", began: float = math.inf) -> Seat:
    taken = seat()
    made.enter(key, taken, began=began)
    return taken


def waiting(made: Rooms, fence: str = "f1", callers: int = 1) -> list[Seat]:
    """Seat some callers, and have one look for all of them say: wait."""
    seats = [enter(made) for _ in range(callers)]
    made.wait(made.begin_look(seats[0]), fence, 100.0, 0.0, POLLS)
    return seats


def test_first_caller_looks() -> None:
    """Whoever comes first looks at once; whoever comes while it looks does not."""
    made = rooms()
    first, second = enter(made), enter(made)
    assert (first.turn, second.turn) == (Turn.LOOK, None)


def test_outcome_is_for_those_who_were_there() -> None:
    """A look's outcome counts for those who were in the room when it began; a latecomer looks next."""
    made = rooms()
    first, second = enter(made), enter(made)
    look = made.begin_look(first)
    late = enter(made)
    made.settled(look, b"v")
    assert first.turn == second.turn == Settled(b"v")
    assert late.turn is Turn.LOOK


def test_outcome_is_for_those_whose_call_had_begun() -> None:
    """Who was on its way when the look was sent need not look again; who called in that moment, or later, has to."""
    made = Rooms(lambda: 1.0, lambda _: None, lambda: 5.0)
    first = enter(made, began=1.0)
    look = made.begin_look(first)
    on_its_way, at_once, late = (enter(made, began=began) for began in (4.9, 5.0, 6.0))
    made.settled(look, b"v")
    assert first.turn == on_its_way.turn == Settled(b"v")
    assert at_once.turn is Turn.LOOK
    made.settled(made.begin_look(at_once), b"newer")
    assert at_once.turn == late.turn == Settled(b"newer")


@pytest.mark.parametrize("ending", ["leaves", "is interrupted", "is late"])
def test_whose_look_brings_nothing(ending: str) -> None:
    """Whoever counted on it looks then."""
    now = [5.0]
    made = Rooms(lambda: 1.0, lambda _: None, lambda: now[0])
    first = enter(made)
    look = made.begin_look(first)
    other = enter(made, began=1.0)
    if ending == "leaves":
        made.leave(first)
    elif ending == "is interrupted":
        made.interrupted(look)
        made.leave(first)
    else:
        now[0] = 20.0
        made.tick(20.0)
    assert other.turn is Turn.LOOK
    newcomer = enter(made, began=now[0] - 1)
    made.settled(made.begin_look(other), b"v")
    assert isinstance(newcomer.turn, Settled)
    assert isinstance(other.turn, Settled)


def test_closed() -> None:
    """When nobody listens any more all are told: who waits, who looks, and who comes later."""
    made = rooms()
    seats = waiting(made, callers=2)
    looker, late = enter(made, "other"), enter(made, "other")
    look = made.begin_look(looker)
    why = Broken(StoreUnavailable, ("closed",))
    made.close(why)
    assert [each.turn for each in (*seats, looker, late)] == [why] * 4
    made.wait(look, "f2", 100.0, 0.0, POLLS)
    assert enter(made).turn is why
    assert [made.leave(each) for each in seats] == [None, None]
    assert len(made) == 0


def test_outcome_comes_before_the_look_begins() -> None:
    """Who was told to look, and has the outcome before it does so, has nothing to look for."""
    made = rooms()
    seats = waiting(made, callers=2)
    made.tick(10.0)
    assert seats[0].turn is Turn.LOOK
    made.notice("f1", b"v")
    assert made.begin_look(seats[0]) is None
    assert seats[0].turn == seats[1].turn == Settled(b"v")
    assert len(made) == 0


def test_one_refresh_of_a_value() -> None:
    """Of one value one refresh is asked for at a time, and again after a moment; of the next value at once."""
    made = rooms()
    asked = [made.may_refresh("k", fence, now) for fence, now in [("1", 0.0), ("1", 0.9), ("2", 0.9), ("2", 1.8)]]
    assert asked == [True, False, True, False]
    assert made.may_refresh("k", "2", 1.9)
    assert made.may_refresh("another", "2", 1.9)


def test_rest_of_a_value() -> None:
    """For a while nobody waits for the successor of one value; other values are not concerned."""
    made = rooms()
    why = Broken(StoreUnavailable, ("nobody answered",))
    made.rest("k", "1", 5.0, why)
    assert [made.resting("k", "1", now) for now in (0.0, 4.9)] == [why, why]
    assert made.resting("another", "1", 0.0) is None
    assert made.resting("k", "1", 5.0) is None
    made.rest("k", "1", 9.0, why)
    assert made.resting("k", "2", 6.0) is None
    assert made.resting("k", "1", 6.0) is None


def test_one_question_of_those_whose_time_is_over() -> None:
    """Of those who leave at one moment the first asks, and gives up nothing that others need; the last gives up all."""
    now = [5.0]
    made = Rooms(lambda: 1.0, lambda _: None, lambda: now[0])
    first, second, third, fourth, stays, last = waiting(made, callers=6)
    question, place = made.part(first)
    assert place == Place("f1", 0)
    assert made.part(second) == (question, None)
    question.told = Told("Q", 3.0)
    assert second.turn is None  # more is to come
    made.answered(question)
    assert second.turn == Told("Q", 3.0)
    now[0] += 0.24
    assert made.part(third) == (question, None)
    assert third.turn == Told("Q", 3.0)
    now[0] += 0.02
    assert made.part(fourth)[1] == Place("f1", 0)
    assert made.leave(last) is None
    assert made.part(stays)[1] == Place("f1", 1)
    assert len(made) == 0


def test_time_is_over_as_the_outcome_comes() -> None:
    """Whose turn is an outcome has nothing to ask; whose turn was to look passes it on."""
    made = rooms()
    first, second = waiting(made, callers=2)
    made.notice("f1", b"v")
    assert made.part(first)[1] is None
    assert first.turn == Settled(b"v")
    looks, next_one = waiting(made, "f2", callers=2)
    made.tick(10.0)
    assert looks.turn is Turn.LOOK
    assert made.part(looks)[1] == Place("f2", 0)
    assert (looks.turn, next_one.turn) == (None, Turn.LOOK)
    assert second.turn == Settled(b"v")


def test_newcomer_asks_for_itself() -> None:
    """A caller that comes while others wait for a flight does not follow that flight: it may be older than an
    invalidation."""
    made = rooms()
    waiting(made, "old")
    newcomer = enter(made)
    assert newcomer.turn is Turn.LOOK
    look = made.begin_look(newcomer)
    assert look.following == ""
    made.wait(look, "new", 100.0, 0.0, POLLS)
    made.notice("old", b"old value")
    assert newcomer.turn is None
    made.notice("new", b"new value")
    assert newcomer.turn == Settled(b"new value")


def test_newcomer_joins_the_same_flight() -> None:
    """If its look says to wait for the same flight, one notice is for both."""
    made = rooms()
    (first,) = waiting(made)
    newcomer = enter(made)
    made.wait(made.begin_look(newcomer), "f1", 100.0, 0.0, POLLS)
    made.notice("f1", b"v")
    assert first.turn == newcomer.turn == Settled(b"v")
    assert len(made) == 0


def test_empty_notice() -> None:
    """A notice without an outcome has one caller look again, for the flight that all follow."""
    made = rooms()
    seats = waiting(made, callers=3)
    made.notice("f1", b"")
    assert [each.turn for each in seats].count(Turn.LOOK) == 1
    looker = next(each for each in seats if each.turn is Turn.LOOK)
    look = made.begin_look(looker)
    assert look.following == "f1"
    made.settled(look, b"v")
    assert {each.turn for each in seats} == {Settled(b"v")}


def test_early_notice() -> None:
    """A notice may be faster than the reply that says whom to wait for."""
    made = rooms()
    caller = enter(made)
    look = made.begin_look(caller)
    made.notice("f1", b"v")
    made.wait(look, "f1", 100.0, 0.0, POLLS)
    assert caller.turn == Settled(b"v")


def test_early_empty_notice() -> None:
    """An early notice without an outcome leads to another look at once."""
    made = rooms()
    caller = enter(made)
    look = made.begin_look(caller)
    made.notice("f1", b"")
    made.wait(look, "f1", 100.0, 0.0, POLLS)
    assert caller.turn is Turn.LOOK


def test_forged_notices() -> None:
    """Notices of flights that nobody waits for change nothing, and do not pile up."""
    made = rooms()
    caller = enter(made)
    look = made.begin_look(caller)
    for number in range(5000):
        made.notice(f"forged-{number}", b"x")
    made.wait(look, "f1", 100.0, 0.0, POLLS)
    assert caller.turn is None
    assert len(made._early) <= 1024


def test_notice_during_a_look() -> None:
    """A notice that comes while the room looks again is not lost."""
    made = rooms()
    (caller,) = waiting(made)
    made.notice("f1", b"")
    look = made.begin_look(caller)
    made.notice("f1", b"")
    made.wait(look, "f1", 100.0, 0.0, POLLS)
    assert caller.turn is Turn.LOOK


def test_outcome_during_a_look() -> None:
    """A notice that carries the outcome settles the callers even while one of them looks."""
    made = rooms()
    (caller,) = waiting(made)
    made.notice("f1", b"")
    look = made.begin_look(caller)
    made.notice("f1", b"v")
    assert caller.turn == Settled(b"v")
    made.settled(look, b"v")
    assert len(made) == 0


def test_broken_look() -> None:
    """A look that fails fails for those it counted for; the others look for themselves."""
    made = rooms()
    first, second = enter(made), enter(made)
    look = made.begin_look(first)
    late = enter(made)
    made.broken(look, StoreUnavailable("down"))
    assert first.turn == second.turn == Broken(StoreUnavailable, ("down",))
    assert late.turn is Turn.LOOK


def test_looker_leaves_before_its_look() -> None:
    """A caller that gives up when it was to look passes the turn on."""
    made = rooms()
    first, second = enter(made), enter(made)
    assert made.leave(first) is None
    assert second.turn is Turn.LOOK


def test_looker_is_interrupted() -> None:
    """A caller that is interrupted while it looks passes the turn on, in the lobby and in a flight's room."""
    made = rooms()
    first, second = enter(made), enter(made)
    made.interrupted(made.begin_look(first))
    made.leave(first)
    assert second.turn is Turn.LOOK
    made.wait(made.begin_look(second), "f1", 100.0, 0.0, POLLS)
    third = enter(made)
    made.wait(made.begin_look(third), "f1", 100.0, 0.0, POLLS)
    made.notice("f1", b"")
    look = made.begin_look(second)
    made.interrupted(look)
    made.leave(second)
    assert third.turn is Turn.LOOK


def test_last_one_out_gives_up_the_place() -> None:
    """Only the last caller of a room gives up its registration, and only of the newest sequence."""
    made = rooms()
    first, second = waiting(made, callers=2)
    assert made.leave(first) is None
    place = made.leave(second)
    assert place == Place("f1", 1)
    assert made.leave(second) is None
    assert len(made) == 0


def test_leaving_a_lobby_that_never_looked() -> None:
    """Who leaves before any look has nothing to give up."""
    made = rooms()
    only = enter(made)
    assert made.leave(only) is None
    assert len(made) == 0


def test_interrupted_look_may_have_registered() -> None:
    """A look whose reply never came may have registered; the place is given up by its sequence alone."""
    made = rooms()
    only = enter(made)
    made.interrupted(made.begin_look(only))
    assert made.leave(only) == Place("", 1)


def test_timer() -> None:
    """A room looks again after the poll interval, which rises, or when the lease has passed."""
    alarms: list[float] = []
    made = Rooms(lambda: 1.0, alarms.append, lambda: 0.0)
    caller = enter(made)
    made.wait(made.begin_look(caller), "f1", 100.0, 0.0, POLLS)
    assert made.tick(0.5) == alarms[-1] == 1.0
    now = 0.0
    for interval in (1.0, 1.5, 2.25, 3.375, 5.0, 5.0):
        now += interval
        made.tick(now)
        assert caller.turn is Turn.LOOK
        made.wait(made.begin_look(caller), "f1", 100.0, now, POLLS)
    made.tick(now + 5.0)
    made.wait(made.begin_look(caller), "f1", 0.25, now + 5.0, POLLS)
    assert now + 5.25 < alarms[-1] < now + 5.3


def test_lost_link() -> None:
    """After a lost link every room looks again."""
    made = rooms()
    one, other = enter(made, "a"), enter(made, "b")
    made.wait(made.begin_look(one), "fa", 100.0, 0.0, POLLS)
    made.wait(made.begin_look(other), "fb", 100.0, 0.0, POLLS)
    made.ring_all()
    assert one.turn is other.turn is Turn.LOOK


def test_reports_overtake_each_other() -> None:
    """A look and notices bring the same reports in any order: nobody hears one twice, or one older than the last."""
    made = rooms()
    [caller] = waiting(made)
    caller.follows = True

    def heard(raw: bytes) -> object:
        for fence in ("f1", "f2"):
            made.progressed(fence, raw)
        turn = caller.turn
        if isinstance(turn, Progressed):
            made.heard(caller, turn)
            return turn.raw
        return turn

    assert [heard(b"1 %d %d" % (n, n)) for n in (1, 3, 2, 3, 10, 9, 11)] == [b"1", b"3", None, None, b"10", None, b"11"]
    made.ring_all()
    made.wait(made.begin_look(caller), "f1", 100.0, 0.0, POLLS)
    assert heard(b"1 10 10") is None
    assert heard(b"2 1 again") == b"again"
    assert heard(b"1 12 12") is None
    made.ring_all()
    made.wait(made.begin_look(caller), "f2", 100.0, 0.0, POLLS)
    assert heard(b"1 1 anew") == b"anew"


def test_who_computes_does_not_look() -> None:
    """The turn to look goes to those who can take it; if nobody can, to the first who is back."""
    made = rooms()
    busy, other = waiting(made, callers=2)
    made.away(busy)
    made.notice("f1", b"")
    assert (busy.turn, other.turn) == (None, Turn.LOOK)
    made.away(other)
    made.ring_all()
    made.tick(1e9)
    assert (busy.turn, other.turn) == (None, None)
    made.back(other)
    assert (busy.turn, other.turn) == (None, Turn.LOOK)
    made.wait(made.begin_look(other), "f1", 100.0, 0.0, POLLS)
    made.leave(other)
    made.tick(1e9)
    assert busy.turn is None
    made.back(busy)
    assert busy.turn is Turn.LOOK


def test_random_walks() -> None:
    """In thousands of random steps nobody is stranded, no room looks twice at once, and nothing is left at the end."""
    for seed in range(300):
        _walk(random.Random(seed))


def _walk(rng: random.Random) -> None:
    made = Rooms(rng.random, lambda _: None, lambda: 1e9)
    now = 0.0
    present: list[Seat] = []
    looks: dict[Seat, Look] = {}
    fences = ["f1", "f2", "f3"]
    for step in range(120):
        act = rng.randrange(10)
        if act < 3 and step < 90:
            present.append(enter(made, rng.choice("ab"), rng.choice([0.0, math.inf])))
        elif act == 3 and present:
            leaving = rng.choice(present)
            look = looks.pop(leaving, None)
            if look is not None:
                made.interrupted(look)
            made.leave(leaving)
            present.remove(leaving)
        elif act == 4:
            made.notice(rng.choice(fences), rng.choice([b"", b"v"]))
        elif act == 5:
            now += rng.random() * 3
            made.tick(now)
        elif act == 6:
            made.ring_all()
        elif looks and act < 9:
            looker = rng.choice(list(looks))
            look = looks.pop(looker)
            kind = rng.randrange(4)
            if kind == 0:
                made.settled(look, b"v")
            elif kind == 1:
                made.broken(look, StoreUnavailable("down"))
            else:
                made.wait(look, rng.choice(fences), rng.random() * 2, now, POLLS)
        for each in list(present):
            if isinstance(each.turn, Settled | Broken) and each not in looks:
                present.remove(each)
                assert made.leave(each) is None
            elif each.turn is Turn.LOOK and rng.random() < 0.7:
                looks[each] = made.begin_look(each)
        under_way = [id(look.room) for look in looks.values()]
        assert len(under_way) == len(set(under_way)), "one room looked twice at once"
    # Whoever is left is told to look, looks, or will be rung by a timer.
    for _ in range(200):
        for each, look in list(looks.items()):
            del looks[each]
            made.settled(look, b"v")
        for each in list(present):
            if isinstance(each.turn, Settled | Broken):
                present.remove(each)
                made.leave(each)
            elif each.turn is Turn.LOOK:
                looks[each] = made.begin_look(each)
        if not present and not looks:
            break
        now += 10
        made.tick(now)
    assert not present, "a caller was stranded"
    assert len(made) == 0


class Sleeper(Seat):
    """A seat of a loop that may stop, and be closed."""

    running: bool | None = True

    def ready(self) -> bool | None:
        return self.running


def asleep(made: Rooms, running: bool | None) -> tuple[Sleeper, Seat]:
    """Seat one whose loop runs no more since its turn came, or while it looks, and one that waits beside it."""
    sleeper = Sleeper()
    made.enter("k", sleeper)
    made.wait(made.begin_look(sleeper), "f1", 100.0, 0.0, POLLS)
    made.notice("f1", b"")
    assert sleeper.turn is Turn.LOOK
    other = enter(made)
    made.wait(made.begin_look(other), "f1", 100.0, 0.0, POLLS)
    sleeper.running = running
    return sleeper, other


@pytest.mark.parametrize("running", [True, False])
def test_turn_that_is_not_taken(running: bool) -> None:
    """It passes to another caller after a moment. Who comes to itself after that has no turn."""
    made = rooms()
    sleeper, other = asleep(made, running)
    assert made.tick(0.9) is not None
    assert other.turn is None
    made.tick(1.0)
    assert (sleeper.turn, other.turn) == (None, Turn.LOOK)
    assert made.begin_look(sleeper) is None
    made.settled(made.begin_look(other), b"v")
    assert isinstance(sleeper.turn, Settled)


def test_look_that_does_not_end() -> None:
    """Another caller looks then, and the first look does no harm when it ends after all."""
    made = rooms()
    sleeper, other = asleep(made, True)
    look = made.begin_look(sleeper)
    made.tick(5.0)
    assert other.turn is None
    made.tick(10.0)
    assert other.turn is Turn.LOOK
    made.wait(look, "f1", 100.0, 10.0, POLLS)
    made.settled(made.begin_look(other), b"v")
    assert isinstance(sleeper.turn, Settled)
    assert len(made) == 0


def test_loop_that_was_closed() -> None:
    """Its callers are nobody's any more, and no newcomer waits for them."""
    made = rooms()
    sleeper = Sleeper()
    made.enter("k", sleeper)
    made.begin_look(sleeper)
    sleeper.running = None
    other = enter(made)
    assert other.turn is Turn.LOOK
    made.settled(made.begin_look(other), b"v")
    assert len(made) == 0


def test_each_mode_looks_for_itself() -> None:
    """An answer to those who want a newer value keeps nobody waiting who wants any; the registration is for both."""
    made = rooms()
    [plain] = waiting(made)
    forced = seat()
    made.enter("k nonce", forced, "force")
    first = made.begin_look(forced)
    made.wait(first, "f1", 100.0, 0.0, POLLS)
    made.notice("f1", b"")
    assert plain.turn is forced.turn is Turn.LOOK
    made.wait(made.begin_look(forced), "f2", 100.0, 0.0, POLLS)
    made.settled(made.begin_look(plain), b"v")
    assert isinstance(plain.turn, Settled)
    assert forced.turn is None
    [plain] = waiting(made, "f2")
    assert made.leave(forced) is None
    assert made.leave(plain) == Place("f2", 5)
    assert len(made) == 0
