"""A Django project as `startproject` makes it, with Celery as documented: a view asks, a worker answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from celery_memolock.server import Server
from tests.workers.conftest import Worker

SETTINGS = """
INSTALLED_APPS, MIDDLEWARE = ["shop"], []
ALLOWED_HOSTS = ["testserver"]
CELERY_BROKER_URL = CELERY_RESULT_BACKEND = {url!r}
CELERY_TASK_DEFAULT_QUEUE = CELERY_MEMOLOCK_PREFIX = {prefix!r}
CELERY_MEMOLOCK_WAIT_TIMEOUT = 20
"""

FILES = {
    "proj/celery.py": """
import os
from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proj.settings")
app = Celery("proj")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
""",
    "proj/__init__.py": """
from .celery import app as celery_app

__all__ = ("celery_app",)
""",
    "proj/urls.py": """
from functools import partial

from django.db import transaction
from django.db.models import F
from django.http import JsonResponse
from django.urls import path
from shop.models import Item
from shop.tasks import stock


def show(request, name):
    return JsonResponse(stock.get_cached(name))


def sell(request, name):
    with transaction.atomic():
        Item.objects.filter(name=name).update(pieces=F("pieces") - 1)
        stock.delay_on_commit(name)
        transaction.on_commit(partial(stock.invalidate, name))
        if request.GET:
            transaction.set_rollback(True)
    return show(request, name)


urlpatterns = [path("show/<name>", show), path("sell/<name>", sell)]
""",
    "shop/__init__.py": "",
    "shop/models.py": """
from django.db import models


class Item(models.Model):
    name = models.CharField(max_length=20)
    pieces = models.IntegerField()
    runs = models.IntegerField(default=0)
""",
    "shop/tasks.py": """
from celery_memolock import memolocked_task
from django.db.models import F

from .models import Item


@memolocked_task(ttl=60)
def stock(name):
    Item.objects.filter(name=name).update(runs=F("runs") + 1)
    return Item.objects.values("name", "pieces", "runs").get(name=name)
""",
}

#: Asks the views in turn, the first time from eight threads at once, and prints what it was told.
WEB = """
import json
from concurrent.futures import ThreadPoolExecutor

import django

django.setup()
from django.core.management import call_command
from django.test import Client
from shop.models import Item
from shop.tasks import stock

call_command("migrate", run_syncdb=True, verbosity=0)
Item.objects.create(name="nut", pieces=3)


def ask(path):
    answer = Client(raise_request_exception=True).get(path)
    assert answer.status_code == 200, answer.content
    return answer.json()


with ThreadPoolExecutor(8) as pool:
    told = {"herd": list(pool.map(ask, ["/show/nut"] * 8))}
told["rolled back"] = ask("/sell/nut?fail")
told["sold"] = ask("/sell/nut")
told["task"] = [stock.name, stock.app.main, stock.memo.options.wait_timeout]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("django")
    subprocess.run([sys.executable, "-m", "django", "startproject", "proj", str(folder)], check=True, timeout=60)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with (folder / "proj/settings.py").open("a") as settings:
        settings.write(SETTINGS.format(url=server.url, prefix=folder.name))
    environment = {"DJANGO_SETTINGS_MODULE": "proj.settings"}
    command = ["-m", "celery", "-A", "proj", "worker", "-l", "INFO", "-c", "1", "--without-mingle"]
    worker = Worker(command, environment, folder / "log", folder=folder)
    try:
        worker.await_ready()
        done = subprocess.run(
            [sys.executable, "-c", WEB],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stderr + worker.log.read_text()
        yield json.loads(done.stdout)
    finally:
        worker.stop()


def test_views(told: dict[str, Any]) -> None:
    """Eight requests share one run in a worker that knows the project by its name alone."""
    assert told["herd"] == [{"name": "nut", "pieces": 3, "runs": 1}] * 8


def test_transactions(told: dict[str, Any]) -> None:
    """What is to be done on commit, as by `delay_on_commit`, is done then, and never after a rollback."""
    assert told["rolled back"] == {"name": "nut", "pieces": 3, "runs": 1}
    assert told["sold"] == {"name": "nut", "pieces": 2, "runs": 3}  # by delay_on_commit, and by the miss


def test_settings(told: dict[str, Any]) -> None:
    """The task is the project's app's, and its options are from Django's settings."""
    assert told["task"] == ["shop.tasks.stock", "proj", 20.0]
