"""A job of a Django project that has its queues from django-rq."""

from __future__ import annotations

from typing import Any

from celery_memolock.rq import memolocked_job

NAME = "default"


def queue() -> Any:
    """Ask Django's settings, which are there by now."""
    import django_rq

    return django_rq.get_queue(NAME)


@memolocked_job(queue, ttl=60)
def stock(key: str) -> str:
    return f"{key} by django"
