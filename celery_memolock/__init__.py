"""Request coalescing for Celery and RQ: a miss runs one background task per key, and every caller waits for it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .effects import MISS, CachedEntry
from .engines.inline import Client, MemoLock
from .errors import (
    ArgumentError,
    ConfigurationError,
    DecodeError,
    DispatchError,
    EncodeError,
    FlightFailed,
    MemoLockError,
    NothingStale,
    OptionError,
    ReentrantFlight,
    RemoteTraceback,
    StoreUnavailable,
    TaskFailed,
    ValueTooLarge,
    WaitTimeout,
)
from .flight import Flight, current_flight
from .options import Options, Progress

if TYPE_CHECKING:
    from .engines.celery import MemoLockTask, memolocked_task

__version__ = "0.1.0"

__all__ = [
    "MISS",
    "ArgumentError",
    "CachedEntry",
    "Client",
    "ConfigurationError",
    "DecodeError",
    "DispatchError",
    "EncodeError",
    "Flight",
    "FlightFailed",
    "MemoLock",
    "MemoLockError",
    "MemoLockTask",
    "NothingStale",
    "OptionError",
    "Options",
    "Progress",
    "ReentrantFlight",
    "RemoteTraceback",
    "StoreUnavailable",
    "TaskFailed",
    "ValueTooLarge",
    "WaitTimeout",
    "current_flight",
    "memolocked_task",
]


def __getattr__(name: str) -> Any:
    # Celery takes a tenth of a second and more to import, and who uses another engine has no need of it.
    if name in ("MemoLockTask", "memolocked_task"):
        return getattr(importlib.import_module(".engines.celery", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
