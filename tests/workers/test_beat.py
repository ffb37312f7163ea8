"""What Celery beat sends for `refresh_every`, whatever its schedule is made of, and what a worker makes of it."""

from __future__ import annotations

import json
import re
import sqlite3
import uuid
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from celery_memolock import MISS
from celery_memolock.server import Server
from tests.workers.beat_site import make
from tests.workers.conftest import Worker, until

Row = dict[str, Any]


class Site:
    """One app over a server: what it sends, and how it is run.

    Args:
        url: of the server.
        folder: for its files.
    """

    def __init__(self, server: Server, folder: Path) -> None:
        self.url, self.name, self.folder = server.url, f"site{uuid.uuid4().hex[:8]}", folder
        self.redis = redis.Redis.from_url(server.url)

    @contextmanager
    def running(self, command: str, ready: str, tasks: dict[str, Any], **settings: str) -> Iterator[Worker]:
        """Run a command of Celery's until the with block ends; it begins when the command has logged `ready`."""
        environment = {"SITE_URL": self.url, "SITE_NAME": self.name, "SITE_TASKS": json.dumps(tasks)}
        environment |= {f"SITE_{name.upper()}": value for name, value in settings.items()}
        arguments = ["-m", "celery", "-A", "tests.workers.beat_site:app", *command.split(), "--loglevel", "INFO"]
        if "beat" in command or "-B" in command:
            arguments += ["--schedule", str(self.folder / "schedule")]
        worker = Worker(arguments, environment, self.folder / f"{uuid.uuid4().hex[:8]}.log", ready)
        try:
            worker.await_ready()
            yield worker
        finally:
            worker.stop()

    def sent(self) -> list[str]:
        """Return which entries of ours have messages in the queue, and the first arguments of others."""
        found: list[Any] = self.redis.lrange(self.name, 0, -1)  # type: ignore[assignment]
        messages = [json.loads(message) for message in found]
        marks = [(each["headers"]["memolock"].get("beat"), b64decode(each["body"])) for each in messages]
        return [name or json.loads(body)[0][0] for name, body in marks]


@pytest.fixture
def site(server: Server, tmp_path: Path) -> Iterator[Site]:
    """An app with a queue of its own."""
    made = Site(server, tmp_path)
    with made.redis:
        yield made


WORKER = "worker -P solo --without-mingle --without-gossip"
WARM = {"site.warm": {"refresh_every": 0.2, "refresh_calls": [["a"]]}, "site.plain": {}}


@pytest.mark.parametrize(
    ("command", "late"), [("beat", "below the tasks"), (f"{WORKER} -B", "when all is imported")], ids=["beat", "-B"]
)
def test_a_late_schedule(site: Site, command: str, late: str) -> None:
    """Whenever and wherever `beat_schedule` is set, both it and the refreshes are sent."""
    with site.running(command, "beat: Starting...", WARM, late=late) as running:
        if command == "beat":
            until(lambda: {"memolock site.warm('a',)", "own"} <= set(site.sent()))
        else:
            until(lambda: running.log.read_text().count("memolock refresh of key site.warm:") > 1)
            until(lambda: "memolock refresh of key site.plain:" in running.log.read_text())
        assert ("memolock puts back" in running.log.read_text()) == (late == "when all is imported")


# ---- django-celery-beat ----------------------------------------------------------------------------------------

EDIT = """
UPDATE {t} SET enabled = 0 WHERE name = 'memolock site.warm(''kept'',)';
CREATE TEMP TABLE copy AS SELECT * FROM {t} WHERE name = 'memolock site.warm(''gone'',)';
UPDATE copy SET id = 101, name = 'by hand';
INSERT INTO {t} SELECT * FROM copy;
UPDATE copy SET id = 102, name = 'own', headers = '{{"memolock": {{"refresh": true}}}}', args = '["own"]';
INSERT INTO {t} SELECT * FROM copy;
UPDATE copy SET id = 103, name = 'other', enabled = 0,
    headers = '{{"memolock": {{"refresh": true, "beat": "other", "app": "another"}}}}';
INSERT INTO {t} SELECT * FROM copy;
UPDATE copy SET id = 104, name = 'broken', enabled = 0, headers = '"memolock"';
INSERT INTO {t} SELECT * FROM copy;
""".format(t="django_celery_beat_periodictask")


def _rows(database: Path) -> dict[str, tuple[bool, int, str]]:
    with sqlite3.connect(database) as connection:
        found = connection.execute(
            "SELECT name, enabled, every, period FROM django_celery_beat_periodictask AS task"
            " JOIN django_celery_beat_intervalschedule AS interval ON task.interval_id = interval.id"
        ).fetchall()
    connection.close()
    return {name: (bool(enabled), every, period) for name, enabled, every, period in found}


