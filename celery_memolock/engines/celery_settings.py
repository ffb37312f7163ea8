"""What a Celery app's settings mean to memolock: which server, and which defaults."""

from __future__ import annotations

import os
import re
from contextlib import closing
from dataclasses import fields
from functools import partial
from typing import Any, Final

import redis
from celery.app.defaults import DEFAULTS
from kombu.transport import virtual

from .. import environment
from ..effects import Disown
from ..errors import ConfigurationError, OptionError, StoreUnavailable
from ..options import OF_A_TASK, Options, checked
from ..store import NO_SENTINEL, Store, Stores, client_in_environment, client_of, first_url, tried, usable

__all__ = ["client_for", "defaults_of", "store_of", "tell"]

#: The options that an app may have defaults of.
_DEFAULTABLE: Final = frozenset(f.name for f in fields(Options)) - {*OF_A_TASK}

#: A URL of Celery's, or a transport's or backend's name alone, that stands for Redis.
_REDIS: Final = re.compile(r"(rediss?|redis\+socket|sentinel)(://|$)")

_stores: Final = Stores()


def store_of(app: Any) -> Store:
    """Return the server of an app, made at the first use.

    Raises:
        ConfigurationError: none is named, or its URL cannot be used.
    """
    return _stores.of(app, _make_store)


def tell(app: Any, address: str, disown: Disown) -> Any:
    """Tell an app's server what became of a flight.

    Where that cannot be used, or turns the app away, it is told the one at an address, if that is the app's broker or
    result backend: there those who wait for the flight listen.

    Raises:
        ConfigurationError: as `store_of` does.
        StoreUnavailable: it cannot be reached.
    """
    try:
        return store_of(app).run(disown)
    except (ConfigurationError, StoreUnavailable) as error:
        if isinstance(error, StoreUnavailable) and not error.refused:
            raise
        client = _of_the_broker(app) or _of_the_backend(app)
        store = None if client is None else Store(client, "memolock")
        if store is None or store.address != address:
            raise
    with closing(store):
        return store.run(disown)


def _make_store(app: Any) -> Store:
    # A wrong default is no obstacle here: those who wait are to hear of it through this server.
    prefix = _said(app).get("prefix", (None, os.environ.get("MEMOLOCK_PREFIX")))[1] or "memolock"
    return Store(client_for(app), prefix)


def client_for(app: Any) -> redis.Redis:
    """Return a client whose settings are those of the Redis that an app means.

    Raises:
        ConfigurationError: it means none, or one that cannot be used.
    """
    name, given = _said(app).get("redis_url", (_spelt(app.conf.prefix or "", "memolock_redis_url"), None))
    if given:
        with usable(name):
            return client_of(first_url(given), name)
    client = client_in_environment() or _of_the_broker(app) or _of_the_backend(app)
    if client is None:
        defaults_of(app)  # a name that is misspelt says more
        broker, backend = _shown(app.conf.broker_write_url), _shown(app.conf.result_backend)
        raise ConfigurationError(
            f"memolock has no Redis for {app!r}: set {name} in its configuration (a URL or a redis.Redis) or the "
            f"environment variable MEMOLOCK_REDIS_URL, or use Redis as broker (broker_url is {broker}) or as result "
            f"backend (result_backend is {backend})"
        )
    return client


def _of_the_broker(app: Any) -> redis.Redis | None:
    """Return a client that connects as kombu does to where messages are sent; None if that is no Redis."""
    url = app.conf.broker_write_url
    if not _is_redis("broker_url", url if "://" in str(url) else app.conf.broker_transport):
        return None
    with usable("broker_url"):
        first_url(url)  # which says what is wrong without showing a password
        with app.connection_for_write() as connection:
            transport = connection.transport
            # A channel that was initialised by its own class would connect.
            channel = object.__new__(transport.Channel)
            virtual.Channel.__init__(channel, transport)
            return tried(redis.Redis(connection_pool=channel.pool))


def _of_the_backend(app: Any) -> redis.Redis | None:
    """Return a client that connects as the result backend does; None if that is no Redis."""
    url = app.conf.result_backend
    if not _is_redis("result_backend", url):
        return None
    with usable("result_backend"):
        first_url(url)
        pool = app.backend.client.connection_pool
        settings = dict(pool.connection_kwargs)
        if settings.get("socket_timeout") == DEFAULTS["redis_socket_timeout"]:
            del settings["socket_timeout"]  # nobody chose those two minutes
        ours = redis.ConnectionPool(connection_class=pool.connection_class, **settings)
        return tried(redis.Redis(connection_pool=ours))


def _is_redis(name: str, setting: Any) -> bool:
    found = _REDIS.match(str(setting[0] if isinstance(setting, list | tuple) and setting else setting))
    if found is not None and found[1] == "sentinel":
        raise ConfigurationError(f"{name} cannot be used: {NO_SENTINEL}, as memolock_redis_url")
    return found is not None


def _shown(urls: Any) -> str:
    """Return what a setting names, without user, password and parameters, also where its URL is none."""
    url = urls[0] if isinstance(urls, list | tuple) and urls else urls
    if not url:
        return "not set"
    scheme, rest = _SCHEME.findall(str(url))[0]
    place, _, parameters = rest.partition("?")
    _, at, place = place.rpartition("@")
    # Whatever is not known to be harmless may be a part of a password.
    shown = "***" if "@" in parameters or not _PLACE(place) else f"{at and '***@'}{place}"
    return repr(scheme + shown)


_SCHEME: Final = re.compile(r"^(\w[\w+]*:?//|)(.*)", re.DOTALL)
_PLACE: Final = re.compile(r"([\w.-]*|\[[\da-fA-F:.]+\])(:\d+)?(/[\w.-]*)*").fullmatch


def defaults_of(app: Any) -> dict[str, Any]:
    """Return the defaults for an app's tasks: what its configuration names, over what the environment does.

    Raises:
        OptionError: one of them is unknown, or is for a single task, or has a value that makes no sense.
    """
    found = environment.defaults()
    for name, (key, value) in _said(app).items():
        if name in _DEFAULTABLE:
            found[name] = checked(name, value, f"{key} in the Celery configuration")
        elif name != "redis_url":
            start = key[: len(key) - len(name)]
            meant = environment.instead(name, _DEFAULTABLE, partial(_spelt, start))
            raise OptionError(f"{key} in the Celery configuration is no default that memolock knows: {meant}")
    return found


def _said(app: Any) -> dict[str, tuple[str, Any]]:
    """Return what an app's configuration calls ``memolock_...``: by option the whole name, and the value."""
    conf = app.conf.finalize()
    # As Celery reads its own settings: of an app with a namespace they may be assigned without it, and without one a
    # module of the old style has all names in capitals, most of them with CELERY in front.
    named = [_spelt(conf.prefix, "memolock_")] if conf.prefix else ["MEMOLOCK_", "CELERY_MEMOLOCK_"]
    if conf.prefix != "memolock_":  # else so begin all of Celery's own settings
        named.insert(0, "memolock_")
    found: dict[str, tuple[str, Any]] = {}
    for settings in reversed(conf.maps):
        for start in named:
            for key in (key for key in settings if str(key).startswith(start)):
                found[key.removeprefix(start).lower()] = key, settings[key]
    return found


def _spelt(start: str, name: str) -> str:
    return (start + name).upper() if start.isupper() else (start + name).lower()
