"""What is wrong with a task is said where it is defined, or at first use if only the app's configuration tells."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
from celery import Celery, Task
from celery.worker.request import Request
from kombu import serialization

from celery_memolock import MemoLock, MemoLockTask, OptionError, memolocked_task
from celery_memolock.engines.celery_worker import FlightRequest
from celery_memolock.rq import memolocked_job


def test_a_decorator_that_is_misplaced(app: Celery) -> None:
    """Without its options, or over a task of Celery's, it says how it is meant."""
    wrong: Any = memolocked_task
    for misuse in (lambda: wrong(says), wrong, lambda: wrong(ttl=5)(app.task(shared=False)(says))):
        with pytest.raises(OptionError, match="@memolocked_task"):
            misuse()


@pytest.fixture
def app() -> Celery:
    return Celery("definitions", set_as_current=False, broker="memory://")


def silent(key):  # type: ignore[no-untyped-def]
    return key


def says_none(key: str) -> None: ...


def says(key: str) -> list[int]:
    return [len(key)]


@pytest.mark.parametrize("what", [5, functools.partial(says, "k"), str.join, type])
@pytest.mark.parametrize("decorator", [memolocked_task, functools.partial(memolocked_job, "q", connection="redis://h")])
def test_a_decorator_over_no_function(decorator: Any, what: Any) -> None:
    """What has no name, or does not tell what it takes, is refused with a way out."""
    with pytest.raises(OptionError, match="call it in a function of your own"):
        decorator(ttl=5)(what)


def test_options_that_are_misspelt(app: Celery) -> None:
    """What was meant is proposed, be it an option of ours or one of Celery's; a base must be a class."""
    for wrong, meant in (("stale_tll", "stale_ttl"), ("autoretry_fro", "autoretry_for")):
        with pytest.raises(OptionError, match=f"unknown option '{wrong}' .did you mean '{meant}'"):
            memolocked_task(app=app, ttl=5, **{wrong: 5})
    for wrong in ("tll", "expire"):  # which may be why there is no ttl; the second is a method's name
        for others in ({}, {"ttl": 5}):
            with pytest.raises(OptionError, match=f"unknown option '{wrong}'"):
                memolocked_task(app=app, **others, **{wrong: 5})
    for wrong, meant in (("stale_tll", "stale_ttl"), ("result_tll", "result_ttl")):
        with pytest.raises(OptionError, match=f"unknown option '{wrong}' .did you mean '{meant}'"):
            memolocked_job(ttl=5, **{wrong: 5})
    with pytest.raises(OptionError, match="base='x' of @memolocked_task is no class"):
        memolocked_task(app=app, ttl=5, base="x")


@pytest.mark.parametrize(
    ("define", "names"),
    [
        (lambda **wrong: memolocked_task(ttl=5, **wrong), ["redis", "redis_url", "url", "connection"]),
        (lambda **wrong: memolocked_job(ttl=5, **wrong), ["redis_url", "url"]),
        (lambda **wrong: MemoLock(ttl=5, **wrong), ["redis_url", "url", "connection"]),
        (lambda **wrong: MemoLock(ttl=5).client("kind", **wrong), ["redis", "redis_url", "url", "connection"]),
    ],
    ids=["memolocked_task", "memolocked_job", "MemoLock", "client"],
)
def test_a_server_among_the_options(define: Any, names: list[str]) -> None:
    """Where none is named it is said where one is."""
    where = "a server is named by memolock_redis_url of a Celery app, or redis= of MemoLock and memolocked_job"
    for name in names:
        with pytest.raises(OptionError, match=rf"unknown .*option '{name}' \({where}\)[:;] ") as caught:
            define(**{name: "redis://:s3cret@h"})
        assert "s3cret" not in str(caught.value)


