"""The visitors: each loads the page, looks at how many wait, and reloads until let in. Run as a process of its own.

On standard output, one JSON line every quarter of a second; at the end all requests go to a file.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from .database import PAGE

__all__ = ["THINK", "main"]

THINK = 30.0  # seconds between two loads of one visitor, on average
PATIENCE = 5.0  # seconds after which a visitor gives up on a page


@dataclass
class Tally:
    """What happened so far."""

    requests: list[tuple[float, float, bool]] = field(default_factory=list)  # began, took, fine
    errors: int = 0
    under_way: int = 0
    let_in: int = 0


async def visitor(site: str, user: int, until: float, session: aiohttp.ClientSession, tally: Tally) -> None:
    """Load the page again and again until let in."""
    rng = random.Random(user)  # the same visits in each mode
    await asyncio.sleep(rng.random() * THINK)
    while time.monotonic() < until:
        began = time.monotonic()
        tally.under_way += 1
        fine = inside = False
        try:
            async with session.get(f"{site}/queue/{PAGE}?user={user}") as answer:
                inside = (await answer.json())["in"] if answer.status == 200 else False
                fine = answer.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError):
            pass
        tally.under_way -= 1
        tally.errors += not fine
        tally.requests.append((began, time.monotonic() - began, fine))
        if inside:
            tally.let_in += 1
            return
        await asyncio.sleep(rng.uniform(0.5, 1.5) * THINK)


async def crowd(site: str, users: int, seconds: float, records: Path) -> None:
    """Have all visitors come, for a time."""
    tally = Tally()
    until = time.monotonic() + seconds
    limits = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(PATIENCE)) as session:
        visits = [asyncio.create_task(visitor(site, user, until, session, tally)) for user in range(1, users + 1)]
        while time.monotonic() < until or (tally.under_way and time.monotonic() < until + PATIENCE):
            await asyncio.sleep(0.25)
            told = {
                "requests": len(tally.requests),
                "errors": tally.errors,
                "under_way": tally.under_way,
                "let_in": tally.let_in,
            }
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()
        for visit in visits:
            visit.cancel()
        await asyncio.gather(*visits, return_exceptions=True)
    (records / "requests.json").write_text(json.dumps(tally.requests))


def main() -> None:
    """Read site, users, seconds and the folder for the records from the command line."""
    site, users, seconds, records = sys.argv[1:]
    try:
        asyncio.run(crowd(site, int(users), float(seconds), Path(records)))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
