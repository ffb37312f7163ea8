"""What is left of a run: a table for the terminal, a picture, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from string import Template

import matplotlib as mpl
from rich import box
from rich.table import Table

from .run import LET_IN, SLOWED, Outcome

__all__ = ["page", "picture", "table"]

TITLES = {"none": "no cache", "ttl": "plain TTL cache", "memolock": "memolock"}
COLUMNS = {
    "requests": "requests",
    "errors": "errors",
    "queries": "queries",
    "max_concurrent_queries": "at once",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "p99_ms": "p99 ms",
}
COLOURS = {"none": "#c0392b", "ttl": "#d68910", "memolock": "#1e8449"}


def table(outcomes: Sequence[Outcome]) -> Table:
    """Return the figures as a table for the terminal."""
    made = Table(title="The same visitors, the same database", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    made.add_column("mode", no_wrap=True)
    for title in COLUMNS.values():
        made.add_column(title, justify="right", no_wrap=True)
    for outcome in outcomes:
        made.add_row(TITLES[outcome.mode], *_cells(outcome))
    return made


def picture(outcomes: Sequence[Outcome], file: Path) -> None:
    """Draw queries in flight and latency over time, one column a mode, all on the same scales."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2,
        len(outcomes),
        figsize=(4.6 * len(outcomes), 6.4),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for (upper, lower), outcome in zip(axes.T, outcomes, strict=True):
        colour = COLOURS[outcome.mode]
        times, running = _in_flight(outcome)
        upper.fill_between(times, running, step="post", color=colour, alpha=0.85, linewidth=0)
        upper.set_title(TITLES[outcome.mode], fontweight="bold", pad=18)
        fine = [(at, took * 1e3) for at, took, ok in outcome.requests if ok]
        failed = [(at, took * 1e3) for at, took, ok in outcome.requests if not ok]
        lower.scatter(*zip(*fine, strict=True), s=4, color=colour, alpha=0.5, linewidths=0, label="answered")
        if failed:
            lower.scatter(*zip(*failed, strict=True), s=10, color="black", marker="x", linewidths=0.7, label="failed")
        for axis in (upper, lower):
            for at in (LET_IN, SLOWED):
                axis.axvline(at * outcome.seconds, color="#555555", linestyle="--", linewidth=0.9)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        lower.set_xlabel("seconds")
    upper, lower = axes[:, 0]
    upper.set_ylabel("count queries in flight")
    upper.set_ylim(bottom=0)
    lower.set_ylabel("time of a page, ms")
    lower.set_yscale("log")
    for axis, outcome in zip(axes[0], outcomes, strict=True):
        most = outcome.figures()["max_concurrent_queries"]
        across = {"transform": axis.get_xaxis_transform(), "va": "bottom", "fontsize": 8, "color": "#333333"}
        axis.text(LET_IN * outcome.seconds, 1.0, " 500 let in", **across)
        axis.text(SLOWED * outcome.seconds, 1.0, " second query", **across)
        axis.text(0.98, 0.94, f"most at once: {most:.0f}", transform=axis.transAxes, ha="right", va="top")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def page(outcomes: Sequence[Outcome], story: str, image: Path, file: Path) -> None:
    """Write the picture and the table as one HTML page."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in ("mode", *COLUMNS.values()))
    rows = "".join(
        f"<tr><th>{TITLES[outcome.mode]}</th>" + "".join(f"<td>{cell}</td>" for cell in _cells(outcome)) + "</tr>"
        for outcome in outcomes
    )
    data = base64.b64encode(image.read_bytes()).decode()
    template = Template((Path(__file__).parent / "report.html").read_text("utf-8"))
    file.write_text(template.substitute(story=html.escape(story), head=head, rows=rows, image=data), "utf-8")


def _cells(outcome: Outcome) -> list[str]:
    figures = outcome.figures()
    return [f"{figures[name]:,.0f}" for name in COLUMNS]


def _in_flight(outcome: Outcome) -> tuple[list[float], list[int]]:
    changes = sorted([(query.began, 1) for query in outcome.queries] + [(query.ended, -1) for query in outcome.queries])
    times, running = [0.0], [0]
    for at, change in changes:
        times.append(at)
        running.append(running[-1] + change)
    return times, running
