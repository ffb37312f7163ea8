"""What a Celery app's settings mean to memolock: which server, and which defaults."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from ..errors import ConfigurationError, OptionError
from ..options import OF_A_TASK, Options
from ..store import Store, Stores, client_of

__all__ = ["defaults_of", "store_of"]

_OPTION_NAMES = frozenset(f.name for f in fields(Options))

_stores = Stores()


def store_of(app: Any) -> Store:
    """Return the server of an app, made at the first use.

    Raises:
        ConfigurationError: none is named, or its URL cannot be used.
    """
    return _stores.of(app, _make_store)


def _make_store(app: Any) -> Store:
    conf = app.conf
    prefix = conf.get("memolock_prefix") or "memolock"
    for name, given in (
        ("memolock_redis_url", conf.get("memolock_redis_url")),
        ("MEMOLOCK_REDIS_URL", os.environ.get("MEMOLOCK_REDIS_URL")),
    ):
        if given:
            return Store(client_of(_first(given), name), prefix)
    for name in ("broker_url", "result_backend"):
        url = _first(conf.get(name))
        if isinstance(url, str) and url.startswith(("redis://", "rediss://", "redis+socket://")):
            return Store(client_of(url, name), prefix)
    raise ConfigurationError(
        f"memolock has no Redis for {app!r}: set app.conf.memolock_redis_url (a URL or a redis.Redis) or the "
        f"environment variable MEMOLOCK_REDIS_URL, or use Redis as broker or result backend"
    )


def _first(url: Any) -> Any:
    return url[0] if isinstance(url, list | tuple) and url else url


def defaults_of(app: Any) -> dict[str, Any]:
    """The app's own defaults: whatever its configuration names ``memolock_<option>``."""
    found: dict[str, Any] = {}
    conf = app.conf
    start = f"{conf.prefix or ''}memolock_".lower()
    for key in conf:
        name = str(key).lower().removeprefix(start)
        if not str(key).lower().startswith(start) or name == "redis_url":
            continue
        if name not in _OPTION_NAMES or name in OF_A_TASK:
            raise OptionError(f"{key} in the Celery configuration is no default that memolock knows")
        found[name] = conf.get(f"memolock_{name}")
    return found
