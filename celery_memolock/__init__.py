"""Request coalescing for Celery: a cache miss runs one background task per key, and every caller waits for it."""

from __future__ import annotations

from .engines.celery import MemoLockTask, memolocked_task
from .errors import (
    ArgumentError,
    ConfigurationError,
    DecodeError,
    DispatchError,
    EncodeError,
    FlightFailed,
    MemoLockError,
    OptionError,
    ReentrantFlight,
    RemoteTraceback,
    StoreUnavailable,
    TaskFailed,
    ValueTooLarge,
    WaitTimeout,
)
from .options import Options
from .protocol import MISS

__version__ = "0.1.0"

__all__ = [
    "MISS",
    "ArgumentError",
    "ConfigurationError",
    "DecodeError",
    "DispatchError",
    "EncodeError",
    "FlightFailed",
    "MemoLockError",
    "MemoLockTask",
    "OptionError",
    "Options",
    "ReentrantFlight",
    "RemoteTraceback",
    "StoreUnavailable",
    "TaskFailed",
    "ValueTooLarge",
    "WaitTimeout",
    "memolocked_task",
]
