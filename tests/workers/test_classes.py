"""Task classes of all kinds, before and behind memolock's, with Celery's own worker for tests.

That one runs in a thread, and has no protection of the request's stack: a class's `__call__` that calls Celery's own
lays a second request over the message's.
"""

from __future__ import annotations

import abc
import functools
import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import redis
from celery import Celery, Task, _state
from celery.contrib.testing.worker import start_worker
from celery.worker.request import Request

from celery_memolock import (
    MISS,
    DispatchError,
    MemoLockTask,
    OptionError,
    ReentrantFlight,
    WaitTimeout,
    current_flight,
    external,
    memolocked_task,
)
from celery_memolock.server import Server
from celery_memolock.work import Work
from tests.workers.conftest import in_background, until

T = TypeVar("T")


class Plain(Task):
    """Adds nothing."""

    abstract = True


class Slotted(Task):
    """Has slots."""

    __slots__ = ("mine",)
    abstract = True


class Abstract(Task, abc.ABC):
    """Has a metaclass, and names what a task must have."""

    abstract = True

    @abc.abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any: ...


class GenericLast(Task, Generic[T]):
    """Is generic."""

    abstract = True


class GenericFirst(Generic[T], Task):
    """Is generic, which it says first."""

    abstract = True


class Tagged(type):
    """A metaclass."""

    def __call__(cls, *args: Any) -> Any:
        task = super().__call__(*args)
        task.tag = "tagged"
        return task


class WithMetaclass(Task, metaclass=Tagged):
    """Has a metaclass that makes its tasks."""

    abstract = True


class Counted(Request):  # type: ignore[misc]
    """Counts those that are made."""

    made = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Counted.made += 1


class OwnRequest(Task):
    """Has a class of requests of its own, which counts."""

    abstract = True
    Request = Counted


class OwnNames(Task):
    """Has attributes that a careless library would use as well."""

    abstract = True
    _body, _memo, _run, _options, _flight = "body", "memo", "run", "options", "flight"


class Retrying(Task):
    """Decides itself how to retry."""

    abstract = True

    def retry(self, *args: Any, **options: Any) -> Any:
        options.setdefault("countdown", 0.01)
        return super().retry(*args, **options)


class OwnHeaders(Task):
    """Sends headers of its own, and no others."""

    abstract = True

    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        return super().apply_async(args, kwargs, *more, **{**options, "headers": {"tenant": "one"}})


class OfThread(Task):
    """Sends with each message what it knows of the thread that sends it."""

    abstract = True
    known: ClassVar[Any] = threading.local()

    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        headers = {**(options.pop("headers", None) or {}), "tenant": getattr(self.known, "tenant", None)}
        return super().apply_async(args, kwargs, *more, headers=headers, **options)


