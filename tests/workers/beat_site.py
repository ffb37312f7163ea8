"""An app for Celery beat, made from the environment: its tasks, where its schedule is kept, and what is set late.

SITE_TASKS has the options of its tasks, SITE_DATABASE a file for django-celery-beat, SITE_LATE where `beat_schedule` is
set.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from celery import Celery

from celery_memolock import memolocked_task


class Sold(Exception):
    """An exception of the application's own."""


#: A schedule of the user's own, with a refresh that he has sent himself.
OWN = {
    "mine": {
        "task": "site.plain",
        "schedule": 0.3,
        "args": ("own",),
        "options": {"headers": {"memolock": {"refresh": True}}},
    }
}


def make(url: str, name: str, tasks: dict[str, Any], queue: str | None = None) -> Celery:
    """Make the app; its name is its prefix, and its queue's unless it has another."""
    made = Celery(name, broker=url, set_as_current=False)
    made.conf.update(task_default_queue=queue or name, memolock_redis_url=url, memolock_prefix=name)
    for each, options in tasks.items():

        @memolocked_task(app=made, name=each, ttl=60, **options)
        def compute(key: str) -> str:
            if key.startswith("failing"):
                raise Sold(key)
            return key

    return made


def _with_django(database: str) -> None:
    import django
    from django.conf import settings
    from django.core.management import call_command

    settings.configure(
        INSTALLED_APPS=["django_celery_beat"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": database}},
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        MIGRATION_MODULES={"django_celery_beat": None},  # the tables as they are in the end, all at once
    )
    django.setup()
    if "beat" in sys.argv:
        call_command("migrate", run_syncdb=True, verbosity=0)


if "SITE_NAME" in os.environ:
    if "SITE_DATABASE" in os.environ:
        _with_django(os.environ["SITE_DATABASE"])
    app = make(os.environ["SITE_URL"], os.environ["SITE_NAME"], json.loads(os.environ["SITE_TASKS"]))
    match os.environ.get("SITE_LATE"):
        case "below the tasks":
            app.finalize()
            app.conf.beat_schedule = OWN
        case "when all is imported":

            @app.on_after_finalize.connect
            def set_late(sender: Celery, **_: Any) -> None:
                """Set the schedule when all tasks are bound."""
                sender.conf.update(beat_schedule=OWN)
