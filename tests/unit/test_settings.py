"""What an app's configuration and the environment mean, before any server is asked."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import redis.sentinel
from celery import Celery

from celery_memolock import ConfigurationError, MemoLock, MemoLockTask, OptionError
from celery_memolock.engines.celery_settings import client_for, defaults_of
from celery_memolock.rq import memolocked_job
from celery_memolock.store import client_of

NAMESPACED = SimpleNamespace(CELERY_MEMOLOCK_LEASE=7, CELERY_TASK_ACKS_LATE=True, MEMOLOCK_OF_SOMEBODY_ELSE=1)
OLD = SimpleNamespace(BROKER_URL="memory://", CELERY_ACKS_LATE=True, MEMOLOCK_LEASE=7)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEMOLOCK_REDIS_URL", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def new(**settings: Any) -> Celery:
    return Celery("settings", set_as_current=False, **settings)


def namespaced() -> Celery:
    app = new()
    app.config_from_object(NAMESPACED, namespace="CELERY")
    return app


def old() -> Celery:
    app = new()
    app.config_from_object(OLD)
    return app


def assigned_first() -> Celery:
    app = new()
    app.conf.memolock_lease = 7
    app.config_from_object(SimpleNamespace(CELERY_TASK_ACKS_LATE=True), namespace="CELERY")
    return app


def small_letters() -> Celery:
    app = new()
    app.config_from_object(SimpleNamespace(celery_memolock_lease=7), namespace="celery")
    return app


def keyword() -> Celery:
    return new(memolock_lease=7)


APPS = [namespaced, old, assigned_first, small_letters, keyword]
WAYS: dict[str, Callable[[Celery, str, Any], Any]] = {
    "attribute": lambda app, name, value: setattr(app.conf, name, value),
    "item": lambda app, name, value: app.conf.__setitem__(name, value),
    "update": lambda app, name, value: app.conf.update({name: value}),
    "add_defaults": lambda app, name, value: app.add_defaults({name: value}),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", APPS)
def test_assigned(make: Callable[[], Celery], way: Callable[..., Any]) -> None:
    """However a default is set, in whichever app, it counts."""
    app = make()
    way(app, "memolock_wait_timeout", 3)
    app.conf.memolock_prefix = "late"
    assert defaults_of(app) == {"lease": 7, "wait_timeout": 3, "prefix": "late"}
    app.conf.memolock_lease = 8
    assert defaults_of(app)["lease"] == 8


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", APPS)
def test_misspelt(make: Callable[[], Celery], way: Callable[..., Any]) -> None:
    """However a wrong one is set, in whichever app, it is refused with what was meant."""
    app = make()
    way(app, "memolock_wait_timout", 3)
    with pytest.raises(OptionError, match=r"^memolock_wait_timout in .* did you mean memolock_wait_timeout"):
        defaults_of(app)


@pytest.mark.parametrize("name", ["CELERY_MEMOLOCK_LEESE", "CELERY_MEMOLOCK_TTL"])
def test_misspelt_with_a_namespace(name: str) -> None:
    """It is named as it was written, and so is what was meant."""
    app = new()
    app.config_from_object(SimpleNamespace(**{name: 1}), namespace="CELERY")
    meant = "did you mean CELERY_MEMOLOCK_LEASE" if name.endswith("LEESE") else "ttl is set where the task is defined"
    with pytest.raises(OptionError, match=f"^{name} in the Celery configuration .* {meant}"):
        client_for(app)


@pytest.mark.parametrize(
    ("settings", "namespace", "name"),
    [
        ({"CELERY_MEMOLOCK_LEASE": -1}, "CELERY", "CELERY_MEMOLOCK_LEASE"),
        ({"celery_memolock_lease": -1}, "celery", "celery_memolock_lease"),
        ({"memolock_lease": -1, "broker_url": "memory://"}, None, "memolock_lease"),
        ({"MEMOLOCK_LEASE": -1, "BROKER_URL": "memory://"}, None, "MEMOLOCK_LEASE"),
    ],
)
def test_wrong_value(settings: dict[str, Any], namespace: str | None, name: str) -> None:
    """It is refused by the setting's name as it was written."""
    app = new()
    app.config_from_object(SimpleNamespace(**settings), namespace=namespace)
    text = f"^{name} in the Celery configuration: memolock option lease=-1: must be more than 0"
    with pytest.raises(OptionError, match=text):
        defaults_of(app)
    with pytest.raises(OptionError, match=text):  # also where no server is named, as that may be why
        client_for(app)