class OwnSignature(Task):
    """Makes the message of a retry from scratch."""

    abstract = True

    def signature_from_request(self, request: Any = None, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        found = request or self.request
        return self.signature(found.args, found.kwargs, task_id=found.id, retries=options["retries"])


class OwnSignatureFirst(OwnSignature, MemoLockTask[..., Any]):
    """Stands before memolock's class."""

    abstract = True


class Calling(Task):
    """Calls Celery's own `__call__`."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class CallingFirst(Calling, MemoLockTask[..., Any]):
    """Stands before memolock's class."""

    abstract = True


BASES: list[type[Any]] = [
    Plain,
    Slotted,
    Abstract,
    GenericLast,
    GenericFirst,
    WithMetaclass,
    OwnRequest,
    OwnNames,
    Retrying,
    OwnHeaders,
    OfThread,
    OwnSignature,
    OwnSignatureFirst,
    Calling,
    CallingFirst,
]


class Committing(Task):
    """Raises when the run is over, as what commits a transaction may."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        super().__call__(*args, **kwargs)
        raise LookupError("no commit")


class Rescuing(Task):
    """Has a value for a run that fails."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.run(*args, **kwargs)
        except ZeroDivisionError as error:
            return ["rescued", str(error)]


class Repeating(Task):
    """Runs until it goes well."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return self.run(*args, **kwargs)
            except ZeroDivisionError:
                args = (args[0] + 1,)


class RetryingAround(Task):
    """Retries what fails, from around the run."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return ["after retries", self.request.retries, self.run(*args, **kwargs)]
        except ZeroDivisionError as error:
            raise self.retry(exc=error, countdown=0, max_retries=2) from error


class InThread(Task):
    """Runs in another thread."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return in_background(self.run, *args, **kwargs).result(10)


class InThreadFirst(InThread, MemoLockTask[..., Any]):
    """Stands before memolock's class."""

    abstract = True


AROUND: list[type[Any]] = [Committing, Rescuing, Repeating, RetryingAround, InThread, InThreadFirst]


class Injecting(Task):
    """Gives the run more than its caller did, and what no message takes."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, session=threading.Lock(), **kwargs)


class Forwarding(Task):
    """Sends what a run sends with the headers of its own message, as recipes for tenants and traces do."""

    abstract = True

    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        task = _state.get_current_task()
        ours = {"memolock": vars(task.request)["memolock"]} if task and "memolock" in vars(task.request) else {}
        headers = {**ours, **(task.request.headers or {} if task else {}), **(options.pop("headers", None) or {})}
        # Some instrumentations put what they find there into a dictionary within, too.
        return super().apply_async(args, kwargs, *more, headers={**headers, "headers": headers}, **options)


class Auditing(Task):
    """Sends another task first, with the headers of what it is to send."""

    abstract = True

    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        self.app.tasks["other"].apply_async(args, headers=options.get("headers"))
        return super().apply_async(args, kwargs, *more, **options)


class Once(Task):
    """Sends nothing, as another message is under way that does the same, which it returns."""

    abstract = True

    def apply_async(self, *args: Any, **options: Any) -> Any:
        return self.AsyncResult("of another message")


class AtOnce(Task):
    """Runs here, and sends nothing."""

    abstract = True

    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        return self.apply(args, kwargs, headers=options.get("headers"))


class OwnId(Task):
    """Runs in eager mode under an id of its own."""

    abstract = True

    def apply(self, *args: Any, **options: Any) -> Any:
        return super().apply(*args, **{**options, "task_id": uuid.uuid4().hex})


class AskingLater(MemoLockTask[..., Any]):
    """Asks for its own value when it is there."""

    abstract = True
    found: ClassVar[list[Any]] = []

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self.found.append(self.get_cached(*args, **kwargs))


def called(*args: Any, **_: Any) -> Any:
    """Return how many arguments there were, and the last of them."""
    return [len(args), args[-1]]


class Object:
    """Is no method, and can be called."""

    def __call__(self, *args: Any) -> Any:
        return called(*args)


class Static(Task):
    """Has a `__call__` without the task."""

    abstract = True
    __call__ = staticmethod(called)


class OfClass(Task):
    """Has a `__call__` of the class."""

    abstract = True
    __call__ = classmethod(called)


class ByObject(Task):
    """Has a `__call__` that is no method."""

    abstract = True
    __call__ = Object()


class Wrapping(Calling):
    """Wraps a base's `__call__` as decorators do."""

    abstract = True

    @functools.wraps(Calling.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return ["wrapped", super().__call__(*args, **kwargs)]


class Decorator:
    """Is a decorator, with an attribute that others may have, too."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return ["decorated", self._call(*args, **kwargs)]


class Decorated(Task):
    """Has a `__call__` below a decorator that is an object."""

    abstract = True

    @Decorator
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


CALLED: dict[type[Any], Any] = {
    Static: [1, 1],
    OfClass: [2, 1],
    ByObject: [1, 1],
    Wrapping: ["wrapped", [1, 0]],
    Decorated: ["decorated", [1, 0]],
}


class SendingBefore(Task):
    """Sends itself with the headers of its message, before its run."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        if args[0]:
            self.apply_async((0,), headers=self.request.headers)


class Quiet(Task):
    """Sends nothing."""

    abstract = True

    def apply_async(self, *args: Any, **options: Any) -> None: ...


class SendsInThread(Task):
    """Sends in a thread of its own, by means of its own."""

    abstract = True

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        options.pop("producer", None)
        threading.Timer(0.1, super().apply_async, (args, kwargs), options).start()


class Asking(MemoLockTask[..., Any]):
    """Asks for its own value before its run."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        self.get_cached(*args, **kwargs)


class Counting(MemoLockTask[[int], Any]):
    """Is made with an argument, and does not call its base's `__init__`."""

    abstract = True
    memolock: ClassVar[Any] = {"ttl": 60, "key": "{number}"}

    def __new__(cls, count: int) -> Counting:
        made = super().__new__(cls)
        made.new = count
        return made

    def __init__(self, count: int) -> None:
        self.count = count


class ByMethod(Counting):
    """Runs a method."""

    name = "classes.by_method"

    def run(self, number: int) -> Any:
        return [number, self.count, self.new]


class ByStaticMethod(Counting):
    """Runs a static method."""

    name = "classes.by_static_method"

    @staticmethod
    def run(number: int) -> Any:
        return [number, 3, 3]


class ByClassMethod(Counting):
    """Runs a class method."""

    name = "classes.by_class_method"

    @classmethod
    def run(cls, number: int) -> Any:
        return [number, 3, 3]


tokens: queue.Queue[str] = queue.Queue()
started: queue.Queue[int] = queue.Queue()
ran: queue.Queue[tuple[str, int]] = queue.Queue()
gate = threading.Event()


@pytest.fixture(scope="module")
def tasks(server: Server) -> Iterator[dict[str, Any]]:
    """A task of each kind, and a worker."""
    app = Celery("classes", broker=server.url, backend="cache+memory://", set_as_current=False)
    name = f"classes-{uuid.uuid4().hex[:8]}"
    app.conf.update(memolock_prefix=name, memolock_wait_timeout=10, task_default_queue=name)
    made: dict[str, Any] = {}

    def make(base: type[Any], kind: str, **options: Any) -> Callable[..., Any]:
        name = f"{base.__name__} {kind}"

        def keep(function: Callable[..., Any]) -> None:
            made[name] = memolocked_task(app=app, ttl=60, base=base, name=name, bind=True, **options)(function)

        return keep  # type: ignore[return-value]

    for base in BASES:

        @make(base, "plain")
        def plain(self: Any, number: int) -> Any:
            return [number, self.request.retries]

        @make(base, "retried", max_retries=2)
        def retried(self: Any, number: int) -> Any:
            if self.request.retries < 2:
                raise self.retry(**({} if isinstance(self, Retrying) else {"countdown": 0}))
            return [number, self.request.retries]

        @make(base, "external", external=True, external_timeout=10)
        def handed_out(self: Any, number: int) -> None:
            tokens.put(current_flight.token)

    @memolocked_task(app=app, ttl=60, base=OfThread, name="sender", bind=True)
    def sender(self: Any, number: int) -> Any:
        return [self.request.tenant, self.request.parent_id]

    @memolocked_task(app=app, ttl=60, base=OfThread, name="parent", bind=True)
    def parent(self: Any, number: int) -> Any:
        self.known.tenant = f"the parent of {number}"
        sender.with_options(nested="dispatch").refresh(number)
        return self.request.id

    for base in AROUND:

        @make(base, "divided")
        def divided(self: Any, number: int) -> Any:
            return [100 / (number - self.request.retries), bool(current_flight)]

    @memolocked_task(
        app=app, ttl=60, base=Injecting, name="injected", key="{number}", tags=lambda number: [f"injected {number}"]
    )
    def injected(number: int, session: Any = None) -> Any:
        started.put(number)
        if number == 3:
            assert gate.wait(10)
        return [number, type(session).__name__]

    @memolocked_task(app=app, ttl=60, base=Forwarding, name="forwarding", bind=True)
    def forwarding(self: Any, number: int) -> Any:
        if number:
            self.delay(number - 1)
            other.delay(number)
            ours = {"memolock": vars(self.request).get("memolock")}
            app.tasks["ordinary"].apply_async((number,), headers=ours)
            other.apply((number,), headers=ours)
        ran.put(("forwarding", number))
        return ["forwarding", number]

    @memolocked_task(app=app, ttl=60, base=Forwarding, name="other")
    def other(number: int) -> Any:
        ran.put(("other", number))
        return ["other", number]

    @app.task(name="ordinary", shared=False)
    def ordinary(number: int) -> None:
        ran.put(("ordinary", number))

    for base in (Quiet, SendsInThread, Asking, Auditing, Once, AtOnce, *CALLED):

        @make(base, "plain")
        def simple(self: Any, number: int) -> Any:
            return [number, self.request.retries]

    made.update(sender=sender, parent=parent, injected=injected, forwarding=forwarding, other=other)
    for cls in (ByMethod, ByStaticMethod, ByClassMethod):
        made[cls.__name__] = app.register_task(cls(3))
    app.finalize()
    app.conf.worker_hijack_root_logger = False
    before: Any = _state.default_app, _state._tls.current_app
    try:
        with start_worker(app, perform_ping_check=False, pool="solo", loglevel="INFO"):
            yield made
    finally:  # it makes its app the one of the whole process
        _state.default_app, _state._tls.current_app = before


@pytest.mark.parametrize("base", BASES)
def test_bases(tasks: dict[str, Any], base: type[Any]) -> None:
    """Whatever a base is or overrides, its tasks' flights have their values, at once and after retries."""
    plain, retried = (tasks[f"{base.__name__} {kind}"] for kind in ("plain", "retried"))
    assert isinstance(plain, base)
    assert (plain.get_cached(1), plain.delay(2).get(10, interval=0.01), plain(3)) == ([1, 0], [2, 0], [3, 0])
    assert (retried.get_cached(1), retried.delay(2).get(10, interval=0.01)) == ([1, 2], [2, 2])


@pytest.mark.parametrize("base", [Plain, Calling, CallingFirst])
def test_nothing_to_tell(
    tasks: dict[str, Any], server: Server, base: type[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A flight that is handed out, or was a refresh in the worker itself, is not taken for one that never began."""
    plain, handed_out = (tasks[f"{base.__name__} {kind}"] for kind in ("plain", "external"))
    waiting = in_background(handed_out.get_cached, 1)
    assert external.settle(redis.Redis.from_url(server.url), tokens.get(timeout=10), "settled") == "OK"
    assert waiting.result(10) == "settled"
    plain.refresher(4).apply_async(ignore_result=False).get(10, interval=0.01)
    assert plain.peek(4) == [4, 0]
    plain.delay(0).get(10, interval=0.01)  # the worker has come to its next message
    assert not [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("base", AROUND)
@pytest.mark.parametrize("number", [0, 2])
def test_around_the_run(tasks: dict[str, Any], base: type[Any], number: int) -> None:
    """What a class's `__call__` makes of the run is what all who wait get, be it a value, an error or a retry."""
    task = tasks[f"{base.__name__} divided"]

    def told(get: Callable[[], Any]) -> str:
        try:
            return str(get())
        except (LookupError, ZeroDivisionError) as error:
            return f"{type(error).__name__}: {error}"

    as_ever = told(lambda: task.delay(number).get(10, interval=0.01))
    assert "True" not in as_ever
    in_flight = as_ever if "Thread" in base.__name__ else as_ever.replace("False", "True")
    assert told(lambda: task.get_cached(number)) == in_flight


def test_injected_arguments(tasks: dict[str, Any]) -> None:
    """What a class's `__call__` adds to the arguments is no part of the key, its tags, or the refresh asked for."""
    injected = tasks["injected"]
    assert injected.get_cached(1) == [1, "lock"]
    assert injected.invalidate_tag("injected 1") == 1
    injected.refresher(2).apply_async(ignore_result=False).get(10, interval=0.01)
    assert injected.peek(2) == [2, "lock"]
    waiting = in_background(injected.get_cached, 3)
    until(lambda: started.get(timeout=10) == 3)
    assert injected.refresh(3) is False
    gate.set()
    assert waiting.result(10) == [3, "lock"]
    assert started.get(timeout=10) == 3  # once more, as asked for


def test_forwarded_headers(tasks: dict[str, Any]) -> None:
    """A run may send other tasks, and itself, with the headers of its own message: they run as they always do."""
    assert tasks["forwarding"].get_cached(2) == ["forwarding", 2]
    heard = sorted(ran.get(timeout=10) for _ in range(9))
    assert heard == [
        *(("forwarding", number) for number in range(3)),
        *(("ordinary", number) for number in (1, 2)),
        *(("other", number) for number in (1, 1, 2, 2)),
    ]


def test_headers_of_what_is_sent(tasks: dict[str, Any]) -> None:
    """What a class sends beside a flight's message, with the headers of that, is no part of the flight."""
    assert tasks["Auditing plain"].get_cached(5) == [5, 0]
    assert ran.get(timeout=10) == ("other", 5)


@pytest.mark.parametrize("base", CALLED)
def test_kinds_of_calls(tasks: dict[str, Any], base: type[Any]) -> None:
    """A `__call__` may be of any kind, and stays that."""
    task = tasks[f"{base.__name__} plain"]
    assert task(1) == task.delay(1).get(10, interval=0.01) == task.get_cached(1) == CALLED[base]


def test_call_that_an_instrumentation_wraps(tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes a class's `__call__`, and puts another around it, has the flight in there."""
    task = tasks["Wrapping plain"]
    theirs: Any = type(task).__call__

    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return theirs(self, *args, **kwargs)

    monkeypatch.setattr(type(task), "__call__", traced)
    assert task.get_cached(2) == task(2) == ["wrapped", [2, 0]]


def test_sent_by_other_means(tasks: dict[str, Any]) -> None:
    """A class may run the task itself in place of a message, or leave it to one that is under way."""
    assert tasks["AtOnce plain"].get_cached(1) == [1, 0]
    with pytest.raises(WaitTimeout):
        tasks["Once plain"].with_options(wait_timeout=0.3).get_cached(1)


@pytest.mark.parametrize("base", [OwnId, AskingLater, SendingBefore])
def test_eager(server: Server, base: type[Any]) -> None:
    """In eager mode, too, a class may name its runs, send others, and ask for its own value once that is there."""
    app = Celery("eager classes", broker=server.url, set_as_current=False)
    app.conf.update(task_always_eager=True, memolock_prefix=uuid.uuid4().hex, memolock_wait_timeout=10)
    runs: list[int] = []

    @memolocked_task(app=app, ttl=60, base=base, name="eager", bind=True)
    def eager(self: Any, number: int) -> int:
        runs.append(number)
        return number

    AskingLater.found.clear()
    assert eager.get_cached(7) == 7
    assert runs == ([0, 7] if base is SendingBefore else [7])
    assert AskingLater.found == ([7] if base is AskingLater else [])


@pytest.mark.parametrize("base", [Plain, Calling])
def test_names_of_parameters(server: Server, base: type[Any]) -> None:
    """A task's parameters may have any name."""
    app = Celery("named", broker=server.url, set_as_current=False)
    app.conf.update(task_always_eager=True, memolock_prefix=uuid.uuid4().hex)

    @memolocked_task(app=app, ttl=60, base=base, name="named")
    def named(task: int, call: int, run: int, request: int, body: int) -> list[int]:
        return [task, call, run, request, body]

    numbers = {"task": 1, "call": 2, "run": 3, "request": 4, "body": 5}
    assert named(**numbers) == named.get_cached(**numbers) == type(named).__call__(named, **numbers) == [1, 2, 3, 4, 5]


def test_sends_nothing(tasks: dict[str, Any]) -> None:
    """Who waits for a message that its class did not send is told so, and not left to wait."""
    with pytest.raises(DispatchError, match="apply_async of task 'Quiet plain' sent no message"):
        tasks["Quiet plain"].get_cached(1)
    assert tasks["SendsInThread plain"].get_cached(1) == [1, 0]


def test_asks_for_its_own_value(tasks: dict[str, Any]) -> None:
    """A hook that asks for the very value that is to be computed is refused, as a run would be."""
    with pytest.raises(ReentrantFlight, match="'Asking plain' asked for key"):
        tasks["Asking plain"].get_cached(1)


def test_fault_after_the_run(tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Should memolock itself fail between a run and its settling, those who wait hear of that at once."""
    settle = Work.do

    def fail(self: Work, body: Callable[..., Any]) -> Any:
        def broken(flight: Any) -> Any:
            body(flight)
            raise RuntimeError("of our own")

        return settle(self, broken)

    monkeypatch.setattr(Work, "do", fail)
    with pytest.raises(RuntimeError, match="of our own"):
        tasks["Plain plain"].get_cached(99)


def test_sender(tasks: dict[str, Any]) -> None:
    """A class's own `apply_async` runs in the thread that asks, and a flight has the task that asks as its parent."""
    sender, parent = tasks["sender"], tasks["parent"]
    OfThread.known.tenant = "the tenant"
    assert sender.get_cached(1) == ["the tenant", None]
    assert sender.invalidate(1)
    identity = parent.get_cached(1)
    until(lambda: sender.peek(1) is not MISS)
    assert sender.peek(1) == ["the parent of 1", identity]


def test_own_request(tasks: dict[str, Any]) -> None:
    """Messages become requests of a base's own class, too."""
    before = Counted.made
    tasks["OwnRequest plain"].get_cached(7)
    assert Counted.made == before + 1


@pytest.mark.parametrize("cls", [ByMethod, ByStaticMethod, ByClassMethod])
def test_classes(tasks: dict[str, Any], cls: type[Any]) -> None:
    """A class may be made with arguments, and its `run` be any kind of method."""
    assert tasks[cls.__name__].get_cached(1) == [1, 3, 3]
    assert tasks[cls.__name__].delay(2).get(10, interval=0.01) == [2, 3, 3]


def test_async_run() -> None:
    """An async `run` is refused where its class is defined."""
    with pytest.raises(OptionError, match=r"Later\.run is an async function"):

        class Later(MemoLockTask[[], Any]):
            memolock: ClassVar[Any] = {"ttl": 60}

            async def run(self) -> Any: ...
