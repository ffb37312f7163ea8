"""Three Flask apps in one process, each with its Celery app, made in the ways that Flask's documentation has had.

The shared tasks come first, as in a module that is imported before any app is made.
"""

from __future__ import annotations

import os
from typing import Any, Generic, TypeVar

import flask
import redis
from celery import Celery, Task, shared_task
from flask import Flask, current_app, has_app_context

from celery_memolock import MemoLockTask, memolocked_task

T = TypeVar("T")
URL, PREFIX = os.environ["SITE_URL"], os.environ["SITE_PREFIX"]
records = redis.Redis.from_url(URL)


def where(name: str) -> list[str]:
    """What a run sees of Flask."""
    records.rpush(f"{PREFIX}:ran:{name}", os.getpid())
    return [current_app.config["GREETING"], name]


class Hooked(Task):
    """Has hooks of its own, which note in what they are called."""

    abstract = True

    def note(self, hook: str) -> None:
        records.rpush(f"{PREFIX}:hooks:{self.name}", f"{hook} {has_app_context()}")

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        self.note("before_start")

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self.note("on_success")

    def after_return(self, *_: Any) -> None:
        self.note("after_return")


@shared_task(name="site.plain", base=Hooked)
def plain(name: str) -> str:
    return name  # to a task with a base Celery gives no class of the app's, and so nothing of Flask


@shared_task(name="site.bare")
def bare(name: str) -> list[str]:
    return where(name)


@memolocked_task(name="site.shared", ttl=60, wait_timeout=20)
def shared(name: str) -> list[str]:
    return where(name)


@memolocked_task(name="site.hooked", ttl=60, wait_timeout=20, base=Hooked)
def hooked(name: str) -> list[str]:
    return where(name)


@memolocked_task(name="site.retried", ttl=60, wait_timeout=20, bind=True, default_retry_delay=0)
def retried(self: Any, name: str) -> list[str]:
    if not self.request.retries:
        raise self.retry(exc=ValueError(current_app.config["GREETING"]))
    return where(name)


# ---- documented today ------------------------------------------------------------------------------------------


def celery_init_app(app: Flask) -> Celery:
    """As Flask's documentation has it."""

    class FlaskTask(Task):
        def __call__(self, *args: Any, **kwargs: Any) -> object:
            with app.app_context():
                return self.run(*args, **kwargs)

    celery_app = Celery(app.name, task_cls=FlaskTask)
    celery_app.config_from_object(app.config["CELERY"])
    celery_app.set_default()
    app.extensions["celery"] = celery_app
    return celery_app


def create_app(name: str) -> Flask:
    """An application factory."""
    app = Flask(name)
    app.config.from_mapping(GREETING=name, CELERY=conf(name))
    return app


def conf(name: str) -> dict[str, Any]:
    """Celery's settings for the app of a name."""
    return {
        "broker_url": URL,
        "result_backend": URL,
        "task_default_queue": f"{PREFIX}.{name}",
        "memolock_prefix": f"{PREFIX}.{name}",
    }


def view(task: Any) -> Any:
    """A view that waits for a task."""
    return lambda name: flask.jsonify(task.get_cached(name))


documented = create_app("documented")
documented_celery = celery_init_app(documented)
for each in (shared, hooked, retried):
    documented.add_url_rule(f"/{each.name}/<name>", each.name, view(each))


# ---- documented formerly, and still in many a project ------------------------------------------------------------

former = create_app("former")
former_celery = Celery("former", set_as_current=False)
former_celery.config_from_object(conf("former"))


@former_celery.task(name="site.former", base=MemoLockTask, memolock={"ttl": 60, "wait_timeout": 20}, shared=False)
def before(name: str) -> list[str]:
    return where(name)


class ContextTask(former_celery.Task):  # type: ignore[name-defined,misc]
    """As Flask's documentation had it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with former.app_context():
            return self.run(*args, **kwargs)


former_celery.Task = ContextTask


@memolocked_task(app=former_celery, name="site.after", ttl=60, wait_timeout=20)
def after(name: str) -> list[str]:
    return where(name)


for each in (before, after):
    former.add_url_rule(f"/{each.name}/<name>", each.name, view(each))


# ---- a task class by its name ------------------------------------------------------------------------------------


class Named(Task):
    """Calls the next class in line, and not `run`."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with dotted.app_context():
            return super().__call__(*args, **kwargs)


class Typed(Generic[T]):
    """A base that is no task."""


class PlainBase(Hooked, Typed[str]):
    """A base that knows nothing of memolock."""

    abstract = True


dotted = create_app("dotted")
dotted_celery = Celery("dotted", task_cls=f"{__name__}:Named", set_as_current=False)
dotted_celery.config_from_object(conf("dotted"))


@memolocked_task(app=dotted_celery, name="site.on_base", ttl=60, wait_timeout=20, base=PlainBase)
def on_base(name: str) -> list[str]:
    return where(name)


@dotted_celery.task(name="site.by_option", base=MemoLockTask, memolock={"ttl": 60, "wait_timeout": 20}, shared=False)
def by_option(name: str) -> list[str]:
    return where(name)


for each in (on_base, by_option):
    dotted.add_url_rule(f"/{each.name}/<name>", each.name, view(each))