def test_rows(site: Site, tmp_path: Path) -> None:
    """The rows follow the code, but for what an operator disabled; those that are not ours stay as they are."""
    database = tmp_path / "schedule.sqlite"
    beat = "beat --scheduler django_celery_beat.schedulers:DatabaseScheduler"
    long = "x" * 300
    tasks: dict[str, Any] = {"site.warm": {"refresh_every": 2, "refresh_calls": [["gone"], ["kept"]]}, "site.plain": {}}
    tasks["site.often"] = {"refresh_every": 0.5, "refresh_calls": [["often"]]}
    tasks["site.dropped"] = {"refresh_every": 30, "refresh_calls": [[long]]}
    with site.running(beat, "beat: Starting...", tasks, database=str(database)):
        until(lambda: "memolock site.often('often',)" in site.sent())
    before = _rows(database)
    assert before.pop("memolock site.warm('gone',)") == (True, 2, "seconds")
    assert before.pop("memolock site.warm('kept',)") == (True, 2, "seconds")
    assert before.pop("memolock site.often('often',)") == (True, 500_000, "microseconds")
    [(name, values)] = before.items()
    assert name.startswith("memolock site.dropped('xxx")
    assert (len(name), values) == (200, (True, 30, "seconds"))
    connection = sqlite3.connect(database)
    connection.executescript(EDIT)
    connection.close()

    tasks["site.warm"] = {"refresh_every": 1, "refresh_calls": [["kept"], ["new"]]}
    tasks["site.dropped"] = {}
    site.redis.delete(site.name)
    with site.running(beat, "beat: Starting...", tasks, database=str(database)) as running:
        until(lambda: {"memolock site.warm('new',)", "memolock site.warm('gone',)", "own"} <= set(site.sent()))
        assert running.log.read_text().count("from beat's schedule: no task asks for it any more") == 2
        assert "Sending due task memolock site.warm('gone',)" not in running.log.read_text()
    assert _rows(database) == {
        "memolock site.warm('kept',)": (False, 1, "seconds"),
        "memolock site.warm('new',)": (True, 1, "seconds"),
        "memolock site.often('often',)": (True, 500_000, "microseconds"),
        **dict.fromkeys(("by hand", "own"), (True, 2, "seconds")),
        **dict.fromkeys(("other", "broken"), (False, 2, "seconds")),
    }


# ---- the worker ------------------------------------------------------------------------------------------------


def test_the_worker_says_what_a_refresh_did(site: Site) -> None:
    """Each refresh message logs one line; what beat sends for a task that does not ask for it is dropped."""
    tasks: dict[str, Any] = {"site.warm": {"refresh_every": 30, "refresh_calls": [["a"]]}, "site.plain": {}}
    made, nobodys = make(site.url, site.name, tasks), make(site.url, site.name, tasks, queue=f"{site.name}:nobody")
    warm, plain = made.tasks["site.warm"], made.tasks["site.plain"]
    scheduler = make(site.url, site.name, {})  # one that knows no task, and checks no arguments

    def send(task: str, *args: str, **mark: str) -> None:
        header = {"refresh": True, **mark}
        scheduler.send_task(task, args, headers={"memolock": header}, ignore_result=True)

    assert nobodys.tasks["site.plain"].refresh("under way")
    send("site.warm", "b", beat="memolock site.warm('b',)", app=site.name)
    send("site.plain", "c", beat="memolock site.plain('c',)", app=site.name)
    send("site.warm", "what an operator", "made of it", beat="memolock site.warm('a',)", app=site.name)
    for key in ("under way", "failing"):
        plain.refresher(key).delay()
    send("site.plain", "too", "many")
    plain.refresher("own").delay()
    with site.running(WORKER, " ready.", tasks) as worker:
        until(lambda: plain.peek("own") == "own" and worker.log.read_text().count("the task ran for") == 2)
        told = re.findall(r"(INFO|WARNING)/\w+\] (?:\S+: )?(memolock .*)", worker.log.read_text())
    keys = {key: plain.memo.call((key,), {}).keys.tag for key in ("under way", "failing", "own")}
    keys["a"] = warm.memo.call(("a",), {}).keys.tag
    drops = "memolock drops a refresh that beat sent as"
    assert [(level, re.sub(r"\d+\.\d\d s", "0.00 s", line)) for level, line in told] == [
        ("WARNING", f"{drops} \"memolock site.warm('b',)\": task site.warm asks for no such"),
        ("WARNING", f"{drops} \"memolock site.plain('c',)\": task site.plain asks for no such"),
        ("INFO", f"memolock refresh of key {keys['a']}: the task ran for 0.00 s"),
        ("INFO", f"memolock refresh of key {keys['under way']}: joined a flight that was under way"),
        ("WARNING", f"memolock refresh of key {keys['failing']}: failed after 0.00 s: Sold: failing"),
        (
            "WARNING",
            "memolock refresh of task site.plain: failed: TypeError: compute() takes 1 positional argument but 2 were"
            " given",
        ),
        ("INFO", f"memolock refresh of key {keys['own']}: the task ran for 0.00 s"),
    ]
    assert warm.peek("b") is MISS
