"""The table of features: every test that it links to is there."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "features.md"
ROWS = [row for row in PAGE.read_text().splitlines() if row.startswith("|")][2:]


def test_the_tests_are_there() -> None:
    """Each cell of ours is links to tests, and no link rests on a test that was renamed or is gone."""
    assert len(ROWS) > 45
    for row in ROWS:
        cells = row.strip("|").split("|")
        assert len(cells) == 11, row
        for link in cells[1].strip().split("<br>"):
            found = re.fullmatch(r"\[`(test_\w+)`\]\((\.\./tests/\w+/test_\w+\.py)\)", link)
            assert found is not None, link
            assert f"\ndef {found[1]}(" in (PAGE.parent / found[2]).read_text(), link


def test_each_part_is_explained() -> None:
    """A peer with "part" in its column has a line below the table that says which."""
    head = next(line for line in PAGE.read_text().splitlines() if line.startswith("| | here |"))
    names = [name.strip().removesuffix(" `unique`") for name in head.strip("|").split("|")[2:]]
    columns = zip(*(row.strip("|").split("|")[2:] for row in ROWS), strict=True)
    for name, column in zip(names, columns, strict=True):
        cells = {cell.strip() for cell in column}
        assert cells <= {"yes", "yes, polling", "part", "\N{EN DASH}"}, (name, cells)
        assert ("part" in cells) == (f"\n- *{name}*: " in PAGE.read_text()), name
