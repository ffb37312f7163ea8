"""The smallest RQ example: a Flask site whose slow query is an RQ job, which runs once for all who ask.

With a Redis or Valkey server at RQ_REDIS_URL (for example redis://localhost:6379/0), in two shells:

    rq worker --url $RQ_REDIS_URL --worker-class celery_memolock.rq.MemoLockWorker reports
    gunicorn --workers 2 --threads 32 examples.rq_app:app           # or: flask --app examples.rq_app run --port 8000

then open http://127.0.0.1:8000/stock/tea. An ordinary worker does as well; only when its work-horse is killed those who
wait hear so later. Flask and gunicorn come with the extra `demo`.
"""

import os
import time

from flask import Flask, Response, jsonify

from celery_memolock import StoreUnavailable, WaitTimeout
from celery_memolock.rq import memolocked_job

app = Flask(__name__)


@memolocked_job("reports", ttl=5, wait_timeout=10)
def stock(article: str) -> dict[str, object]:
    """Report on an article, slowly."""
    time.sleep(0.5)  # stands for a slow query
    return {"article": article, "pieces": len(article), "counted_by": os.getpid(), "counted_at": time.time()}


@app.get("/stock/<article>")
def show(article: str) -> Response:
    """Show the report: from the cache, or after the one job that makes it for all who ask now."""
    return jsonify(stock.get_cached(article))


@app.post("/stock/<article>/sold")
def sold(article: str) -> Response:
    """Something changed: no later visitor sees what was computed before."""
    return jsonify(dropped=stock.invalidate(article))


@app.errorhandler(WaitTimeout)
@app.errorhandler(StoreUnavailable)
def busy(error: Exception) -> tuple[Response, int]:
    """Say so."""
    return jsonify(error=str(error)), 503
