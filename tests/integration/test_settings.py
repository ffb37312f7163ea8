"""Whatever says where Redis is and how to connect: all of memolock's connections are made as it says."""

from __future__ import annotations

import asyncio
import inspect
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlencode

import kombu
import pytest
import redis
import rq
from celery import Celery
from click.testing import CliRunner
from django.conf import LazySettings

from celery_memolock import ConfigurationError, MemoLock, MemoLockTask
from celery_memolock.cli import main
from celery_memolock.engines.celery_settings import store_of
from celery_memolock.rq import memolocked_job
from celery_memolock.server import Server
from celery_memolock.store import Store, client_of
from tests.conftest import commands_run
from tests.tls import TlsFront, tls_front

USER, PASSWORD = "sh:op", "p@ss:/w#r;d%?"
LOGIN = f"{quote(USER, safe='')}:{quote(PASSWORD, safe='')}"
#: Celery and kombu do so from 5.6 on.
KNOWS_CREDENTIALS = "credential_provider" in inspect.signature(kombu.Connection).parameters
AWAY = "redis://127.0.0.1:1/0"


class Credentials(redis.CredentialProvider):
    """What a cloud's own provider does: it says who logs in."""

    def get_credentials(self) -> tuple[str, str]:
        return USER, PASSWORD


@dataclass
class Place:
    """One server, and the ways to it."""

    url: str
    path: str
    tls: TlsFront
    witness: redis.Redis

    @property
    def host(self) -> str:
        return self.url.split("/")[2]

    @property
    def mine(self) -> dict[str, Any]:
        """TLS with both certificates, as Celery takes it."""
        return {**self.tls.settings, "ssl_cert_reqs": ssl.CERT_REQUIRED}

    def tls_url(self, **more: str) -> str:
        """The same in a URL."""
        return f"{self.tls.url}/0?{urlencode({**self.tls.settings, **more})}"

    def connections(self) -> dict[str, tuple[Any, ...]]:
        """What the server knows of each connection, by its id: the way, who, and which database."""
        ways = {str(port): "tls" for port in self.tls.ports} | {"0": "socket"}
        rows: Any = self.witness.client_list()
        return {row["id"]: (ways.get(row["addr"].rpartition(":")[2], "tcp"), row["user"], row["db"]) for row in rows}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("settings")
    path = str(folder / "redis.sock")
    with (
        Server(options={"unixsocket": path}) as server,
        tls_front(server.url, folder) as tls,
        redis.Redis.from_url(server.url) as witness,
    ):
        witness.acl_setuser(
            USER, enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], channels=["*"], categories=["+@all"]
        )
        yield Place(server.url, path, tls, witness)


def reached(place: Place, before: dict[str, Any], store: Store, task: Any) -> set[tuple[Any, ...]]:
    """Ask from a thread and from a loop, listen and follow changes → what the server saw of those connections."""
    task.set_cached("stored", "k")
    store.listen(10)
    while "t" not in "".join(row["flags"] for row in place.witness.client_list()):  # local_ttl's link
        threading.Event().wait(0.01)

    async def ask() -> dict[str, Any]:
        assert await task.apeek("k") == "stored"
        return place.connections()

    new = [facts for number, facts in asyncio.run(ask()).items() if number not in before]
    assert len(new) >= 4
    return set(new)


Build = Callable[[Place, pytest.MonkeyPatch], Any]
APPS: dict[str, tuple[Build, tuple[Any, ...]]] = {}


def of_an_app(*facts: Any) -> Callable[[Build], Build]:
    """Note how to make an app, and what its connections are like."""

    def note(build: Build) -> Build:
        if not build.__name__.startswith("credentials") or KNOWS_CREDENTIALS:
            APPS[build.__name__] = (build, facts)
        return build

    return note


def new(**settings: Any) -> Celery:
    """An app of its own: no other test's is disturbed."""
    return Celery("settings", set_as_current=False, **settings)