@pytest.mark.parametrize(
    ("namespace", "name"),
    [("CELERY", "CELERY_MEMOLOCK_REDIS_URL"), ("celery", "celery_memolock_redis_url"), (None, "memolock_redis_url")],
)
def test_no_server_is_named(namespace: str | None, name: str) -> None:
    """The error has the setting's name as this app would spell it, and what was found in its stead."""
    app = new()
    broker = {"CELERY": "CELERY_BROKER_URL", "celery": "celery_broker_url", None: "broker_url"}[namespace]
    app.config_from_object(SimpleNamespace(**{broker: "amqp://u:s3cret@h:1//"}), namespace=namespace)
    found = r"broker_url is 'amqp://\*\*\*@h:1//'\) .*result_backend is not set\)"
    with pytest.raises(ConfigurationError, match=f"has no Redis for .*: set {name} in its configuration .*{found}"):
        client_for(app)


LOG_INS = {
    "redis//:s3cret@host:1/0": "redis//***@host:1/0",
    "redis//:s3cr;et,w/o@r'd#@host:1/0": "redis//***@host:1/0",
    "u5er:s3cret@host": "***@host",
    "amqp://u5er:s3cr;e,t/w@rd@host:1//": "amqp://***@host:1//",
    "amqp://u5er:s3cr'e\"t@host:1//": "amqp://***@host:1//",
    "amqp://u5er:s3cr?et@host:1//": "amqp://***",
    "amqp://u5er:s3cr\n@host:1//": "amqp://***@host:1//",
    "amqp://u5er:s3cret@host:1//;amqp://u5er:s3cret@other//": "amqp://***@other//",
    "db+postgresql://u5er:s3'cr@host/db": "db+postgresql://***@host/db",
    "amqp://host:1//?password=s3cret": "amqp://host:1//",
    "amqp://host:1//?password=s3cr@et": "amqp://***",
    "amqp://u5er:s3cr@host:1//?password=s3cr@et": "amqp://***",
    "amqp://host:1//": "amqp://host:1//",
    "amqp://[::1]:1//": "amqp://[::1]:1//",
    "amqp://u5er:s3cret": "amqp://***",
    "amqp://host:1//#s3cret": "amqp://***",
    "azureblockblob://DefaultEndpointsProtocol=https;AccountKey=s3cret;A=b": "azureblockblob://***",
    "db+mssql+pyodbc://?odbc_connect=PWD%3Ds3cret": "db+mssql+pyodbc://",
}


@pytest.mark.parametrize("url", LOG_INS)
@pytest.mark.parametrize("setting", ["broker_url", "result_backend"])
def test_no_server_is_named_and_no_password_either(setting: str, url: str) -> None:
    """Whatever stands there, even where it is no URL, is shown without user and password."""
    app = new(**{"broker": "memory://", setting: url})
    with pytest.raises(ConfigurationError, match="has no Redis") as caught:
        client_for(app)
    assert f"({setting} is {LOG_INS[url]!r})" in str(caught.value)
    assert not any(part in str(caught.value) for part in ("s3", "cr", "u5er", "password"))


