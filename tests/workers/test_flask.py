"""Flask's application factories, with real workers: `current_app` is there wherever a plain task has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import redis

from celery_memolock.server import Server
from tests.workers.conftest import ROOT, Worker, until

#: Asks each app through its views, from eight threads at once, and prints what it was told.
WEB = """
import json
from concurrent.futures import ThreadPoolExecutor
from tests.workers import flask_site as site

told = {}
with ThreadPoolExecutor(8) as pool:
    for app, *names in (
        (site.documented, "shared", "hooked", "retried"),
        (site.former, "former", "after"),
        (site.dotted, "on_base", "by_option"),
    ):
        for name in names:
            asked = pool.map(lambda _: app.test_client().get(f"/site.{name}/{name}").get_json(), range(8))
            told[name] = list(asked)
    # A shared task is each app's; this is not the default one.
    told["of another app"] = site.former_celery.tasks["site.shared"].get_cached("another")
    told["plain of another app"] = site.former_celery.tasks["site.bare"].delay("plain").get(timeout=20)
told["plain"] = site.plain.delay("plain").get(timeout=20)
told["delayed"] = site.hooked.delay("delayed").get(timeout=20)
print(json.dumps(told))
"""


class Seen(NamedTuple):
    """What the web process was told, and what runs and hooks noted."""

    told: dict[str, Any]
    prefix: str
    records: redis.Redis

    def noted(self, *key: str) -> list[str]:
        found: Any = self.records.lrange(":".join((self.prefix, *key)), 0, -1)
        return [each.decode() for each in found]


@pytest.fixture(scope="module")
def seen(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    prefix, folder = f"flask-{uuid.uuid4().hex[:8]}", tmp_path_factory.mktemp("flask")
    environment = {"SITE_URL": server.url, "SITE_PREFIX": prefix}
    pools = {"documented": "-P prefork -c 2", "former": "-P threads -c 2", "dotted": "-P solo"}
    command = f"-m celery -A tests.workers.flask_site:%s_celery worker -n %s@{prefix} -l INFO --without-mingle %s"
    workers = [Worker((command % (app, app, flags)).split(), environment, folder / app) for app, flags in pools.items()]
    try:
        for worker in workers:
            worker.await_ready()
        done = subprocess.run(
            [sys.executable, "-c", WEB],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stderr
        yield Seen(json.loads(done.stdout), prefix, redis.Redis.from_url(server.url))
    finally:
        for worker in workers:
            worker.process.terminate()  # all at once; each takes seconds
        for worker in workers:
            worker.stop()


@pytest.mark.parametrize(
    ("app", "name"),
    [
        ("documented", "shared"),
        ("documented", "hooked"),
        ("documented", "retried"),
        ("former", "former"),
        ("former", "after"),
        ("dotted", "on_base"),
        ("dotted", "by_option"),
    ],
)
def test_current_app(seen: Seen, app: str, name: str) -> None:
    """Eight web requests share one run, which sees its own Flask app, however the Celery app was given that."""
    assert seen.told[name] == [[app, name]] * 8
    assert len(seen.noted("ran", name)) == 1


def test_another_app(seen: Seen) -> None:
    """A shared task asked through another app runs there, as a plain one does."""
    assert seen.told["of another app"] == ["former", "another"]
    assert seen.told["plain of another app"] == ["former", "plain"]


def test_hooks(seen: Seen) -> None:
    """A base's hooks run around a flight as around a plain task: the same ones, with as much of Flask."""
    assert seen.told["plain"] == "plain"
    assert seen.told["delayed"] == ["documented", "delayed"]
    plain = until(lambda: len(found := seen.noted("hooks", "site.plain")) == 3 and found)
    assert [each.split()[0] for each in plain] == ["before_start", "on_success", "after_return"]
    assert until(lambda: len(found := seen.noted("hooks", "site.hooked")) == 6 and found) == plain * 2
    assert seen.noted("hooks", "site.on_base") == plain
