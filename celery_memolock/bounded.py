"""To do what may block, such as to send a message to a frozen broker, for no longer than one is ready to wait."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any, Final

from .errors import text_of

__all__ = ["LAST", "Asides", "TooSlow", "aside", "end_asides", "inquire", "log_failure", "not_before", "within"]

logger = logging.getLogger("celery_memolock")

#: At most so many actions that were given up may still block.
_MOST_STUCK: Final = 64

#: Seconds that a thread waits for its next action. One that is used again is faster than a new one, above all as
#: Celery makes a result backend for each thread that sends.
_IDLE: Final = 10.0

#: Seconds that the end of a process, or of a `MemoLock`, waits for what goes on beside its callers.
LAST: Final = 5.0

#: Seconds for which an answer is shared, and for which one is waited for.
_RECENT: Final = 5.0
_AWAITED: Final = 0.5

#: Of what nobody waits for, so many of a kind are done at once, and so many may wait for that.
_MOST_WORKING: Final = 8
_MOST_WAITING: Final = 10_000


class _Answer(Future[str]):
    """What becomes of a question.

    Attributes:
        asked: when, by the monotonic clock.
        shared: whether it is for others who ask the same later.
    """

    def __init__(self, asked: float) -> None:
        super().__init__()
        self.asked = asked
        self.shared = True


class TooSlow(Exception):
    """An action was given up, or not begun as too many block already."""


class _Job:
    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._context = copy_context()
        self._over = threading.Lock()  # faster than an Event, and this is on every miss's way
        self._over.acquire()
        self._failure: BaseException | None = None

    def do(self) -> None:
        try:
            self._context.run(self._action)
        except BaseException as error:  # it is raised in the thread that waits
            self._failure = error

    def end(self) -> None:
        self._over.release()

    def wait(self, timeout: float) -> bool:
        return self._over.acquire(timeout=timeout)

    def result(self) -> None:
        if self._failure is not None:
            raise self._failure


class _Courier(threading.Thread):
    """A thread that does one job after the other, and ends when none has come for a while."""

    def __init__(self) -> None:
        super().__init__(name="memolock-send", daemon=True)
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            try:
                job = self.jobs.get(timeout=_IDLE)
            except queue.Empty:
                with _lock:
                    if self in _idle:
                        _idle.remove(self)
                        return
                continue  # a job is on its way
            job.do()
            with _lock:
                _stuck.discard(self)
                _idle.append(self)
            job.end()
            del job


_lock = threading.Lock()
_asked: weakref.WeakKeyDictionary[Any, dict[str, _Answer]] = weakref.WeakKeyDictionary()
_idle: list[_Courier] = []
_stuck: set[_Courier] = set()


def _hand_over(job: _Job) -> _Courier:
    with _lock:
        courier = _idle.pop() if _idle else None
    if courier is None:
        courier = _Courier()
        courier.start()
    courier.jobs.put(job)
    return courier


def within(timeout: float, action: Callable[[], None]) -> None:
    """Run an action in another thread, in this context, and give it up after a time.

    What is given up goes on until the action itself ends.

    Raises:
        TooSlow: it was given up.
        BaseException: what the action raised.
    """
    if len(_stuck) >= _MOST_STUCK:
        raise TooSlow(f"still blocks {len(_stuck)} earlier messages")
    job = _Job(action)
    courier = _hand_over(job)
    if not job.wait(timeout):
        with _lock:
            if courier not in _idle:
                _stuck.add(courier)
        raise TooSlow(f"did not take a message within {timeout:g} s")
    job.result()


def inquire(owner: Any, about: str, ask: Callable[[ExitStack], str]) -> Future[str] | None:
    """Have another thread ask something, or share what was asked within the last seconds → the answer to wait for.

    So a crowd asks once, and a silent server holds one thread.

    Args:
        owner: of what is asked about; nothing outlives it.
        about: what that is.
        ask: returns the answer. If it fails, that is "". It is given a stack for what takes its time to close: that is
            done when the answer is there.

    Returns:
        None if the last one who was asked has kept silent for too long.
    """
    now = time.monotonic()
    with _lock:
        known = _asked.setdefault(owner, {})
        found = known.get(about)
        if found is not None and not found.done():
            return found if now < found.asked + _AWAITED else None
        if found is not None and found.shared and now < found.asked + _RECENT:
            return found
        answer = known[about] = _Answer(now)

    def work() -> None:
        try:
            with ExitStack() as stack:
                answer.set_result(ask(stack))
        except Exception as error:
            logger.debug("memolock could not learn about %s: %s", about, error)
        finally:
            if not answer.done():
                answer.set_result("")

    try:
        _hand_over(_Job(work))
    except RuntimeError:  # there is no thread to be had
        answer.set_result("")
    return answer


def not_before(moment: float, ask: Callable[[], Future[str] | None]) -> Future[str] | None:
    """Ask, and ask anew if what is shared was asked before a moment: what changed since then it does not tell.

    Returns:
        None also if an earlier question is under way: its answer may be of either time.
    """
    answer = ask()
    if not isinstance(answer, _Answer) or answer.asked >= moment:
        return answer
    if not answer.done():
        return None
    answer.shared = False
    return ask()


def log_failure(error: BaseException) -> None:
    """Say what came of something that nobody waited for."""
    logger.warning("memolock failed at a refresh in the background: %s", text_of(error))


class Asides:
    """Does what nobody waits for in other threads: a few at a time, the next wait.

    One too many is dropped: who needs it will ask again.
    """

    def __init__(self) -> None:
        self.renew()
        _all.add(self)

    def do(self, action: Callable[[], None], give_up: Callable[[], None] | None = None) -> None:
        """Run an action in another thread, in this context, and do not wait for it.

        Args:
            action: it raises nothing.
            give_up: what is to be done instead of its end, if all ends before that.
        """
        job = _Job(action)
        with self._changed:
            if len(self._waiting) >= _MOST_WAITING:
                return
            self._waiting.append(job)
            self._undone[job] = give_up
            if self._working >= _MOST_WORKING:
                return
            self._working += 1
        _hand_over(_Job(self._work))

    def end(self, patience: float) -> None:
        """Wait until all is done, at most for so many seconds, and give up the rest."""
        with self._changed:
            self._changed.wait_for(lambda: not self._undone, patience)
            left = [give_up for give_up in self._undone.values() if give_up is not None]
            self._undone.clear()
            self._waiting.clear()
        for give_up in left:
            try:
                give_up()
            except Exception as error:  # and so it would be with the others
                log_failure(error)
                return

    def renew(self) -> None:
        """Forget all: the threads are gone."""
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._undone: dict[_Job, Callable[[], None] | None] = {}
        self._working = 0

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._working -= 1
                    return
                job = self._waiting.popleft()
            job.do()
            with self._changed:
                self._undone.pop(job, None)
                self._changed.notify_all()


_all: weakref.WeakSet[Asides] = weakref.WeakSet()

#: Runs in the background whatever takes no longer than to send a message.
aside: Final = Asides()


@atexit.register
def end_asides() -> None:
    """Wait for what goes on beside the callers of this process, at most `LAST` seconds, and give up the rest."""
    deadline = time.monotonic() + LAST
    for each in (aside, *(other for other in list(_all) if other is not aside)):  # what is sent may begin others
        each.end(max(0.0, deadline - time.monotonic()))


def _renew() -> None:
    global _lock
    _lock = threading.Lock()
    _asked.clear()
    _idle.clear()
    _stuck.clear()
    for each in list(_all):
        each.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)  # threads do not survive a fork
