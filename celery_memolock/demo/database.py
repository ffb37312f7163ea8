"""The table behind the queue page, in SQLite or PostgreSQL, and its two heavy queries."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

__all__ = ["PAGE", "Database"]

PAGE: Final = "sale"
ADMITTED: Final = 500
BUSY_MS: Final = 30.0  # a count has to take at least this long
STEP: Final = 200_000
MOST_ROWS: Final = 2_000_000
PARTS: Final = 10  # of one count, to say in between how far it is


class Database:
    """A table of visitors of many pages, of whom some wait for ours.

    Args:
        url: ``sqlite:///path`` or ``postgresql://...``.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._postgres = url.startswith(("postgres://", "postgresql://"))
        if not self._postgres and not url.startswith("sqlite:///"):
            raise ValueError(f"--database {urlsplit(url).scheme or url!r}: must be sqlite:///PATH or postgresql://...")
        self._mark = "%s" if self._postgres else "?"
        self._local = threading.local()

    def create(self, users: int, told: Callable[[str], None]) -> int:
        """Make and fill the table until one count takes tens of milliseconds; return the number of rows."""
        self._run("DROP TABLE IF EXISTS memolock_demo_visitor")
        self._run(
            "CREATE TABLE memolock_demo_visitor (id INTEGER PRIMARY KEY, page TEXT, state TEXT, came DOUBLE PRECISION, "
            "ticket TEXT)"
        )
        rows = 0
        while True:
            self._run(self._filling(), rows + 1, rows + STEP)
            if not rows:
                self._run(f"UPDATE memolock_demo_visitor SET page = {self._mark} WHERE id <= {users}", PAGE)
            rows += STEP
            took = min(self._timed() for _ in range(3)) * 1e3
            told(f"{rows:,} visitors, one count takes {took:.0f} ms")
            if took >= BUSY_MS or rows >= MOST_ROWS:
                return rows

    def count_waiting(self, page: str, told: Callable[[float], object] = lambda _: None) -> int:
        """Count who waits for a page. There is no index for it: the whole table is read.

        Args:
            page: which.
            told: called after each tenth of the table with the fraction that is done.
        """
        mark = self._mark
        query = (
            "SELECT count(*) FROM memolock_demo_visitor "
            f"WHERE page = {mark} AND state = 'waiting' AND id > {mark} AND id <= {mark}"
        )
        waiting = 0
        with self._snapshot():
            rows = int(self._fetch("SELECT coalesce(max(id), 0) FROM memolock_demo_visitor")[0])
            for part in range(PARTS):
                waiting += self._fetch(query, page, part * rows // PARTS, (part + 1) * rows // PARTS)[0]
                told((part + 1) / PARTS)
        return waiting

    def is_in(self, user: int) -> bool:
        """Tell whether a visitor has been let in; reads one row by its primary key."""
        found = self._fetch(f"SELECT state FROM memolock_demo_visitor WHERE id = {self._mark}", user)
        return bool(found and found[0] == "in")

    def admit(self) -> None:
        """Let the next 500 in."""
        self._run(
            "UPDATE memolock_demo_visitor SET state = 'in' WHERE id IN (SELECT id FROM memolock_demo_visitor "
            f"WHERE page = {self._mark} AND state = 'waiting' ORDER BY came LIMIT {ADMITTED})",
            PAGE,
        )

    def reset(self) -> None:
        """Have everybody wait again."""
        self._run("UPDATE memolock_demo_visitor SET state = 'waiting' WHERE state = 'in'")

    def report(self) -> None:
        """Run the second heavy query: a report over the whole table that sorts it by text."""
        self._fetch(
            "SELECT page, count(DISTINCT substr(ticket, 1, 4)), max(came) FROM memolock_demo_visitor GROUP BY page "
            "ORDER BY 2 DESC"
        )

    def drop(self) -> None:
        """Remove the table, and close this thread's connection."""
        self._run("DROP TABLE IF EXISTS memolock_demo_visitor")
        self._local.connection.close()
        del self._local.connection

    def _filling(self) -> str:
        if self._postgres:
            numbers = "SELECT n FROM generate_series(%s::int, %s::int) AS made(n)"
            ticket = "md5(n::text)"
        else:
            numbers = (
                "WITH RECURSIVE made(n) AS (SELECT ? UNION ALL SELECT n + 1 FROM made WHERE n < ?) SELECT n FROM made"
            )
            ticket = "printf('%08x-%08x', (n * 2654435761) % 4294967296, n)"
        return (
            "INSERT INTO memolock_demo_visitor (id, page, state, came, ticket) "
            f"SELECT n, 'page' || (n - n / 40 * 40), 'waiting', n * 0.01, {ticket} FROM ({numbers}) AS numbers"
        )

    def _timed(self) -> float:
        began = time.perf_counter()
        self.count_waiting(PAGE)
        return time.perf_counter() - began

    def _connection(self) -> Any:
        # One for each thread: both drivers let the interpreter go on while a query runs.
        if not hasattr(self._local, "connection"):
            if self._postgres:
                try:
                    import psycopg
                except ImportError:
                    cure = "pip install 'celery-memolock[postgres]'"
                    raise ValueError(f"a PostgreSQL database needs psycopg: {cure}") from None
                self._local.connection = psycopg.connect(self.url, autocommit=True)
            else:
                connection = sqlite3.connect(self.url.removeprefix("sqlite:///"), isolation_level=None, timeout=30)
                connection.execute("PRAGMA journal_mode = WAL")
                self._local.connection = connection
        return self._local.connection

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Let all that is read in the block be of one moment, whoever is let in meanwhile."""
        self._run("BEGIN ISOLATION LEVEL REPEATABLE READ" if self._postgres else "BEGIN")
        try:
            yield
        finally:
            self._run("ROLLBACK")  # nothing was written

    @contextmanager
    def _cursor(self) -> Any:
        cursor = self._connection().cursor()
        try:
            yield cursor
        finally:
            cursor.close()

    def _run(self, statement: str, *values: object) -> None:
        with self._cursor() as cursor:
            cursor.execute(statement, values)

    def _fetch(self, query: str, *values: object) -> Any:
        with self._cursor() as cursor:
            cursor.execute(query, values)
            return cursor.fetchone()