def test_a_serializer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cure is named: what brings it for memolock."""
    try:
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "msgpack", None)
            serialization.register_msgpack()
        with pytest.raises(OptionError, match=r"^memolock option serializer=.*msgpack.*: pip install ") as caught:
            memolocked_task(ttl=5, serializer="msgpack")(says)
    finally:
        serialization.register_msgpack()
    assert "pip install 'celery-memolock[msgpack]'" in str(caught.value)
    assert str(caught.value).count("install") == 1


@pytest.mark.parametrize("function", [silent, says_none])
def test_typed_without_a_type(app: Celery, function: Any) -> None:
    """`typed=True` needs a function that says what it returns, however the task is made."""
    text = "typed of task .* does not say what it returns"
    with pytest.raises(OptionError, match=text):
        memolocked_task(ttl=5, typed=True)(function)
    with pytest.raises(OptionError, match=text):
        app.task(base=MemoLockTask, shared=False, lazy=False, memolock={"ttl": 5, "typed": True})(function)
    with pytest.raises(OptionError, match=text):
        type("Task", (MemoLockTask,), {"memolock": {"ttl": 5, "typed": True}, "run": lambda self, key: key})
    with pytest.raises(OptionError, match=text):
        MemoLock(ttl=5).memoize(typed=True)(function)


def test_typed_with_a_type(app: Celery) -> None:
    """One that says so will do, also where a base class has the options and no function yet."""

    class Base(MemoLockTask[Any, Any]):
        abstract = True
        memolock = {"ttl": 5, "typed": True}  # noqa: RUF012

    made = app.task(base=Base, shared=False, lazy=False, name="says")(says)
    assert made.memo.codec.typed


def test_wrappers_of_the_run(app: Celery) -> None:
    """Celery's own wrappers, and what somebody wraps around one process's task, change no key; nor do our own."""

    def plain(key: str, count: int = 1) -> list[int]:
        return [len(key)]

    def bound(self: Any, key: str, count: int = 1) -> list[int]:
        return [len(key)]

    expected = memolocked_task(app=app, ttl=5, name="t")(plain).memo.call(("a", 1), {}).keys
    for number, options in enumerate(({"autoretry_for": (KeyError,)}, {"pydantic": True}, {})):
        for bind in (False, True):
            own = Celery("own", set_as_current=False, broker="memory://")
            task: Any = memolocked_task(app=own, ttl=5, name="t", bind=bind, **options)(bound if bind else plain)
            if not number:
                task.run = functools.wraps(task.run)(lambda *args, **kwargs: [1])
            for args, kwargs in ((("a",), {}), ((), {"key": "a"}), (("a",), {"count": 1})):
                assert task.memo.call(args, kwargs).keys == expected
    memoized = MemoLock(ttl=5).memoize(name="m")(plain)
    twice = MemoLock(ttl=5).memoize(name="t")(memoized)
    job = memolocked_job(ttl=5)(plain)
    assert twice.memo.call((), {"key": "a"}).keys == expected
    assert (
        memolocked_task(app=app, ttl=5, name="u")(job).memo.call((), {"key": "a"}).keys.tag.endswith(expected.tag[1:])
    )


def test_typed_below_a_decorator(app: Celery) -> None:
    """What a function says that it returns is its own word, through any decorator."""

    @functools.wraps(says)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return says(*args, **kwargs)

    assert memolocked_task(app=app, ttl=5, typed=True)(wrapper).memo.codec.typed
    decorated = MemoLock(ttl=5, eager=True).memoize(typed=True)(wrapper)
    assert decorated.memo.codec.typed


def test_refresh_calls_that_do_not_fit(app: Celery) -> None:
    """What beat could not call is no task."""
    for options in ({"refresh_every": 1}, {"refresh_every": 1, "refresh_calls": [("a", "b")]}):
        with pytest.raises(OptionError, match="refresh_calls of task"):
            memolocked_task(app=app, ttl=5, **options)(says)
    memolocked_task(app=app, ttl=5, refresh_every=1, refresh_calls=[("a",)], bind=True)(lambda self, key: key)


def test_refreshes_that_come_too_late(app: Celery) -> None:
    """They are refused at once, or, where a default of the app could do, when the task is bound to it."""
    with pytest.raises(OptionError, match=r"refresh_every=60\.0 comes too late for ttl=5\.0"):
        memolocked_task(app=app, ttl=5, refresh_every=60, refresh_calls=[("a",)], stale_ttl=30)(says)
    late = memolocked_task(app=app, ttl=5, refresh_every=60, refresh_calls=[("a",)], name="late")(says)
    with pytest.raises(OptionError, match=r"refresh_every=60\.0 comes too late for ttl=5\.0"):
        app.finalize()
    app.conf.memolock_stale_ttl = 60
    assert late.memo.options.refresh_every == 60


@pytest.mark.parametrize("name", ["refresh_every", "refresh_calls", "external", "tags", "cache_if"])
def test_no_default_of_an_app(app: Celery, name: str) -> None:
    """What makes no sense for all tasks of an app is refused in its configuration, not ignored."""
    made = memolocked_task(app=app, ttl=5)(says)
    app.conf[f"memolock_{name}"] = 5
    with pytest.raises(OptionError, match=f"memolock_{name} in the Celery configuration is no default"):
        _ = made.memo


def test_defaults_of_an_app(app: Celery) -> None:
    """A default that means nothing for one task is for the others; what a task itself says has to mean something."""
    app.conf.update(memolock_soft_timeout=1, memolock_external_timeout=9, memolock_compression="gzip")
    app.conf.update(memolock_on_redis_error="compute", memolock_compress_over=100)
    plain = memolocked_task(app=app, ttl=5, name="plain")(says)
    assert plain.memo.options.compress_over == 100
    assert plain.with_options(stale_ttl=60).memo.options.soft_timeout == 1
    external = memolocked_task(app=app, ttl=5, name="external", external=True)(says)
    assert external.memo.options.external_timeout == 9
    assert external.memo.options.compression is None
    memolocked_task(app=app, ttl=5, name="compressing", compress_over=5)(says).memo  # noqa: B018
    with pytest.raises(OptionError, match=r"external_timeout=5\.0 needs external"):
        memolocked_task(app=app, ttl=5, external_timeout=5)(says)


@pytest.mark.parametrize(
    ("given", "default"),
    [
        ({"compress_over": 5}, {"compression": "gzip"}),
        ({"soft_timeout": 1}, {"stale_ttl": 60}),
        ({"beta": 2}, {"early_refresh": "xfetch"}),
    ],
)
def test_what_needs_a_default(app: Celery, given: dict[str, Any], default: dict[str, Any]) -> None:
    """Whether it means anything is known once the app's configuration is."""
    made = memolocked_task(app=app, ttl=5, name="needs", **given)(says)
    with pytest.raises(OptionError, match=f"{next(iter(given))}=.* {next(iter(default))}"):
        _ = made.memo
    app.conf.update({f"memolock_{name}": value for name, value in default.items()})
    assert made.memo.options.ttl == 5


