"""The RQ engine: a flight is an ordinary RQ job of the function itself, with a ticket in the job's meta."""

from __future__ import annotations

import functools
import logging
import os
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import fields
from datetime import timedelta
from typing import Any, Final, Protocol, TypeVar, cast, overload

import redis
import rq
from rq import worker_registration
from rq.job import Job
from rq.utils import as_text, import_attribute
from typing_extensions import ParamSpec

from .. import environment
from ..aio import InThreads
from ..bounded import TooSlow, end_asides, inquire, within
from ..codec import Codec, pack_error
from ..effects import Defer, Disown, Finished, GoesOn, Raised, Ticket
from ..errors import (
    ConfigurationError,
    DispatchError,
    FlightFailed,
    MemoLockError,
    OptionError,
    StoreUnavailable,
    described,
    text_of,
)
from ..flight import Flight, grounded
from ..keys import KeyMaker, check_named
from ..memo import CallerMethods, Memo, computing
from ..options import Options, guess, is_async
from ..shape import Shape
from ..store import Store, Stores, client_in_environment, client_of
from ..work import Outcome, Work, as_wanted, read_ticket, unsendable, write_ticket
from .inline import InlineRuns, finished

__all__ = ["FlightNotices", "MemoLockJob", "MemoLockWorker", "memolocked_job", "on_failure", "on_stopped", "on_success"]

logger = logging.getLogger("celery_memolock")
P = ParamSpec("P")
R = TypeVar("R")
Ttl = float | timedelta | Callable[[Any], float]
QueueLike = str | rq.Queue | Callable[[], rq.Queue]

_META: Final = "memolock"
_OPTION_NAMES: Final = frozenset(f.name for f in fields(Options))

#: Options that are for Celery alone.
_OF_CELERY: Final = ("refresh_calls", "refresh_every")

#: What `memolocked_job` hands on to RQ, for flights and for jobs of the function's own alike.
_JOB_OPTIONS: Final = frozenset(
    (
        *("at_front", "description", "failure_ttl", "meta", "result_ttl", "retry", "timeout", "webhooks"),
        *("on_failure", "on_stopped", "on_success"),
    )
)

#: Seconds that a worker pauses before it puts a job at the end of its queue that is not to be run yet. RQ's own delay
#: would need a scheduler that nobody may have started.
_PAUSE: Final = 1.0

_AGAIN: Final = rq.Retry(max=1_000_000)


# ---- where flights go ------------------------------------------------------------------------------------------


class _Where:
    """The queue, and the server of the values, found at the first use: settings may come after imports."""

    _stores: Final = Stores()

    def __init__(self, queue: QueueLike, connection: Any, values: Any, prefix: str) -> None:
        self._given = queue
        self._connection = connection
        self._values = values
        self._prefix = prefix
        #: Of several threads that are the first to ask, all take what one of them made: what comes of it ends with it.
        self._made: dict[str, Any] = {}

    @property
    def queue(self) -> rq.Queue:
        """Where the jobs go.

        Raises:
            ConfigurationError: no connection is named.
        """
        if "queue" not in self._made:
            given = self._given
            if callable(given):
                given = given()
            elif isinstance(given, str):
                given = rq.Queue(given, connection=self._queue_connection(given))
            self._made.setdefault("queue", given)
        found: rq.Queue = self._made["queue"]
        return found

    @property
    def store(self) -> Store:
        """What keeps the values."""
        if "client" not in self._made:
            given = self._values
            named = client_of(given, "redis of memolocked_job") if given else client_in_environment()
            self._made.setdefault("client", named or self.queue.connection)
        return store_of(self._made["client"], self._prefix)

    def _queue_connection(self, name: str) -> redis.Redis:
        if self._connection:
            return client_of(self._connection, "connection of memolocked_job")
        if url := os.environ.get("RQ_REDIS_URL"):
            return client_of(url, "RQ_REDIS_URL")
        job = rq.get_current_job()
        if job is not None:
            return job.connection  # a worker is told on its command line
        raise ConfigurationError(
            f"memolock has no Redis for RQ's queue {name!r}: give memolocked_job a connection (a redis.Redis or a "
            f"URL) or a Queue, or set the environment variable RQ_REDIS_URL"
        )


def store_of(client: redis.Redis, prefix: str) -> Store:
    """Return the server of a client, made at the first use: one for all that share the client's pool."""
    return _Where._stores.of(client.connection_pool, lambda _: Store(client, prefix))


