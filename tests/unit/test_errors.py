"""The errors as values: what carries fields keeps them on every way that an exception goes."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from celery_memolock import WaitTimeout
from celery_memolock.codec import Entry, pack_error, unpack_error
from celery_memolock.rooms import Broken

FIELDS: dict[str, Any] = {"task": "f", "key": "f:1:x", "state": "QUEUED", "seconds_in_state": 2.5, "waited": 3.0}


def time_out() -> WaitTimeout:
    return WaitTimeout("no value", **FIELDS)


def raise_it() -> None:
    raise time_out()


def from_a_worker(error: WaitTimeout) -> Exception:
    """Return what callers get of a task that raised it."""
    packed = pack_error(error)
    return unpack_error(Entry.parse(f"ML1 E 17-abc 1 2 3 {packed.form}\n".encode() + packed.body))


WAYS: list[Callable[[WaitTimeout], Exception]] = [
    lambda error: pickle.loads(pickle.dumps(error)),
    copy.copy,
    copy.deepcopy,
    lambda error: type(error)(*error.args),
    lambda error: Broken.by(error).another(),
    from_a_worker,
]


@pytest.mark.parametrize("way", WAYS)
def test_copies_of_a_time_out(way: Callable[[WaitTimeout], Exception]) -> None:
    """A copy says the same, and has the same fields."""
    error = time_out()
    error.add_note("noted") if hasattr(error, "add_note") else None
    again = way(error)
    assert type(again) is WaitTimeout
    assert again is not error
    assert {name: getattr(again, name) for name in FIELDS} == FIELDS
    assert str(again) == "no value"


def test_time_out_in_another_process() -> None:
    """It comes back from a pool of processes, to threads and to asyncio."""

    async def ask() -> None:
        await asyncio.get_running_loop().run_in_executor(pool, raise_it)

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(WaitTimeout, match="no value") as caught:
            pool.submit(raise_it).result()
        assert vars(caught.value).items() >= FIELDS.items()
        with pytest.raises(WaitTimeout) as caught:
            asyncio.run(ask())
    assert vars(caught.value).items() >= FIELDS.items()


def test_time_out_of_somebody_else() -> None:
    """With no more than a message, as a test of an application may raise it, it is a whole exception."""
    error = WaitTimeout("no value")
    assert (str(error), error.task, error.state, error.seconds_in_state, error.waited) == (
        "no value",
        "",
        None,
        None,
        0,
    )
    assert error.errno is None
    assert str(WaitTimeout()) == ""
