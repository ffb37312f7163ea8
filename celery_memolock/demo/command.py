"""``celery-memolock demo``."""

from __future__ import annotations

import json
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..errors import MemoLockError
from ..server import serve_or_use
from .database import Database
from .report import TITLES, page, picture, table
from .run import MODES, Outcome, run

__all__ = ["command"]


@click.command()
@click.option("--users", type=click.IntRange(1, 100_000), default=5500, show_default=True, help="Visitors who wait.")
@click.option("--seconds", type=click.FloatRange(3), default=20.0, show_default=True, help="Of load, for all modes.")
@click.option("--processes", type=click.IntRange(1, 64), default=3, show_default=True, help="Web processes.")
@click.option("--database", metavar="URL", help="sqlite:///PATH or postgresql://...; default: SQLite, removed after.")
@click.option("--redis-url", metavar="URL", help="Default: $MEMOLOCK_REDIS_URL, else a server of the demo's own.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    default=Path("demo-report"),
    show_default=True,
    help="Folder for the picture.",
)
def command(
    users: int,
    seconds: float,
    processes: int,
    database: str | None,
    redis_url: str | None,
    json_file: Path | None,
    report: Path,
) -> None:
    """Show a queue page under load: without a cache, with a plain one, and with memolock."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as for Ctrl-C
    console = Console()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="memolock-demo-"))
        try:
            table_of_users = Database(database or f"sqlite:///{folder}/demo.sqlite")
            url = stack.enter_context(serve_or_use(redis_url))
            console.print("[bold]The queue page[/bold]: how many wait before me? Counting them reads a whole table.")
            stack.callback(table_of_users.drop)
            rows = table_of_users.create(users, lambda line: console.print(f"  {line}"))
            outcomes = _watched(console, table_of_users, url, users, seconds, processes)
        except (MemoLockError, ValueError) as error:
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:
            console.print("stopped")
            raise SystemExit(130) from None
    console.print(table(outcomes))
    report.mkdir(parents=True, exist_ok=True)
    picture(outcomes, report / "queue-page.png")
    story = (
        f"{users:,} visitors wait for one page; each load of it counts them, which reads a table of {rows:,} rows. "
        f"The same visits in each mode, {seconds / len(MODES):.1f} s of them, to {processes} web processes. After a "
        f"third of the time 500 are let in; after two thirds a second heavy query keeps the database busy."
    )
    page(outcomes, story, report / "queue-page.png", report / "queue-page.html")
    console.print(f"Picture and page: {report / 'queue-page.png'}, {report / 'queue-page.html'}")
    if json_file:
        json_file.write_text(json.dumps({"modes": {each.mode: each.figures() for each in outcomes}}, indent=2) + "\n")


def _watched(
    console: Console, database: Database, url: str, users: int, seconds: float, processes: int
) -> list[Outcome]:
    """Run all modes under a progress display."""
    columns = (TextColumn("{task.description:>16}"), BarColumn(), TextColumn("{task.fields[told]}"))
    with Progress(*columns, console=console) as bars:
        bar: dict[str, Any] = {mode: bars.add_task(TITLES[mode], total=1.0, told="") for mode in MODES}

        def progress(mode: str, tally: dict[str, int], part: float) -> None:
            told = "{requests:,} answers, {under_way:,} waiting, {errors:,} errors, {let_in} let in".format(**tally)
            bars.update(bar[mode], completed=part, told=told)

        return list(run(database, url, users, seconds, processes, progress))
