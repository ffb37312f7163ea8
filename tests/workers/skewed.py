"""The app of these tests in a worker whose code is older, or newer, than that of its callers."""

from __future__ import annotations

from typing import Any

from celery_memolock import MemoLockTask
from tests.workers.shop import app

__all__ = ["app"]

del app.tasks["shop.stock"], app.tasks["shop.sourced"]


@app.task(name="shop.stock", shared=False, lazy=False, bind=True, max_retries=1)
def stock(self: Any, key: str) -> str:
    """Cached by its callers, and an ordinary task here."""
    if key.startswith("again") and not self.request.retries:
        raise self.retry(countdown=0)
    if key.startswith("failing"):
        raise LookupError(key)
    return key


@app.task(name="shop.sourced", shared=False, lazy=False, base=MemoLockTask)
def sourced(key: str) -> str:
    """Has no options here."""
    return key
