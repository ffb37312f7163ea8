"""One web process of the storm: threads that ask, themselves or in an event loop, and one that changes the source."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import cache
from typing import Any

from benchmarks.chaos.tasks import LOCAL_LEASE, WAIT, SourceDown, app, kept, value, witness
from celery_memolock import MemoLockError, WaitTimeout
from celery_memolock.engines.celery_settings import store_of

TASKS = {"k0": value, "k1": value, "k2": value, "k3": value, "kept0": kept, "kept1": kept}
THREADS = 10
Call = Callable[..., Any]
PATIENCE = 10.0  # seconds beyond wait_timeout after which a call counts as hung
#: How old, in seconds, news of a change may be where values are kept: the lease, and the delays of a busy machine.
LATE = LOCAL_LEASE + 1.0


def from_threads(name: str, key: str, *value: Any) -> Any:
    """Call a caller method in this thread."""
    return getattr(TASKS[key].with_options(wait_timeout=WAIT), name)(*value, key)


def from_asyncio(name: str, key: str, *value: Any) -> Any:
    """Call its twin in the process's event loop."""
    method = getattr(TASKS[key].with_options(wait_timeout=WAIT), f"a{name}")
    return asyncio.run_coroutine_threadsafe(method(*value, key), the_loop()).result()


@cache
def the_loop() -> asyncio.AbstractEventLoop:
    """Return a running loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


class News:
    """What was read of the versions whose invalidation was acknowledged, and when."""

    def __init__(self) -> None:
        self._read: defaultdict[str, deque[tuple[float, int]]] = defaultdict(deque)

    def of(self, key: str) -> int:
        """Return the version that an answer must have at least."""
        version = int(witness.get(f"acknowledged:{key}") or 0)  # type: ignore[arg-type]
        if TASKS[key] is value:
            return version
        read, now = self._read[key], time.monotonic()
        read.append((now, version))
        while len(read) > 1 and read[1][0] <= now - LATE:
            read.popleft()
        return read[0][1] if read[0][0] <= now - LATE else 0


def ask(call: Call, rng: random.Random, until: float) -> None:
    """Ask for values, and hold each against what was acknowledged before the call."""
    news = News()
    while time.monotonic() < until:
        key = rng.choice(list(TASKS))
        acknowledged = news.of(key)
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
        key = rng.choice(list(TASKS))
        try:
            # Who sets a value must not be late: nobody else knows that it is older than what came meanwhile.
            with witness.lock(f"lock:{key}", timeout=30):
                for _ in range(10 if rng.random() < 0.1 else 1):
                    version = witness.incr(f"source:{key}")
                    if rng.random() < 0.2:
                        call("set_cached", key, [key, version, "set"])
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