def test_defaults_of_a_memolock() -> None:
    """They are for all that is made with it, as far as they mean something there."""
    cache = MemoLock(ttl=5, compress_over=100, soft_timeout=1)
    assert cache.memoize(compression="zlib")(says).memo.options.compress_over == 100
    assert cache.memoize(stale_ttl=5)(says).memo.options.soft_timeout == 1
    assert cache.memoize()(says).with_options(stale_ttl=5).memo.options.soft_timeout == 1
    with pytest.raises(OptionError, match="compress_over=5 needs compression"):
        MemoLock(ttl=5).memoize(compress_over=5)(says)
    with pytest.raises(OptionError, match="compress_over=5 needs compression"):
        MemoLock(ttl=5).client("c", compress_over=5)


class Theirs(Request):  # type: ignore[misc]  # Celery's is untyped
    """What an application makes of a message."""


class Hooked(Task):  # without subscripts, which only newer Celerys have
    """A task class of an application's own."""

    abstract = True
    Request = Theirs
    queue_of_tenant = "t1"


class HookedFirst(Hooked, MemoLockTask[Any, Any]):
    """It stands before ours."""

    abstract = True


class HookedLast(MemoLockTask[Any, Any], Hooked):
    """It stands behind ours."""

    abstract = True


class OwnRequest(MemoLockTask[Any, Any]):
    """It names what it makes of a message."""

    abstract = True
    Request = f"{__name__}:Theirs"


