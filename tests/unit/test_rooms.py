"""Who looks for whom: the callers of one process, walked by hand and at random."""

from __future__ import annotations

import random

from celery_memolock.errors import StoreUnavailable
from celery_memolock.rooms import Broken, Look, Place, Rooms, Seat, Settled, Turn

POLLS = (1.0, 5.0)


def rooms() -> Rooms:
    return Rooms(lambda: 1.0, lambda _: None)


def seat() -> Seat:
    return Seat(lambda: None)


def enter(made: Rooms, key: str = "k") -> Seat:
    taken = seat()
    made.enter(key, taken)
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
    made.broken(look, StoreUnavailable, "down")
    assert first.turn == second.turn == Broken(StoreUnavailable, "down")
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
    made = Rooms(lambda: 1.0, alarms.append)
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


def test_random_walks() -> None:
    """In thousands of random steps nobody is stranded, no room looks twice at once, and nothing is left at the end."""
    for seed in range(300):
        _walk(random.Random(seed))


def _walk(rng: random.Random) -> None:
    made = Rooms(rng.random, lambda _: None)
    now = 0.0
    present: list[Seat] = []
    looks: dict[Seat, Look] = {}
    fences = ["f1", "f2", "f3"]
    for step in range(120):
        act = rng.randrange(10)
        if act < 3 and step < 90:
            present.append(enter(made, rng.choice("ab")))
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
                made.broken(look, StoreUnavailable, "down")
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
