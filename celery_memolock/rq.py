"""Request coalescing for RQ: ``pip install 'celery-memolock[rq]'``."""

from __future__ import annotations

try:
    import rq as _rq
except ImportError as error:
    raise ImportError("celery_memolock.rq needs RQ: pip install 'celery-memolock[rq]'") from error

from .engines.rq import FlightNotices, MemoLockJob, MemoLockWorker, memolocked_job

__all__ = ["FlightNotices", "MemoLockJob", "MemoLockWorker", "memolocked_job"]

del _rq