@pytest.mark.parametrize(
    ("spelling", "base"),
    [
        *(("memolocked_task", base) for base in (None, MemoLockTask, Hooked, HookedFirst, HookedLast, OwnRequest)),
        *(("app.task", base) for base in (MemoLockTask, HookedFirst, HookedLast, OwnRequest)),
    ],
)
def test_classes_of_an_app(spelling: str, base: type[Any] | None) -> None:
    """A task derives from its app's own class, whatever base it names, and its messages are both classes' requests."""
    app = Celery("classes", set_as_current=False, broker="memory://", task_cls=Hooked)
    if spelling == "memolocked_task":
        made: Any = memolocked_task(app=app, ttl=5, name="made", **({"base": base} if base else {}))(says)
    else:
        made = app.task(base=base, shared=False, name="made", memolock={"ttl": 5})(says)
    assert isinstance(made, MemoLockTask)
    assert isinstance(made, app.Task)
    assert made.queue_of_tenant == "t1"
    assert issubclass(made.Request, FlightRequest)
    assert issubclass(made.Request, Theirs)


def test_class_given_to_an_app_later() -> None:
    """As Celery itself does, memolock takes the class that the app has when its tasks are bound."""
    app = Celery("later", set_as_current=False, broker="memory://")
    made: Any = memolocked_task(app=app, ttl=5, name="made")(says)
    app.Task = Hooked
    assert made.queue_of_tenant == "t1"


def test_classes_that_do_not_go_together() -> None:
    """They are refused where the task is defined."""
    app = Celery("apart", set_as_current=False, broker="memory://", task_cls=HookedFirst)
    with pytest.raises(OptionError, match="its base does not go with the task class of its app"):
        app.task(base=HookedLast, shared=False, lazy=False, name="made", memolock={"ttl": 5})(says)


def test_an_app_whose_tasks_are_all_memolocked() -> None:
    """The class that an app has for its tasks may be ours, or derive from it."""
    app = Celery("all", set_as_current=False, broker="memory://", task_cls=HookedLast)
    made: Any = memolocked_task(app=app, ttl=5, name="made")(says)
    assert made.queue_of_tenant == "t1"
    assert isinstance(made, app.Task)


@pytest.mark.parametrize("name", ["memo", "refresh", "get_cached", "memolock"])
@pytest.mark.parametrize("first", [True, False])
def test_names_that_a_class_shares_with_ours(app: Celery, name: str, first: bool) -> None:
    """One would hide the other, so the class is refused by its name."""
    theirs = type("Tenant", (Task,), {"abstract": True, name: "of the tenant's"})
    bases = (theirs, MemoLockTask) if first else (MemoLockTask, theirs)
    with pytest.raises(OptionError, match=f"its base Tenant has an attribute '{name}'"):
        type("Base", bases, {"abstract": True})
    mixin = type("Mixin", (), {"memolock": {"ttl": 5}, "peek": lambda self: "by the mixin"})  # which is no task
    assert type("Base", (mixin, MemoLockTask), {"abstract": True})().peek() == "by the mixin"


def test_nothing_of_celerys_is_changed() -> None:
    """A request that is Celery's own stays named by its path, as only workers import it."""
    app = Celery("plain", set_as_current=False, broker="memory://")
    made: Any = memolocked_task(app=app, ttl=5, name="made")(says)
    assert made.Request == MemoLockTask.Request == "celery_memolock.engines.celery_worker:FlightRequest"
