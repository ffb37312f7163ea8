"""A FastAPI site of one process in which thousands of requests wait for one Celery task.

With a Redis or Valkey server at MEMOLOCK_REDIS_URL (default redis://localhost:6379/0), in three shells:

    celery -A examples.fastapi_app:celery_app worker
    uvicorn examples.fastapi_app:app --backlog 4096
    python -m examples.fastapi_app 10000 http://127.0.0.1:8000/stock/tea

The last one sends 10,000 requests at once, and says how many answers there were, and how many runs. A run takes
STOCK_SECONDS (default 10).
"""

import asyncio
import json
import os
import resource
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import closing
from urllib.parse import urlsplit

from celery import Celery
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from celery_memolock import StoreUnavailable, WaitTimeout, current_flight, memolocked_task

REDIS_URL = os.environ.get("MEMOLOCK_REDIS_URL", "redis://localhost:6379/0")
celery_app = Celery("fastapi_app", broker=os.environ.get("CELERY_BROKER_URL", REDIS_URL))
celery_app.conf.memolock_redis_url = REDIS_URL
SECONDS = float(os.environ.get("STOCK_SECONDS", "10"))
app = FastAPI()


@memolocked_task(ttl=600, wait_timeout=120, app=celery_app)
def stock(article: str) -> dict[str, object]:
    """Report on an article from a table of its own making, for as long as that takes."""
    until = time.monotonic() + SECONDS
    rows = 0
    query = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 200000) SELECT count(*) FROM t"
    with closing(sqlite3.connect(":memory:")) as database:
        while time.monotonic() < until:
            rows += database.execute(query).fetchone()[0]
            current_flight.progress(max(0.0, min(1.0, 1 - (until - time.monotonic()) / SECONDS)), "reading")
    return {"article": article, "rows": rows, "run": f"{os.getpid()} at {until}"}


@app.get("/stock/{article}")
async def show(article: str) -> dict[str, object]:
    """Show the report: from the cache, or after the one task that makes it for all who ask now."""
    return await stock.aget_cached(article)


@app.get("/stock/{article}/events")
async def follow(article: str) -> StreamingResponse:
    """Send how far the report is as server-sent events, and the report itself as the last."""

    async def events() -> AsyncIterator[str]:
        async for progress in stock.afollow(article):
            yield f"event: progress\ndata: {progress.fraction:.2f}\n\n"
        yield f"event: report\ndata: {json.dumps(await stock.aget_cached(article))}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@app.post("/stock/{article}/sold")
async def sold(article: str) -> dict[str, bool]:
    """Something changed: no later visitor sees what was computed before."""
    return {"dropped": await stock.ainvalidate(article)}


@app.exception_handler(WaitTimeout)
@app.exception_handler(StoreUnavailable)
async def busy(_: Request, error: Exception) -> JSONResponse:
    """Say so, and when to come again."""
    return JSONResponse({"error": str(error)}, 503)


async def crowd(requests: int, url: str) -> None:
    """Send requests at once, each over a connection of its own, and count the answers."""
    parts = urlsplit(url)
    door = asyncio.Semaphore(200)  # that many connect at a time; all wait at once

    async def ask() -> str:
        async with door:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        return answer.partition(b"\r\n\r\n")[2].decode()

    answers = Counter(await asyncio.gather(*(ask() for _ in range(requests))))
    reports = [json.loads(answer) for answer in answers]
    runs = {report["run"] for report in reports if "run" in report}
    print(f"{answers.total():,} requests, {len(answers)} answer, {len(runs)} run")
    for report in reports:
        if "run" not in report:
            print(report, file=sys.stderr)


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(crowd(int(sys.argv[1]), sys.argv[2]))
