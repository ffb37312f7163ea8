"""What only the main process of a Celery worker learns, told to those who wait: killed, revoked, out of time, unknown.

Celery imports this by name, in workers alone.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from functools import lru_cache
from typing import Any, Final

from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import signals
from celery.exceptions import InvalidTaskError
from kombu.exceptions import KombuError
from kombu.utils.imports import symbol_by_name

from ..effects import Ticket
from ..errors import FlightFailed
from ..work import holder_of
from .celery_flight import tell_failure, ticket_in

__all__ = ["FlightRequest", "request_class"]

#: Seconds after which Celery's pool, which looks after its processes every five, has replaced one that was killed. A
#: message that comes before may be given to the dead process, and lie there until another one comes.
REFILLED = 6.0

#: By the worker's name.
_pools: dict[str, Any] = {}

_Request: Any = importlib.import_module("celery.worker.request").Request


class FlightRequest(_Request):  # type: ignore[misc]  # Celery's is untyped
    """Celery's record of one message in the worker's main process, for tasks that may be flights."""

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Let another worker take over soon, whatever the lease, when this one's child is gone."""
        try:
            return super().on_failure(exc_info, send_failed_event, return_ok)
        finally:
            error = getattr(exc_info.exception, "exc", exc_info.exception)
            if isinstance(error, WorkerLostError | SystemExit):
                self._disown(None)
            elif isinstance(error, KombuError | InvalidTaskError):
                self._disown(error)  # the message could not be read, so that nothing else in the worker knows of it

    def on_timeout(self, soft: bool, timeout: float) -> Any:
        """Fail the flight when its run is killed at the hard time limit."""
        if not soft:
            self._disown(TimeLimitExceeded(timeout))
        return super().on_timeout(soft, timeout)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> Any:
        self._disown(FlightFailed(f"the message of task {self.name!r} was {reason}"))
        return super()._announce_revoked(reason, terminated, signum, expired)

    def _disown(self, error: Exception | None) -> None:
        ticket = ticket_in(self.message.headers, self.id)
        if ticket is None:
            return
        holder = holder_of(self.hostname, os.getpid(), self.worker_pid) if self.worker_pid else ""

        def tell() -> None:
            if error is None:
                self._await_replacement()
            if not tell_failure(self.task, ticket, holder, error) and holder:
                tell_failure(self.task, ticket, "", error or _before_it_began(ticket, self.name))

        # In a thread, as the main process must not wait for a server that may be slow.
        threading.Thread(target=tell, name="memolock-disown", daemon=True).start()

    def _await_replacement(self) -> None:
        """Return when the pool has a process in the place of the one that ran this."""
        deadline = time.monotonic() + REFILLED
        pool: Any = getattr(_pools.get(self.hostname), "_pool", None)  # Celery's has billiard's inside
        while time.monotonic() < deadline:
            pids = [process.pid for process in getattr(pool, "_pool", ())]
            if pids and self.worker_pid not in pids and len(pids) >= pool._processes:
                return
            time.sleep(0.1)


def _before_it_began(ticket: Ticket, name: str) -> FlightFailed | None:
    """Count a process that was lost before it began a flight → the error for those who wait, if it is not the first.

    The first may be Celery's fault, which gives messages to dead processes for some seconds: then they take over.
    """
    count = _lost.pop(ticket.keys.entry, 0) + 1
    if count >= _MOST_LOST:
        return FlightFailed(f"task {name!r} lost its worker {count} times before it began")
    if len(_lost) >= 1000:
        _lost.clear()
    _lost[ticket.keys.entry] = count
    return None


#: How many processes were lost before they began a flight, by its key.
_lost: dict[str, int] = {}
_MOST_LOST: Final = 2


@lru_cache
def request_class(theirs: Any) -> Any:
    """Return a class of requests that is both theirs and a `FlightRequest`; theirs may be named, as for Celery."""
    found = symbol_by_name(theirs)
    return found if issubclass(found, FlightRequest) else type(found.__name__, (FlightRequest, found), {})


def _on_ready(sender: Any, **_: Any) -> None:
    _pools[sender.hostname] = sender.pool


signals.worker_ready.connect(_on_ready, weak=False, dispatch_uid="celery_memolock.ready")