@of_an_app("tcp", "default", "0")
def broker_in_the_environment(place: Place, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CELERY_BROKER_URL", place.url)
    return new(broker="memory://", backend=AWAY)


@of_an_app("tcp", "default", "0")
def broker_to_write_to(place: Place, _: Any) -> Any:
    return new(broker="memory://", broker_read_url=AWAY, broker_write_url=f"{place.url};{AWAY}")


@of_an_app("tcp", USER, "3")
def password_of_the_broker(place: Place, _: Any) -> Any:
    options = {"retry_on_timeout": True, "health_check_interval": 1}
    return new(broker=[f"redis://{LOGIN}@{place.host}/3", AWAY], broker_transport_options=options)


@of_an_app("tcp", USER, "0")
def credentials_of_the_broker(place: Place, _: Any) -> Any:
    return new(broker=f"{place.url}?credential_provider={__name__}.Credentials")


@of_an_app("socket", "default", "2")
def socket_of_the_broker(place: Place, _: Any) -> Any:
    return new(broker=f"redis+socket://{place.path}?virtual_host=2")


@of_an_app("tls", "default", "0")
def tls_of_the_broker(place: Place, _: Any) -> Any:
    return new(broker=place.tls.url, broker_use_ssl=place.mine)


@of_an_app("tls", "default", "0")
def tls_of_a_plain_broker(place: Place, _: Any) -> Any:
    app = new(broker=place.tls.url.replace("rediss", "redis"))
    app.conf.update(broker_use_ssl=place.mine)
    return app


@of_an_app("tls", USER, "1")
def tls_in_the_url_of_the_broker(place: Place, _: Any) -> Any:
    url = place.tls_url(ssl_cert_reqs="CERT_REQUIRED").replace("/0?", "/1?")
    return new(broker=url.replace("//", f"//{LOGIN}@", 1))


@of_an_app("tls", USER, "0")
def django_with_a_namespace(place: Place, _: Any) -> Any:
    settings = LazySettings()
    url = place.tls.url.replace("//", f"//{LOGIN}@", 1)
    settings.configure(CELERY_BROKER_URL=url, CELERY_BROKER_USE_SSL=place.mine, MEMOLOCK_OF_SOMEBODY_ELSE=1)
    app = new()
    app.config_from_object(settings, namespace="CELERY")
    return app


@of_an_app("tcp", "default", "0")
def old_names_of_the_broker(place: Place, _: Any) -> Any:
    app = new()
    app.config_from_object(SimpleNamespace(BROKER_URL=place.url, CELERY_RESULT_BACKEND=AWAY, CELERY_ACKS_LATE=True))
    return app


@of_an_app("tcp", "default", "4")
def backend_in_the_environment(place: Place, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CELERY_RESULT_BACKEND", place.url.replace("/0", "/4"))
    return new(broker="memory://", backend="rpc://")


@of_an_app("tcp", "default", "0")
def old_names_of_the_backend(place: Place, _: Any) -> Any:
    app = new()
    app.config_from_object(SimpleNamespace(BROKER_URL="memory://", CELERY_RESULT_BACKEND=place.url))
    return app


@of_an_app("tcp", USER, "5")
def parts_of_the_backend(place: Place, _: Any) -> Any:
    host, port = place.host.split(":")
    who = {"redis_username": USER, "redis_password": PASSWORD}
    return new(broker="memory://", backend="redis", redis_host=host, redis_port=int(port), redis_db=5, **who)


@of_an_app("tcp", USER, "0")
def credentials_of_the_backend(place: Place, _: Any) -> Any:
    return new(broker="memory://", backend=place.url, redis_backend_credential_provider=Credentials())


@of_an_app("tls", "default", "0")
def tls_of_the_backend(place: Place, _: Any) -> Any:
    app = new(broker="memory://", backend=place.tls.url)
    app.conf["redis_backend_use_ssl"] = place.mine
    return app


@of_an_app("socket", "default", "6")
def socket_of_the_backend(place: Place, _: Any) -> Any:
    return new(broker="memory://", backend=f"redis+socket://{place.path}?virtual_host=6")


@pytest.mark.parametrize("name", APPS)
def test_as_celery_connects(place: Place, monkeypatch: pytest.MonkeyPatch, prefix: str, name: str) -> None:
    """What memolock takes from Celery it uses as Celery does, for threads, loops, the listener and local caches."""
    build, facts = APPS[name]
    app = build(place, monkeypatch)
    app.conf.memolock_prefix = prefix
    before = place.connections()
    if "backend" in name:
        app.backend.client.ping()
        theirs = place.connections()
        app.backend.client.close()
    else:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=30)
            theirs = place.connections()

    @app.task(base=MemoLockTask, shared=False, memolock={"ttl": 60, "local_ttl": 5})
    def stock(key: str) -> str:
        return key

    assert {facts for number, facts in theirs.items() if number not in before} == {facts}
    assert reached(place, theirs, store_of(app), stock) == {facts}
    store_of(app).close()


CLIENTS: dict[str, tuple[Callable[[Place], Any], tuple[Any, ...]]] = {
    "TLS in kombu's spelling": (lambda place: place.tls_url(ssl_cert_reqs="CERT_REQUIRED"), ("tls", "default")),
    "TLS in the client library's": (
        lambda place: place.tls_url(ssl_cert_reqs="required", ssl_check_hostname="true"),
        ("tls", "default"),
    ),
    "a client with TLS": (
        lambda place: redis.Redis(
            port=int(place.tls.url.rpartition(":")[2]),
            host="127.0.0.1",
            ssl=True,
            credential_provider=Credentials(),
            **place.tls.settings,
        ),
        ("tls", USER),
    ),
    "a client over a socket": (
        lambda place: redis.Redis(unix_socket_path=place.path, username=USER, password=PASSWORD),
        ("socket", USER),
    ),
    "a URL of a socket": (lambda place: f"unix://{LOGIN}@{place.path}", ("socket", USER)),
    "a provider in a URL": (lambda place: f"{place.url}?credential_provider={__name__}:Credentials", ("tcp", USER)),
}


@pytest.mark.parametrize(("name", "engine"), list(zip(CLIENTS, ["inline", "rq", "celery"] * 2, strict=True)))
def test_as_it_is_said(place: Place, prefix: str, name: str, engine: str) -> None:
    """Whoever names the server himself gets just that, with whichever engine."""
    make, (way, user) = CLIENTS[name]
    given = make(place)
    before = place.connections()

    def stock(key: str) -> str:
        return key

    options: Any = {"ttl": 60, "local_ttl": 5, "prefix": prefix}
    if engine == "inline":
        memo = MemoLock(given, prefix=prefix)
        task, store = memo.memoize(**options)(stock), memo._server.store
    elif engine == "rq":
        task = memolocked_job(rq.Queue(connection=client_of(given, "it")), **options)(stock)
        store = vars(task)["memolocked"].store
    else:
        app = new(broker=AWAY, memolock_redis_url=given, memolock_prefix=prefix)
        task = app.task(base=MemoLockTask, shared=False, memolock=options)(stock)
        store = store_of(app)
    assert {facts[:2] for facts in reached(place, before, store, task)} == {(way, user)}
    store.close()


def test_what_only_threads_know(place: Place, prefix: str) -> None:
    """A check of certificates that asyncio would leave out is refused there."""
    client = redis.Redis.from_url(place.tls_url())
    client.connection_pool.connection_kwargs["ssl_validate_ocsp"] = True
    with (
        MemoLock(client, prefix=prefix, ttl=5) as memo,
        pytest.raises(ConfigurationError, match="ssl_validate_ocsp for threads"),
    ):
        asyncio.run(memo.apeek("k"))


def test_health_checks_are_ours(place: Place, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the client library would end the listener's link, as it takes what it hears for its answer."""
    monkeypatch.setattr("celery_memolock.inbox._QUIET", 0.5)
    with redis.Redis.from_url(place.url, health_check_interval=0.01) as client:
        store = Store(client, prefix)
        store.listen(10)
        subscribed = {row["id"] for row in place.witness.client_list(_type="pubsub")}
        asked = commands_run(place.witness, "ping")
        while commands_run(place.witness, "ping") < asked + 2:
            threading.Event().wait(0.01)
        assert {row["id"] for row in place.witness.client_list(_type="pubsub")} == subscribed
        store.close()


@pytest.mark.parametrize("variable", ["MEMOLOCK_REDIS_URL", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"])
def test_command_line(place: Place, variable: str) -> None:
    """Whoever settles from the command line finds the server that an app without settings would."""
    token = (
        '{"format": 1, "keys": ["a:e:{b}", "a:f:{b}", "a:x:{b}", "a:r:{b}"], "fence": "1-a", "attempt": 1, "ttl": 1, '
    )
    token += '"keep": 1, "park": 1, "most_ttl": null, "max_size": 9, "error_ttl": 0}'
    url = place.tls_url(ssl_cert_reqs="CERT_REQUIRED")
    others = {"CELERY_BROKER_URL": "memory://"} if variable == "CELERY_RESULT_BACKEND" else {}
    done = CliRunner().invoke(main, ["settle", token, "5"], env={**others, variable: url})
    assert done.output.startswith("REFUSED\n"), done.output