def test_the_first_of_several() -> None:
    """Of a list it is what memolock would take."""
    app = new(broker=["amqp://u5er:s3cret@one//", "amqp://u5er:s3cret@two//"])
    with pytest.raises(ConfigurationError, match=r"broker_url is 'amqp://\*\*\*@one//'") as caught:
        client_for(app)
    assert "s3cret" not in str(caught.value)


def stock(key: str) -> str:
    return key


def of_celery(**_: Any) -> Any:
    app = new()
    app.conf.memolock_queue_timeout = 11
    return app.task(base=MemoLockTask, shared=False, memolock={"ttl": 5, "max_run": 12})(stock).memo.options


def of_rq(**_: Any) -> Any:
    return memolocked_job(ttl=5, max_run=12, queue_timeout=11)(stock).memo.options


def of_inline(**_: Any) -> Any:
    return MemoLock(ttl=5, queue_timeout=11).memoize(name="it", max_run=12)(stock).memo.options


ENGINES = pytest.mark.parametrize("options", [of_celery, of_rq, of_inline])


@ENGINES
def test_environment(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has defaults of every type for each engine, below what code says. What means nothing there lies idle."""
    said = {"LEASE": "7.5", "MAX_CRASHES": "3", "SKIP_ABANDONED": "Yes", "ON_REDIS_ERROR": "compute", "ERROR_TTL": ""}
    said |= {"ACCEPT": "json, msgpack", "EARLY_REFRESH": "xfetch", "MAX_RUN": "1", "QUEUE_TIMEOUT": "1", "PREFIX": "p"}
    for name, text in said.items():
        monkeypatch.setenv(f"MEMOLOCK_{name}", text)
    for name in ("MEMOLOCK_REDIS_URL", "MEMOLOCK_SERVICE_HOST", "MEMOLOCK_PORT_6379_TCP", "MEMOLOCK_DRIVER", "LEASE"):
        monkeypatch.setenv(name, "nothing of ours")
    found = options()
    assert (found.lease, found.max_crashes, found.on_redis_error) == (7.5, 3, "compute")
    assert (found.accept, found.early_refresh, found.prefix) == (("json", "msgpack"), "xfetch", "p")
    assert (found.max_run, found.queue_timeout, found.error_ttl) == (12, 11, 0)
    assert found.skip_abandoned == (options is not of_inline)
    monkeypatch.setenv("MEMOLOCK_EARLY_REFRESH", "0.5")
    assert options().early_refresh == 0.5


@ENGINES
@pytest.mark.parametrize(
    ("variable", "text", "told"),
    [
        ("MEMOLOCK_LEESE", "secret", "did you mean MEMOLOCK_LEASE"),
        ("MEMOLOCK_URL", "redis://:secret@h", "did you mean MEMOLOCK_REDIS_URL|there is no such option"),
        ("MEMOLOCK_TTL", "5", "ttl is set where the task is defined"),
        ("MEMOLOCK_CACHE_ERRORS", "5", "cache_errors is set where the task is defined"),
        ("MEMOLOCK_LEASE", "-1", "must be more than 0"),
        ("MEMOLOCK_LEASE", "long", "must be a number of seconds"),
        ("MEMOLOCK_MAX_OVERLAP", "1.5", "must be a whole number"),
        ("MEMOLOCK_TYPED", "maybe", "must be True or False"),
    ],
)
def test_wrong_environment(options: Any, variable: str, text: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is nothing, or makes no sense, is refused by its name; of a wrong name the value is not told."""
    monkeypatch.setenv(variable, text)
    with pytest.raises(OptionError, match=f"^{variable} in the environment.*({told})") as caught:
        options()
    assert "secret" not in str(caught.value)


def settings_of(app: Any) -> dict[str, Any]:
    return client_for(app).connection_pool.connection_kwargs


def test_timeouts() -> None:
    """Those that the user chose for Celery are ours, too; Celery's own two minutes are not."""
    broker = new(broker="redis://h", broker_transport_options={"socket_timeout": 9, "visibility_timeout": 5})
    assert settings_of(broker)["socket_timeout"] == 9
    backend = new(broker="memory://", backend="redis://h")
    assert settings_of(backend).get("socket_timeout") is None
    backend = new(broker="memory://", backend="redis://h", redis_socket_timeout=9, redis_socket_connect_timeout=8)
    assert [settings_of(backend)[name] for name in ("socket_timeout", "socket_connect_timeout")] == [9, 8]


def test_which_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The app's own name, the environment's, the broker, the result backend."""
    app = new(broker="redis://broker", backend="redis://backend", memolock_redis_url=["redis://app", "redis://two"])
    assert settings_of(app)["host"] == "app"
    app.conf.memolock_redis_url = None
    monkeypatch.setenv("MEMOLOCK_REDIS_URL", "redis://environment")
    assert settings_of(app)["host"] == "environment"
    monkeypatch.delenv("MEMOLOCK_REDIS_URL")
    assert settings_of(app)["host"] == "broker"
    app.conf.broker_url = "amqp://broker"
    assert settings_of(app)["host"] == "backend"


SECRET = "s3cr"
PROBLEMS = {
    "slash": (f"redis://:{SECRET}/w0rd@h:1/0", "its host and port make no sense"),
    "hash": (f"redis://user:{SECRET}#w0rd@h:1/0", "its host and port make no sense"),
    "bracket": (f"redis://:{SECRET}[w0rd@h:1/0", "its host and port make no sense"),
    "parameter": (f"redis://:{SECRET}w0rd@h:1/0?nonsense=1", "nonsense"),
    "certificates": (f"rediss://:{SECRET}w0rd@h:1/0?ssl_cert_reqs=nonsense", "nonsense|must be set to"),
    "provider": (f"redis://:{SECRET}w0rd@h:1/0?credential_provider=no.such.Provider", "no|credential_provider"),
    "sentinel": (f"sentinel://:{SECRET}w0rd@h:26379;sentinel://i:26379", "does not know Redis Sentinel"),
}


@pytest.mark.parametrize("namespace", ["memolock", "MEMOLOCK"])
def test_a_namespace_of_our_name(namespace: str) -> None:
    """Where all of Celery's settings begin with it, too, ours are those with the name twice."""
    app = Celery("mine", set_as_current=False)
    settings = {"memolock_broker_url": "redis://broker:1/0", "memolock_memolock_lease": 7, "memolock_task_acks_late": 1}
    if namespace.isupper():
        settings = {name.upper(): value for name, value in settings.items()}
    app.config_from_object(SimpleNamespace(**settings), namespace=namespace)
    assert defaults_of(app) == {"lease": 7}
    assert settings_of(app)["host"] == "broker"


@pytest.mark.parametrize("setting", ["broker_url", "result_backend", "memolock_redis_url"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_cannot_be_used(setting: str, problem: str) -> None:
    """It is named by the setting that it stands in, and shows nothing of a password."""
    url, told = PROBLEMS[problem]
    app = new(**{"broker": "memory://", setting: url})
    with pytest.raises(ConfigurationError, match=f"(?s)^{setting} cannot be used: .*({told})") as caught:
        client_for(app)
    assert SECRET not in str(caught.value)
    assert "w0rd" not in str(caught.value)


def test_a_client_of_sentinel() -> None:
    """It is refused: asyncio would go elsewhere than threads."""
    client = redis.sentinel.Sentinel([("127.0.0.1", 1)]).master_for("primary")
    with pytest.raises(ConfigurationError, match="does not know Redis Sentinel"):
        MemoLock(client, ttl=5).get("k", lambda: 1)


def test_a_url_of_a_unix_socket() -> None:
    """An @ in its path is no user's."""
    assert client_of("unix:///run/redis@main/it.sock", "it").connection_pool.connection_kwargs["path"] == (
        "/run/redis@main/it.sock"
    )
