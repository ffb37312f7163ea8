"""The queue page of the demo, by hand.

With a Redis or Valkey server at MEMOLOCK_DEMO_REDIS (default redis://localhost:6379/0), first make the table, then
start the worker and the site, each in a shell of its own:

    python -m examples.queue_page
    celery -A examples.queue_page:celery_app worker
    gunicorn --workers 3 --threads 64 examples.queue_page:app

and open http://127.0.0.1:8000/queue/sale?user=7, or http://127.0.0.1:8000/queue/sale/watch: its bar shows how far the
worker is, which says so while it counts; /queue/sale/events passes that on as server-sent events.

With MEMOLOCK_DEMO_MODE=none or ttl the site counts without a cache, or with a plain one. `celery-memolock demo` does
all this, and puts the site under load.
"""

from celery_memolock.demo.page import app, celery_app, database

__all__ = ["app", "celery_app"]

if __name__ == "__main__":
    database.create(users=5500, told=print)