# ---- the engine ------------------------------------------------------------------------------------------------


class _RqEngine(InlineRuns, InThreads):
    """Sends flights as jobs of one function, and runs them here where there is no worker to wait for."""

    def __init__(self, where: _Where, path: str, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
        self._where = where
        self._path = path
        self._given = given
        self.function = function
        self.starts_loop = lambda _: is_async(function)

    @property
    def store(self) -> Store:
        """The server of the values."""
        return self._where.store

    @property
    def eager(self) -> bool:
        """Whether the queue was made with `is_async=False`."""
        return not self._where.queue.is_async

    @property
    def in_worker(self) -> bool:
        """Whether an RQ job runs in this context."""
        return rq.get_current_job() is not None

    @property
    def ends_with_job(self) -> bool:
        """RQ's forking worker ends a process with its job, without a word."""
        return self.in_worker

    @property
    def travels(self) -> bool:
        """Flights are jobs."""
        return True

    def send(self, ticket: Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float) -> None:
        """Enqueue the flight's job; see `Engine.send`."""
        queue = self._where.queue
        options = dict(self._given)
        retry: rq.Retry | None = options.get("retry")
        options["job_id"] = job_id = str(uuid.uuid4())  # as RQ makes them
        header = {**write_ticket(ticket, self.store.address), "job": job_id, "retries": retry.max if retry else 0}
        # The callbacks are ours, so that we hear what befalls the job; ours call the user's.
        for name in ("on_failure", "on_stopped", "on_success"):
            theirs: rq.Callback | None = options.pop(name, None)
            header[name] = theirs.name if theirs else None
            options[name] = rq.Callback(f"{__name__}.{name}", theirs.timeout if theirs else None)
        options["meta"] = {**(options.get("meta") or {}), _META: header}
        options.setdefault("result_ttl", 0)  # nobody asks for this result by the job's id
        # That of a django-rq which is to send when the request is done would keep it, in a thread that has no request.
        enqueue: Callable[..., Any] = getattr(queue, "original_enqueue_call", queue.enqueue_call)

        def publish() -> None:
            with queue.connection.pipeline() as pipeline:  # RQ itself makes two trips of it
                enqueue(self._path, args, dict(kwargs), pipeline=pipeline, **options)
                pipeline.execute()

        if "<locals>" in self._path:
            raise DispatchError(f"{self._path} is defined within another function, where no worker can import it from")
        if self._path.startswith("__main__."):
            raise DispatchError(f"{self._path} is defined in what is run as a script: put it into a module of its own")
        try:
            within(timeout, publish)
        except TooSlow as error:
            raise DispatchError(f"RQ's queue {queue.name!r} {error}") from None
        except (redis.RedisError, OSError) as error:
            raise DispatchError(
                f"the job of {self._path} could not be sent to queue {queue.name!r}: {error}"
            ) from error
        except Exception as error:
            raise self._unsendable(args, kwargs, error) from error

    def attendance(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Future[str] | None:
        """Read in RQ's registry; see `Engine.attendance`."""
        queue = self._where.queue
        return inquire(queue.connection.connection_pool, queue.name, lambda _: _attendance(queue))

    def _unsendable(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> MemoLockError:
        serializer: Any = self._where.queue.serializer
        found = unsendable(
            self._path,
            (self.function, args, kwargs),
            "the serializer of RQ's queue",
            lambda value: serializer.dumps(value),
        )
        return found or DispatchError(f"RQ did not take the job of {self._path}: {text_of(error)}")


def _attendance(queue: rq.Queue) -> str:
    keys = worker_registration.get_keys(queue)
    with queue.connection.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.hget(key, "state")
        states = [as_text(state) for state in pipeline.execute() if state is not None]  # else it is gone
    if not states:
        return f"no worker is registered for queue {queue.name!r}: is one running?"
    busy = states.count("busy")
    return f"workers registered for queue {queue.name!r}: {len(states)}, of them busy: {busy}"


# ---- a flight's job in a worker --------------------------------------------------------------------------------


def _header_of(job: Job) -> Any:
    """Return what is ours in a job's meta; None if that came with the meta of another job, which a user handed on.

    A ticket without a job's id is of a version before this one, and was sent by a caller who waits for it.
    """
    header: Any = (job.meta or {}).get(_META)
    return None if isinstance(header, Mapping) and header.get("job", job.id) != job.id else header


def _ticket_of(job: Job) -> tuple[Ticket, dict[str, Any]] | None:
    header = _header_of(job)
    ticket = None if header is None else read_ticket(header)
    return None if ticket is None or header is None else (ticket, header)


def _retries(job: Job, header: Mapping[str, Any]) -> int:
    """Count how often RQ sent the job again, for an exception or as it returned a `Retry`."""
    allowed: int = header.get("retries", 0)
    left = allowed if job.retries_left is None else job.retries_left
    return allowed - left + (job.number_of_retries or 0)


def _holder(job: Job, header: Mapping[str, Any]) -> str:
    """Name one execution of a job, as the worker's main process can do, too."""
    return f"rq/{job.id}/{_retries(job, header)}"


class _JobRun:
    """One execution of one flight's job."""

    def __init__(self, engine: _RqEngine, job: Job, ticket: Ticket, header: dict[str, Any]) -> None:
        self._engine = engine
        self._job = job
        self._ticket = ticket
        self._header = header
        self._retries = _retries(job, header)
        self._holder = _holder(job, header)
        self._left_by: BaseException | None = None
        self._result: Any = None

    def fly(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Claim, run and settle → what RQ is to take for the job's result. Raises what the function raised."""
        memo = self._engine.memo
        again = bool(self._header.get("again"))
        work = Work(self._engine, memo, self._ticket, args, kwargs, self._holder, self._retries, again)
        try:
            done = work.do(lambda flight: self._outcome(work, flight, args, kwargs))
        except StoreUnavailable as error:  # before the run: what comes after it is in what `do` returns
            if error.refused:
                raise
            logger.warning("memolock puts the job of key %s back: %s", self._ticket.keys.tag, error)
            return self._come_again(_PAUSE)
        if isinstance(done, Defer):
            return self._come_again(done.delay)
        if not isinstance(done, Finished):
            self._header["skipped"] = True
            return None
        if self._left_by is not None:
            raise self._left_by
        if done.answer is not None and done.refused is not None:
            raise done.refused
        return self._result

    def _outcome(self, work: Work, flight: Flight, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outcome:
        job = self._job
        self._header["ran"] = self._holder  # which attempt, as a user may save it with the job's meta
        try:
            value = finished(self._engine.function(*args, **kwargs))
            if isinstance(value, rq.Retry):
                return self._retry(work, value)
            outcome = flight.outcome(value)
            self._result = outcome.value
            return outcome
        except Exception as error:
            self._left_by = error
            if job.should_retry:
                if work.requeue(self._retries + 1, job.get_retry_interval()):
                    return GoesOn()
                job.retries_left = 0  # RQ need not repeat what nobody is told of
            return Raised(error)
        except BaseException as error:
            self._left_by = error
            return Raised(FlightFailed(f"{self._engine._path} ended by {described(error)}"))

    def _retry(self, work: Work, retry: rq.Retry) -> Outcome:
        """The function returned RQ's `Retry`."""
        done = self._job.number_of_retries or 0
        if done >= retry.max:
            self._result = retry
            return Raised(FlightFailed(f"{self._engine._path} returned a Retry more often than its max={retry.max}"))
        if work.requeue(self._retries + 1, rq.Retry.get_interval(done, retry.intervals)):
            self._result = retry
        return GoesOn()

    def _come_again(self, delay: float) -> rq.Retry:
        time.sleep(min(delay, _PAUSE))
        job = self._job
        self._header["again"] = True
        # RQ counts one more, which is none of those that the function itself may ask for.
        job.number_of_retries = (job.number_of_retries or 0) - 1
        return _AGAIN


# ---- what only RQ learns ---------------------------------------------------------------------------------------


def on_success(job: Job, connection: redis.Redis, result: Any) -> None:
    """RQ calls this when a flight's job succeeded, which it does also where there was nothing to run.

    If it never came to its run, as the function's name means something else here, those who wait hear so.
    """
    found = _ticket_of(job)
    if found is None or found[1].get("skipped"):
        return
    if found[1].get("ran") != _holder(job, found[1]):
        text = f"job {job.id} succeeded without a run of its flight: {job.func_name} is no memolocked job here"
        _disown(job, connection, ("", FlightFailed(text)))
    _call_theirs(job, "on_success", connection, result)


def on_failure(job: Job, connection: redis.Redis, kind: Any, error: Any, trace: Any) -> None:
    """RQ calls this when a flight's job failed. If it never came to its run, those who wait hear so at once.

    If its run came to no outcome, as RQ's time-out struck while that was brought to the server, they may take over. Of
    a copy of the job that had nothing to run there is nothing to say: another one may be running.
    """
    found = _ticket_of(job)
    if found is not None and not found[1].get("skipped"):
        words: list[tuple[str, Exception | None]] = []
        holder = _holder(job, found[1])
        if found[1].get("ran") == holder:
            words.append((holder, None))
        if not job.should_retry:
            hint = "does its worker run where that can be imported, with the code of its callers?"
            text = f"job {job.id} of {job.func_name} failed before it ran: {text_of(error)} ({hint})"
            words.append(("", FlightFailed(text)))
        _disown(job, connection, *words)
    _call_theirs(job, "on_failure", connection, kind, error, trace)


def on_stopped(job: Job, connection: redis.Redis) -> None:
    """RQ calls this when a flight's job was stopped on request: all who wait hear so at once."""
    found = _ticket_of(job)
    if found is not None:
        reason = FlightFailed(f"job {job.id} of {job.func_name} was stopped")
        _disown(job, connection, (_holder(job, found[1]), reason))
    _call_theirs(job, "on_stopped", connection)


def _call_theirs(job: Job, name: str, *args: Any) -> None:
    found = _ticket_of(job)
    theirs = found and found[1].get(name)
    if theirs is not None:
        import_attribute(theirs)(job, *args)


def _disown(job: Job, connection: redis.Redis, *words: tuple[str, Exception | None]) -> None:
    """Say of a holder, or with "" of the message, that nothing will come of it, but for the error if there is one."""
    found = _ticket_of(job)
    if found is None:
        return
    ticket, _ = found
    options: Options | None = None
    try:
        try:
            engine: _RqEngine = vars(job.func)["memolocked"]
            store = engine.store
            options = as_wanted(engine.memo, ticket).options
        except Exception:  # it may be the import that failed
            store = store_of(client_in_environment() or connection, "memolock")
        for holder, error in words:
            ttl = 0.0 if error is None or options is None else options.error_ttl_of(error)
            outcome = None if error is None else pack_error(error)
            disown = Disown(ticket.keys, ticket.fence, holder, outcome, 30.0, ttl)
            try:
                store.run(disown)
            except StoreUnavailable as away:
                queues = store_of(connection, "memolock")
                if not away.refused or queues.address != ticket.server:
                    raise
                queues.run(disown)  # where those who wait for the flight listen
    except MemoLockError as trouble:
        logger.warning("memolock leaves key %s to its lease: %s", ticket.keys.tag, trouble)


class FlightNotices:
    """Makes an RQ worker class tell at once when a work-horse was killed. Without it the flight's lease decides.

    Its work-horses end when what they do in the background has ended, see `MemoLock.close`.

    Put it before the worker class: ``class Mine(FlightNotices, SpawnWorker): ...``
    """

    def handle_work_horse_killed(self, job: Job, retpid: Any, ret_val: Any, rusage: Any) -> None:
        """Let somebody take over the flight of the killed process."""
        found = _ticket_of(job)
        if found is not None:
            _disown(job, job.connection, (_holder(job, found[1]), None))
        super().handle_work_horse_killed(job, retpid, ret_val, rusage)  # type: ignore[misc]

    def perform_job(self, *args: Any, **kwargs: Any) -> bool:
        """Wait for what the job began beside itself with a `MemoLock`: RQ ends its process without a word."""
        worker: Any = self
        try:
            return super().perform_job(*args, **kwargs)  # type: ignore[misc, no-any-return]
        finally:
            if worker.is_horse:
                end_asides()


class MemoLockWorker(FlightNotices, rq.Worker):
    """RQ's worker with `FlightNotices`: ``rq worker --worker-class celery_memolock.rq.MemoLockWorker``."""


# ---- the decorator ---------------------------------------------------------------------------------------------


class MemoLockJob(CallerMethods[P, R]):
    """What `memolocked_job` gives its function beside RQ's `enqueue` and `delay`: the methods of `CallerMethods`."""

    def __init__(self, where: _Where, path: str, function: Callable[..., Any], memo: Memo[P, R], given: Any) -> None:
        self._where = where
        self._path = path
        self._function = function
        self._memo = memo
        self._given = given

    @property
    def memo(self) -> Memo[P, R]:
        """What the caller methods work on."""
        return self._memo

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call the function itself; a coroutine function's result is to be awaited."""
        return self._function(*args, **kwargs)

    def enqueue(self, *args: Any, **kwargs: Any) -> Job:
        """Send an ordinary job of the function, as RQ's own decorator does. It neither reads nor fills the cache.

        Args:
            args, kwargs: as the function takes them, and of RQ `depends_on`, `job_id` and `at_front`.

        Raises:
            ConfigurationError: no connection is named.
        """
        options = {**self._given, **{name: kwargs.pop(name) for name in _ENQUEUE & kwargs.keys()}}
        return self._where.queue.enqueue_call(self._path, args, kwargs, **options)

    delay = enqueue


_ENQUEUE: Final = frozenset(["at_front", "depends_on", "job_id"])


class _Decorate(Protocol):
    """What `memolocked_job` returns."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> MemoLockJob[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R], /) -> MemoLockJob[P, R]: ...


def memolocked_job(
    queue: QueueLike = "default",
    *,
    ttl: Ttl,
    connection: redis.Redis | str | None = None,
    redis: redis.Redis | str | None = None,
    **options: Any,
) -> _Decorate:
    """Make an RQ job of a function, whose callers share one cached value, and one run when it is missing.

    What it returns is still a function, so that RQ finds it by module and name as ever; the methods of `MemoLockJob`
    are its attributes.

    Args:
        queue: RQ's queue, its name, or a function that returns it at the first use (as ``django_rq.get_queue`` does).
        ttl: seconds that a value is fresh, or a function that is given the value and returns that. RQ's own option of
            this name is not for flights: a lost job is noticed after `queue_timeout`.
        connection: for a queue that is given by its name. Default: the environment variable RQ_REDIS_URL, as for the
            command ``rq``.
        redis: the server that keeps the values. Default: the environment variable MEMOLOCK_REDIS_URL, or else the
            queue's.
        options: all other fields of `Options`, and of RQ `timeout`, `retry`, `result_ttl` (of flights 0 by default),
            `failure_ttl`, `at_front`, `meta`, `description`, `webhooks`, `on_success`, `on_failure`, `on_stopped`.

    Raises:
        OptionError: an option is unknown, or has a value that makes no sense.
    """
    ours = {"ttl": ttl, **{name: options.pop(name) for name in list(options) if name in _OPTION_NAMES}}
    for name in _OF_CELERY:
        if name in ours:
            raise OptionError(
                f"memolock option {name} is for Celery beat; with RQ let `rq cron` call a function that calls refresh"
            )
    for name in options:
        if name not in _JOB_OPTIONS:
            meant = f" ({near})" if (near := guess(name, _OPTION_NAMES | _JOB_OPTIONS)) else ""
            raise OptionError(
                f"unknown option {name!r}{meant}: memolock's are: {', '.join(sorted(_OPTION_NAMES - {*_OF_CELERY}))}; "
                f"of RQ's it hands on: {', '.join(sorted(_JOB_OPTIONS))}"
            )
    for name in ("on_failure", "on_stopped", "on_success"):
        if not isinstance(options.get(name), rq.Callback | None):
            options[name] = rq.Callback(options[name])
    checked = Options.build(ours, environment.defaults())
    where = _Where(queue, connection, redis, checked.prefix)

    def decorate(function: Callable[..., Any], /) -> Any:
        check_named(function, "memolocked_job")
        path = f"{function.__module__}.{function.__qualname__}"
        shape = Shape.of(path, function) if checked.typed else None
        engine = _RqEngine(where, path, function, options)
        maker = KeyMaker(path, function, checked)
        engine.memo = Memo(path, engine, checked, maker, Codec(path, checked, shape))

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            job = rq.get_current_job()
            # Not a plain call of this function from inside of a flight, its own or another's.
            if job is not None and job.func_name == path and not computing.get() and _header_of(job) is not None:
                found = _ticket_of(job)
                if found is not None:
                    return _JobRun(engine, job, *found).fly(args, kwargs)
                return None  # nobody could be told of its value
            with grounded():
                return function(*args, **kwargs)

        methods: MemoLockJob[..., Any] = MemoLockJob(where, path, function, engine.memo, options)
        names = [name for name in dir(MemoLockJob) if not name.startswith("_")]
        vars(run).update({name: getattr(methods, name) for name in names}, memolocked=engine)
        return run

    return cast(_Decorate, decorate)
