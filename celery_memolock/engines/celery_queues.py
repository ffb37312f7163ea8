"""Who consumes the queue that a Celery task's messages go to: for those who have waited for a worker in vain."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Final

from amqp.exceptions import NotFound

from ..bounded import inquire

__all__ = ["attendance"]

#: Seconds that a worker has to answer; one that is up does so at once.
_PATIENCE: Final = 0.25


def attendance(task: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Future[str] | None:
    """Find out which workers could take a message of a task; see `Engine.attendance`."""
    app = task.app
    try:
        route = app.amqp.router.route(dict(task._get_exec_options()), task.name, args, dict(kwargs), task_type=task)
        queue = str(route["queue"].name)
    except Exception:  # a router is the user's own; and who names an exchange alone leaves the queues to the broker
        return None
    found = weakref.ref(app)  # what is kept must not keep the app
    return inquire(app, queue, lambda left: _ask(found(), queue, left))


def _ask(app: Any, queue: str, left: ExitStack) -> str:
    connection = left.enter_context(app.connection_for_write())
    connection.connect()  # by itself it would try for ever
    where = f"queue {queue!r} at {connection.as_uri()}"
    if connection.transport.driver_type == "amqp":
        return _counted(connection, queue, where)
    return _answered(app, connection, queue, where) if connection.supports_exchange_type("fanout") else ""


def _counted(connection: Any, queue: str, where: str) -> str:
    """The broker itself knows."""
    try:
        count = connection.default_channel.queue_declare(queue, passive=True).consumer_count
    except NotFound:
        count = 0
    if not count:
        return f"no worker consumes {where}: is one running, with this broker?"
    return f"workers that consume {where}: {count}, {_BUSY}"


def _answered(app: Any, connection: Any, queue: str, where: str) -> str:
    """Only the workers know, and one that answers is enough."""
    others = 0

    def take(reply: Mapping[str, Any]) -> None:
        nonlocal others
        for worker, queues in reply.items():
            if isinstance(queues, list) and any(each["name"] == queue for each in queues):
                raise _Found(worker)
            others += 1

    try:
        app.control.broadcast("active_queues", connection=connection, reply=True, timeout=_PATIENCE, callback=take)
    except _Found as found:
        return f"worker {found} consumes {where}, and answers: {_BUSY}"
    text = f"no worker of {where} answered within {_PATIENCE:g} s"
    if others:
        return f"{text}, but {others} of other queues: does one consume it?"
    return f"{text}: is one running, with this broker, or busy in a pool that cannot answer meanwhile, such as solo?"


_BUSY: Final = "busy, or its log has an error; do web and workers have the same memolock_redis_url?"


class _Found(Exception):
    """The broadcast need not go on."""
