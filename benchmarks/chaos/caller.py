"""One web process of the storm: threads that ask, themselves or in an event loop, and one that changes the source."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

from benchmarks.chaos.tasks import WAIT, SourceDown, app, value, witness
from celery_memolock import MemoLockError, WaitTimeout
from celery_memolock.engines.celery import store_of

KEYS = 5
THREADS = 10
Call = Callable[..., Any]
PATIENCE = 10.0  # seconds beyond wait_timeout after which a call counts as hung


def from_threads(name: str, *arguments: Any) -> Any:
    """Call a caller method in this thread."""
    return getattr(value.with_options(wait_timeout=WAIT), name)(*arguments)


def from_asyncio(name: str, *arguments: Any) -> Any:
    """Call its twin in the process's event loop."""
    method = getattr(value.with_options(wait_timeout=WAIT), f"a{name}")
    return asyncio.run_coroutine_threadsafe(method(*arguments), the_loop()).result()


@cache
def the_loop() -> asyncio.AbstractEventLoop:
    """Return a running loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def ask(call: Call, rng: random.Random, until: float) -> None:
    """Ask for values, and hold each against what was acknowledged before the call."""
    while time.monotonic() < until:
        key = f"k{rng.randrange(KEYS)}"
        acknowledged = int(witness.get(f"acknowledged:{key}") or 0)  # type: ignore[arg-type]
        began = time.monotonic()
        try:
            answer = call("get_cached", key)
        except SourceDown:
            outcome = "source errors"
        except WaitTimeout as error:
            outcome = "time-outs"
            witness.rpush("messages", str(error))
        except MemoLockError as error:
            outcome = type(error).__name__
        else:
            outcome = "answers"
            if answer[0] != key:
                violation("wrong values", [key, answer[:2]])
            elif int(str(answer[1])) < acknowledged:
                violation("stale answers", [key, answer[:2], acknowledged, began, time.monotonic()])
        took = time.monotonic() - began
        if took > WAIT + PATIENCE:
            violation("hung callers", [key, took])
        with witness.pipeline(transaction=False) as note:
            note.hincrby("counts", outcome, 1).rpush("took", round(took, 4)).execute()
        time.sleep(rng.random() * 0.05)


def change(call: Call, rng: random.Random, until: float) -> None:
    """Change the source and invalidate, now and then in a burst; sometimes set the value, sometimes refresh."""
    while time.monotonic() < until:
        key = f"k{rng.randrange(KEYS)}"
        try:
            # Who sets a value must not be late: nobody else knows that it is older than what came meanwhile.
            with witness.lock(f"lock:{key}", timeout=30):
                for _ in range(10 if rng.random() < 0.1 else 1):
                    version = witness.incr(f"source:{key}")
                    if rng.random() < 0.2:
                        call("set_cached", [key, version, "set"], key)
                    else:
                        call("invalidate", key)
                    witness.set(f"acknowledged:{key}", version)
            if rng.random() < 0.2:
                call("refresh", key)
        except MemoLockError as error:
            witness.hincrby("counts", f"change: {type(error).__name__}", 1)
        time.sleep(rng.random())


def violation(kind: str, what: object) -> None:
    """Write down what must never happen."""
    witness.hincrby("violations", kind, 1)
    witness.rpush("messages", f"{kind}: {json.dumps(what)}")


def main() -> None:
    seconds, seed = float(sys.argv[1]), int(sys.argv[2])
    call = from_asyncio if sys.argv[3] == "asyncio" else from_threads
    if call is from_asyncio:
        the_loop()
    until = time.monotonic() + seconds
    crowd = [
        threading.Thread(target=ask, args=(call, random.Random(seed + n), until), daemon=True) for n in range(THREADS)
    ]
    crowd.append(threading.Thread(target=change, args=(call, random.Random(seed - 1), until), daemon=True))
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join(max(0.0, until - time.monotonic()) + WAIT + PATIENCE)
    for thread in crowd:
        if thread.is_alive():
            violation("hung callers", "at the end")
    if len(store_of(app).inbox.rooms):
        violation("leaked rooms", len(store_of(app).inbox.rooms))


if __name__ == "__main__":
    main()
