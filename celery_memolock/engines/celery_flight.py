"""A flight's message of Celery: how it is sent, how a worker runs it, and how a worker tells that it never ran."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any, Final

import celery
from celery import signals
from celery.exceptions import Ignore, Reject, Retry, WorkerShutdown, WorkerTerminate
from celery.utils import uuid
from celery.utils.objects import mro_lookup
from kombu import serialization
from kombu.exceptions import EncodeError as KombuEncodeError

from ..aio import InThreads
from ..bounded import TooSlow, within
from ..codec import pack_error
from ..effects import Defer, Disown, Finished, GoesOn, Interrupted, Raised, Returned, Ticket
from ..errors import ArgumentError, DispatchError, FlightFailed, MemoLockError, StoreUnavailable, described
from ..flight import Flight, grounded
from ..keys import is_of_task
from ..memo import computes
from ..store import Store
from ..work import Outcome, Work, as_wanted, holder_of, read_ticket, unsendable, write_ticket
from .celery_beat import HEADER, is_refresh, note_run, run_refresh
from .celery_queues import attendance
from .celery_settings import store_of, tell

__all__ = ["CeleryEngine", "FlightMessage", "is_run_here", "message_of", "ticket_in", "with_flights"]

logger = logging.getLogger("celery_memolock")

#: Which task runs: the stubs know half of it.
_state: Any = importlib.import_module("celery._state")

#: Seconds until a message comes again that a worker could not claim, having no way to the server. Another may have one.
_PUT_BACK: Final = 1.0


# ---- sending ---------------------------------------------------------------------------------------------------


class CeleryEngine(InThreads):
    """Sends flights as messages of one task, and runs them here where there is no worker to wait for."""

    def __init__(self, task: Any) -> None:
        self._task = task

    @property
    def store(self) -> Store:
        """The server that the task's app is configured with."""
        return store_of(self._task.app)

    @property
    def eager(self) -> bool:
        """Celery's `task_always_eager`."""
        return bool(self._task.app.conf.task_always_eager)

    @property
    def in_worker(self) -> bool:
        """Whether a Celery task is running in this thread."""
        return _state.get_current_worker_task() is not None

    @property
    def ends_with_job(self) -> bool:
        """A process of Celery's lives on."""
        return False

    @property
    def travels(self) -> bool:
        """Flights are messages."""
        return True

    @property
    def holder(self) -> str:
        """None: an inline run is a Celery task as well, which claims for itself."""
        return ""

    def send(self, ticket: Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float) -> None:
        """Publish the flight's message; see `Engine.send`."""
        task, headers, published = self._task, self._headers(ticket), threading.Event()
        before = _publishing.set((task.name, headers[HEADER]))
        _unpublished[ticket.fence] = task.name, published
        try:
            # Nobody asks for this result by its task id: it needs no place in a result backend, or in its parent's.
            unasked = {"ignore_result": True, "add_to_parent": False}
            result = task.apply_async(
                args, dict(kwargs), headers=headers, producer=_Bounded(task.app, timeout), **unasked
            )
            if result is None:  # else it was sent, or run, or another message does its work
                published.wait(min(timeout, _ELSEWHERE))
        except (KombuEncodeError, TypeError) as error:
            raise self._unsendable(args, kwargs, error) from error
        except TooSlow as error:
            raise DispatchError(f"the broker at {self._broker()} {error}") from None
        except Exception as error:
            raise DispatchError(
                f"the message of task {task.name!r} could not be sent to {self._broker()}: {error}"
            ) from error
        finally:
            _publishing.reset(before)
            del _unpublished[ticket.fence]
        if published.is_set():
            return
        if result is None:
            raise DispatchError(
                f"apply_async of task {task.name!r} sent no message: its class may keep it back until a transaction "
                f"ends, or drop it; a flight's message is to be sent at once"
            )
        logger.info("memolock waits for key %s, though apply_async sent no message: %r", ticket.keys.tag, result)

    def attendance(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Future[str] | None:
        """Ask the broker, or the workers themselves; see `Engine.attendance`."""
        return attendance(self._task, args, kwargs)

    def run_here(self, ticket: Ticket | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a flight, or without a ticket the bare task, in this thread; see `Engine.run_here`."""
        headers = None if ticket is None else self._headers(ticket)
        with nullcontext() if ticket is None else computes(ticket) as before:
            here = _run_here.set((task_id := uuid(), before))
            try:
                # Not even with `task_eager_propagates`: that would end a retry, too.
                result = self._task.apply(args, dict(kwargs), headers=headers, task_id=task_id, throw=False)
            finally:
                _run_here.reset(here)
        if ticket is None:
            return result.get(disable_sync_subtasks=False)
        note_run(result)
        return None

    def _headers(self, ticket: Ticket) -> dict[str, Any]:
        return {HEADER: write_ticket(ticket, self.store.address)}

    def _broker(self) -> str:
        return str(self._task.app.connection_for_write().as_uri())

    def _unsendable(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> ArgumentError:
        name = self._task.serializer or self._task.app.conf.task_serializer
        whose, call = f"task {self._task.name!r}", (self._task.run, args, kwargs)
        found = unsendable(
            whose, call, f"Celery's serializer {name!r}", lambda value: serialization.dumps(value, serializer=name)
        )
        return found or ArgumentError(f"the arguments of {whose} cannot be sent: {error}")


#: The id of the task that a caller of this context runs for itself, and what is to be called when its run begins.
_run_here: ContextVar[tuple[str, Callable[[], None] | None] | None] = ContextVar(
    "celery_memolock_run_here", default=None
)


def is_run_here(request: Any) -> bool:
    """Whether a request of Celery's is that of a task that its caller runs for itself."""
    here = _run_here.get()
    return here is not None and request is not None and request.id == here[0]


class _Bounded:
    """Stands for a producer of Celery's, and gives up a broker that does not answer.

    Only what may block is done in another thread: a class's own `apply_async`, a handler of a signal, and Celery itself
    look for what belongs to the thread that asks, such as the tenant of a request or the task that runs.
    """

    def __init__(self, app: Any, timeout: float) -> None:
        self._app = app
        self._timeout = timeout
        self.connection = self  # of which Celery wants nothing but the next method

    def _reraise_as_library_errors(self) -> AbstractContextManager[None]:
        return nullcontext()

    def publish(self, *args: Any, **options: Any) -> None:
        """Publish as one of Celery's own producers does."""

        def publish() -> None:
            with self._app.producer_or_acquire() as producer, producer.connection._reraise_as_library_errors():
                producer.publish(*args, **options)

        within(self._timeout, publish)


# ---- the headers -----------------------------------------------------------------------------------------------


def header_in(headers: Any) -> Any:
    """Return what is ours among a message's headers; None if nothing is.

    An instrumentation that wraps `apply_async` may put a dictionary named headers into the headers. Then Celery shows
    a task that inner dictionary as its headers, and sends it with a retry in place of what was sent first.
    """
    for _ in range(_MOST_NESTED):
        if not isinstance(headers, Mapping):
            return None
        found = headers.get(HEADER)
        if found is not None:
            return found
        headers = headers.get("headers")
    return None


#: So many instrumentations may each have put the headers of the one before into their own.
_MOST_NESTED: Final = 5


def ticket_in(headers: Any, task_id: str | None) -> Ticket | None:
    """Return the ticket in a message's headers; None if it is no flight's, or cannot be read."""
    header = header_in(headers)
    if header is None or is_refresh(header) or not _is_of_message(header, task_id):
        return None
    return read_ticket(header)


def _is_of_message(header: Any, task_id: str | None) -> bool:
    """Whether ours among a message's headers was put there for it: a run may hand its headers on to what it sends."""
    return not isinstance(header, Mapping) or header.get("id", task_id) == task_id


def _take_ours_out(headers: dict[str, Any]) -> None:
    headers.pop(HEADER, None)
    if isinstance(headers.get("headers"), Mapping):  # which may be somebody else's
        inner = headers["headers"] = dict(headers["headers"])
        _take_ours_out(inner)


#: Whose message this context publishes, by its task's name, and what is ours among its headers.
_publishing: ContextVar[tuple[str, Mapping[str, Any]] | None] = ContextVar("celery_memolock_publishing", default=None)

#: The flights whose messages this process is about to publish, by their fences: their tasks, and what is set then.
_unpublished: dict[str, tuple[str, threading.Event]] = {}

#: Seconds for a class that publishes its messages from a thread of its own.
_ELSEWHERE: Final = 1.0


def _on_publish(sender: Any, body: Any, headers: dict[str, Any], properties: dict[str, Any], **_: Any) -> None:
    """See that what is ours is in a flight's own message, and in no other.

    A class's `apply_async` or an instrumentation may have dropped it, and a run may send other tasks with its headers.
    A flight's message that expires is dropped by a worker, which tells those who wait; RabbitMQ would tell nobody.
    """
    found, publishing, task = header_in(headers), _publishing.get(), _state.get_current_task()
    by_protocol_1 = body if isinstance(body, Mapping) else {}
    task_id = headers.get("id") or by_protocol_1.get("id")
    foreign = found is not None and not _is_of_message(found, task_id)
    header: Any = None
    if publishing is not None and publishing[0] == sender:
        header = publishing[1]
    elif isinstance(found, Mapping) and "id" not in found:
        waiting = _unpublished.get(str(found.get("fence")))
        if waiting is not None:  # from a thread of the class's own, or of another task with the headers of this one
            foreign = waiting[0] != sender
            header = None if foreign else found
    if header is not None:
        header = {**header, "id": task_id}
        if (waiting := _unpublished.get(header["fence"])) is not None:  # else that thread was late
            waiting[1].set()
    elif task is not None and task.name == sender and (request := message_of(task)) is not None:
        again = request.id == task_id
        # What a task is replaced by has its id, too, and is no flight's.
        if again and headers.get("replaced_task_nesting", 0) == request.replaced_task_nesting:
            header = header_in(vars(request))
        foreign = foreign or again
    if header is not None or foreign:
        _take_ours_out(headers)
    if header is not None:
        headers[HEADER] = header
        if not is_refresh(header):
            properties.pop("expiration", None)


# ---- running ---------------------------------------------------------------------------------------------------


def _on_start(sender: Any, **_: Any) -> None:
    """Bind a ticket that came by no message to the run that has it, before a hook may hand its headers on."""
    request = sender.request
    header = header_in(vars(request))
    if isinstance(header, dict) and "fence" in header:
        header.setdefault("id", request.id)


def with_flights(task: Any) -> None:
    """Make a flight of whatever a task runs for a message with a ticket.

    Celery calls the task's `run`, or, if one of its classes has a `__call__` of its own, that one in its place. What
    the outer of them comes to is what the flight comes to, as it is for any task.
    """
    task.run = _run_with_flights(task, task.run)
    cls = type(task)
    where: Any = mro_lookup(cls, "__call__", {celery.Task, object}, ["celery.app.task"])
    if where is not None and not isinstance(call := vars(where)["__call__"], _CallWithFlights):
        cls.__call__ = _CallWithFlights(call)


#: In what a message's request says how far its flight has come: into a class's `__call__`, or into `run`.
_WITHIN: Final = "memolock_within"


def _run_with_flights(task: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def fly(*args: Any, **kwargs: Any) -> Any:
        return _enter(task, "run", functools.partial(run, *args, **kwargs))

    return fly


class _CallWithFlights:
    """A class's own `__call__`, of whatever kind that is."""

    def __init__(self, call: Any) -> None:
        functools.update_wrapper(self, call, updated=())  # what it looks like, and not what it has
        self._call = call

    def __get__(self, task: Any, cls: Any = None) -> Any:
        if task is None:
            return self
        call = self._call.__get__(task, cls) if hasattr(self._call, "__get__") else self._call
        return functools.partial(_call_with_flights, task, call)

    def __call__(self, task: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call it as who takes it from the class does, to put more around it."""
        return self.__get__(task, type(task))(*args, **kwargs)


def _call_with_flights(task: Any, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return _enter(task, "__call__", functools.partial(call, *args, **kwargs))


def _enter(task: Any, part: str, body: Callable[[], Any]) -> Any:
    """Run a part of a task: the outermost for its message, or one within that."""
    request = message_of(task)
    within = getattr(request, _WITHIN, None)
    if within is None:
        return _fly(task, request, part, body)
    if within == "run":  # a plain call of this task from inside its own run must not be the flight again
        with grounded():
            return body()
    setattr(request, _WITHIN, part)  # in a class's `__call__`, which calls another's, or the run
    try:
        return body()
    finally:
        setattr(request, _WITHIN, within)


def _fly(task: Any, request: Any, part: str, body: Callable[[], Any]) -> Any:
    """Run what Celery called for a message."""
    header = header_in(getattr(request, "__dict__", None))
    ticket = None if header is None or is_refresh(header) else read_ticket(header)
    foreign = ticket is not None and not is_of_task(ticket.keys, task.name)
    if header is None or foreign or not _is_of_message(header, request.id):
        with grounded():
            return body()
    setattr(request, _WITHIN, part)
    if is_refresh(header):
        return run_refresh(task.memo, header, request.args, request.kwargs)
    if ticket is None:
        raise Ignore("memolock drops a message whose ticket it cannot read")
    here = _run_here.get()
    if here is not None and here[0] == request.id and here[1] is not None:
        here[1]()
    request.memolock_flight = FlightMessage(task, request, ticket, body)
    return request.memolock_flight.fly()


def message_of(task: Any) -> Any:
    """Return Celery's request of the message that a task runs for; None in a plain call.

    Celery's own `__call__`, if a class or a plain call comes by it, lays a copy of that over it for as long as it runs.
    """
    requests = [each for each in task.request_stack.stack if not each.called_directly]
    return next((each for each in requests if each.id == requests[-1].id), None)


class FlightMessage:
    """One message of one flight in a worker.

    Attributes:
        told: whether those who wait know what became of the message, or will know without another word.
        running: whether the task's own code runs.
        holder: names the process that runs it, once it has begun.
    """

    def __init__(self, task: Any, request: Any, ticket: Ticket, body: Callable[[], Any]) -> None:
        self._task = task
        self._request = request
        self._ticket = ticket
        self._body = body
        self._work: Work | None = None
        self._goes_on = False
        self._left_by: BaseException | None = None
        self.running = False
        self.told = False
        self.holder = ""

    def fly(self) -> Any:
        """Claim, run and settle. Raises what the run raised, or `Ignore` where there is nothing to run."""
        request = self._request
        # The message's own arguments: a class's `__call__` may give the run others, which nobody asked for by the key.
        args, kwargs = tuple(request.args), dict(request.kwargs)
        holder = holder_of(request.hostname, os.getppid(), os.getpid())
        redelivered = bool((request.delivery_info or {}).get("redelivered"))
        engine = CeleryEngine(self._task)
        work = Work(engine, self._task.memo, self._ticket, args, kwargs, holder, request.retries, redelivered)
        self._work = work

        def body(flight: Flight) -> Outcome:
            self.running, self.holder = True, holder
            try:
                return self._outcome(flight)
            finally:
                self.running = False

        try:
            done = work.do(body)
        except StoreUnavailable as error:  # before the run: what comes after it is in what `do` returns
            if error.refused:
                raise
            logger.warning("memolock puts the message of key %s back: %s", self._ticket.keys.tag, error)
            self._send_again(_PUT_BACK)
            raise Ignore from None
        finally:
            self.told = self.told or isinstance(work.outcome, Interrupted)
        if isinstance(done, Defer):
            self._send_again(done.delay)
        self.told = True
        if not isinstance(done, Finished):
            raise Ignore
        if self._left_by is not None:
            raise self._left_by
        if done.answer is not None and done.refused is not None:
            raise done.refused
        assert isinstance(work.outcome, Returned)
        return work.outcome.value

    def requeue(self, retries: int, delay: float) -> None:
        """Put the flight back into the queue, before its message is sent again.

        Raises:
            Ignore: an invalidation or a take-over made this flight worthless, and a retry would be in vain.
        """
        assert self._work is not None
        self._goes_on = True
        if not self._work.requeue(retries, delay):
            raise Ignore("memolock does not retry a flight that an invalidation or another flight made worthless")

    def _outcome(self, flight: Flight) -> Outcome:
        try:
            return flight.outcome(self._body())
        except (Retry, Ignore, Reject) as left:
            self._left_by = left
            if _comes_back(left, self._task) and not self._goes_on:
                self.requeue(self._request.retries, 0.0)
            elif isinstance(left, Reject) or not self._goes_on:
                return Raised(_without_value(self._task, left))
            return GoesOn()
        except Exception as error:
            self._left_by = error
            return Raised(error)
        except BaseException as error:
            if _is_terminated(error):
                raise  # the main process tells why, or the lease decides
            self._left_by = error
            if self._request.is_eager or _ends_worker(error):
                return Interrupted(error)
            return Raised(_without_value(self._task, error))

    def _send_again(self, delay: float) -> None:
        request = self._request
        if not request.is_eager:  # else there is no message: a waiting caller takes over when the lease has passed
            again = self._task.signature_from_request(request, countdown=delay, retries=request.retries)
            again.apply_async()
        self.told = True


def until(eta: datetime) -> float:
    """Return the seconds until then."""
    now = datetime.now(eta.tzinfo) if eta.tzinfo else datetime.now(timezone.utc).replace(tzinfo=None)
    return max(0.0, (eta - now).total_seconds())


# ---- how a run ends --------------------------------------------------------------------------------------------


def _comes_back(left: BaseException | None, task: Any) -> bool:
    return isinstance(left, Reject) and bool(vars(left)["requeue"]) and bool(task.acks_late)


def _without_value(task: Any, left: BaseException) -> FlightFailed:
    """Return what those hear who wait for a run that ended by something else than an error."""
    text = f"task {task.name!r} ended without a value: {described(left)}"
    if isinstance(left, Reject) and vars(left)["requeue"] and not task.acks_late:
        text += " (a message that was acknowledged early cannot be requeued: set acks_late=True)"
    failed = FlightFailed(text)
    failed.__cause__ = left  # its traceback is told, too
    return failed


def _is_terminated(error: BaseException) -> bool:
    """Whether a process of Celery's pool ends by a signal: its handler exits with the signal less 256."""
    return isinstance(error, SystemExit) and isinstance(error.code, int) and -256 < error.code < -128


def _ends_worker(error: BaseException) -> bool:
    """Whether it is the worker that ends, and not the task: then somebody else may begin at once."""
    greenlets: Any = sys.modules.get("greenlet")
    return isinstance(error, WorkerShutdown | WorkerTerminate) or (
        greenlets is not None and isinstance(error, greenlets.GreenletExit)
    )


# ---- messages that end without a run ---------------------------------------------------------------------------


def _on_end(sender: Any, state: str | None = None, retval: Any = None, **_: Any) -> None:
    """A task's message has ended: if its flight never began, those who wait hear why.

    A class's own `before_start` or `__call__` may have raised, or the worker have other code or settings than its
    callers.
    """
    request = getattr(sender, "request", None)
    message: FlightMessage | None = getattr(request, "memolock_flight", None)
    if message is not None and message.told:
        return  # as nearly always: its ticket need not be read again
    ticket = ticket_in(getattr(request, "__dict__", None), getattr(request, "id", None))
    if ticket is None or not is_of_task(ticket.keys, sender.name):
        return
    left = retval if isinstance(retval, BaseException) else sys.exc_info()[1]
    if state == "RETRY" or isinstance(left, Retry) or _comes_back(left, sender):
        return  # it comes again
    if left is None:
        error: Exception = _without_flight(sender)
    elif isinstance(left, Exception) and not isinstance(left, Ignore | Reject):
        error = left
    elif _is_terminated(left) or _ends_worker(left):
        return  # the main process tells why, or the lease decides
    else:
        error = _without_value(sender, left)
    tag, why = ticket.keys.tag, described(error)
    logger.warning("memolock tells those who wait for key %s that its flight came to nothing: %s", tag, why)
    tell_failure(sender, ticket, message.holder if message else "", error)


def _without_flight(task: Any) -> FlightFailed:
    """Return what those hear who wait for a message that ended as if nobody had waited."""
    if hasattr(task, "memolock"):
        text = "ended without a flight: its run was patched, or is called by what Celery does not know as its __call__"
    else:
        text = "is an ordinary task on its worker, which stores no value: is the worker's code that of its callers?"
    return FlightFailed(f"task {task.name!r} {text}")


def tell_failure(task: Any, ticket: Ticket, holder: str, error: Exception | None) -> bool:
    """Tell those who wait that a run, or with no holder a message, came to nothing → whether that concerned a flight.

    Without an error they take over.
    """
    try:
        outcome, ttl = None, 0.0
        if error is not None:
            outcome = pack_error(error)
            try:
                ttl = as_wanted(task.memo, ticket).options.error_ttl_of(error)
            except (AttributeError, MemoLockError):
                pass  # that this worker has no options of the task, or wrong ones, may be what is told
        return bool(tell(task.app, ticket.server, Disown(ticket.keys, ticket.fence, holder, outcome, 30.0, ttl)))
    except MemoLockError as trouble:
        logger.error("memolock leaves those who wait for key %s to their time-outs: %s", ticket.keys.tag, trouble)
    return False


def _on_unknown(sender: Any, message: Any, name: str, **_: Any) -> None:
    """A worker does not know the task: all who wait for the flight hear so at once."""
    own = name.rpartition(".")[2]
    alike = ", ".join(repr(each) for each in sorted(sender.app.tasks) if each.rpartition(".")[2] == own)
    has = f", which has {alike} (whoever runs a module as a script names its tasks otherwise: give them name=)"
    text = f"task {name!r} is not registered on worker {sender.hostname}{has if alike else ''}"
    _tell_of_message(sender, message, text)


def _on_rejected(sender: Any, message: Any, exc: BaseException | None = None, **_: Any) -> None:
    """A worker may not read the message, such as one in a serializer that it does not accept."""
    why = "" if exc is None else f": {described(exc)}"
    _tell_of_message(sender, message, f"worker {sender.hostname} refused the message{why}")


def _tell_of_message(consumer: Any, message: Any, text: str) -> None:
    ticket = ticket_in(message.headers, message.properties.get("correlation_id"))
    if ticket is None:
        return
    error = FlightFailed(f"{text} (are its modules and its configuration those of its callers?)")
    try:
        tell(consumer.app, ticket.server, Disown(ticket.keys, ticket.fence, "", pack_error(error), 30.0))
    except MemoLockError as failed:
        logger.warning("memolock could not tell that %s: %s", text, failed)


signals.before_task_publish.connect(_on_publish, weak=False, dispatch_uid="celery_memolock.publish")
signals.task_prerun.connect(_on_start, weak=False, dispatch_uid="celery_memolock.start")
signals.task_postrun.connect(_on_end, weak=False, dispatch_uid="celery_memolock.end")
signals.task_unknown.connect(_on_unknown, weak=False, dispatch_uid="celery_memolock.unknown")
signals.task_rejected.connect(_on_rejected, weak=False, dispatch_uid="celery_memolock.rejected")
