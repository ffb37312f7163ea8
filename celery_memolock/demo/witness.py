"""Who ran which query, and when: written down by every process where it happens, and read at the end."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

__all__ = ["Query", "most_at_once", "read", "witnessed"]

_lock = threading.Lock()


class Query(NamedTuple):
    """One run of a query; times are of time.monotonic, which is one clock for all processes of a machine."""

    key: str
    began: float
    ended: float


@contextmanager
def witnessed(folder: Path, key: str) -> Iterator[None]:
    """Write down that a query for a key runs now, in a file of this process."""
    began = time.monotonic()
    try:
        yield
    finally:
        line = f"{key} {began!r} {time.monotonic()!r}\n"
        with _lock, (folder / f"{os.getpid()}.queries").open("a") as file:
            file.write(line)


def read(folder: Path) -> list[Query]:
    """Read what all processes wrote."""
    found = []
    for file in folder.glob("*.queries"):
        for line in file.read_text().splitlines():
            key, began, ended = line.split()
            found.append(Query(key, float(began), float(ended)))
    return sorted(found, key=lambda query: query.began)


def most_at_once(queries: list[Query]) -> int:
    """Return how many queries of one key ran at once, at the most."""
    by_key: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for query in queries:
        by_key[query.key] += [(query.began, 1), (query.ended, -1)]
    most = 0
    for changes in by_key.values():
        running = 0
        for _, change in sorted(changes):
            running += change
            most = max(most, running)
    return most
