"""The page of benchmarks shows the figures that are in benchmarks/results, and a plot for each."""

from __future__ import annotations

import re

from benchmarks.report import PAGE, with_tables


def test_tables_are_the_results() -> None:
    """`python -m benchmarks.report` would change nothing."""
    page = PAGE.read_text()
    assert with_tables(page) == page


def test_plots_are_there() -> None:
    """Each plot that the page shows is in its folder, and no other."""
    shown = set(re.findall(r"!\[\]\(plots/([a-z-]+\.svg)\)", PAGE.read_text()))
    assert shown == {path.name for path in (PAGE.parent / "plots").glob("*")}
    assert len(shown) >= 8
