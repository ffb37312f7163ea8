"""A Flask site whose slow query runs in a Celery worker, once for everybody.

With a Redis or Valkey server at MEMOLOCK_REDIS_URL (default redis://localhost:6379/0), in two shells:

    celery -A examples.flask_app:celery_app worker
    gunicorn --workers 2 --threads 32 examples.flask_app:app        # or: flask --app examples.flask_app run --port 8000

then open http://127.0.0.1:8000/stock/tea. `docker compose up` starts all three. Flask and gunicorn come with the extra
`demo`.
"""

import os
import sqlite3
from contextlib import closing

from celery import Celery
from flask import Flask, Response, jsonify

from celery_memolock import StoreUnavailable, WaitTimeout, memolocked_task

REDIS_URL = os.environ.get("MEMOLOCK_REDIS_URL", "redis://localhost:6379/0")
celery_app = Celery("flask_app", broker=os.environ.get("CELERY_BROKER_URL", REDIS_URL))
celery_app.conf.memolock_redis_url = REDIS_URL
app = Flask(__name__)


@memolocked_task(ttl=5, wait_timeout=10, app=celery_app)
def stock(article: str) -> dict[str, object]:
    """Report on an article from a table of its own making: some tenths of a second of honest work."""
    with closing(sqlite3.connect(":memory:")) as database:
        query = """
            WITH RECURSIVE movement(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM movement WHERE n < 500000)
            SELECT count(*), sum(n % 7) FROM movement WHERE n % 3 = length(?) % 3
        """
        movements, pieces = database.execute(query, (article,)).fetchone()
    return {"article": article, "movements": movements, "pieces": pieces}


@app.get("/stock/<article>")
def show(article: str) -> Response:
    """Show the report: from the cache, or after the one task that makes it for all who ask now."""
    return jsonify(stock.get_cached(article))


@app.post("/stock/<article>/sold")
def sold(article: str) -> Response:
    """Something changed: no later visitor sees what was computed before."""
    return jsonify(dropped=stock.invalidate(article))


@app.errorhandler(WaitTimeout)
@app.errorhandler(StoreUnavailable)
def busy(error: Exception) -> tuple[Response, int]:
    """Say so, and when to come again."""
    return jsonify(error=str(error)), 503


@app.get("/health")
def health() -> str:
    """Answer the health check."""
    return "ok"
