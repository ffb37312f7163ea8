"""The table of settings: each way that it names works, and each that it denies is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from celery_memolock import MemoLock, OptionError, environment
from celery_memolock.engines.celery_settings import defaults_of
from celery_memolock.options import Options
from celery_memolock.rq import memolocked_job

PAGE = (Path(__file__).parent.parent.parent / "docs" / "settings.md").read_text()
ROWS = {
    cells[0].strip(" `"): [cell.strip(" `").removesuffix("=") for cell in cells[1:]]
    for cells in (row.strip("|").split("|") for row in PAGE.splitlines() if re.match(r"\| `\w+` \|", row))
}

#: Where a default would not do, as it says nothing.
VALUES = {
    "ttl": 5,
    "compression": "gzip",
    "early_refresh": 0.5,
    "force_refresh": True,
    "none_ttl": 1,
    "on_progress": print,
    "refresh_every": 1,
    "stale_ttl": 9,
    "soft_timeout": 1,
    "accept": ("json",),
    "cache_errors": {KeyError: 1},
    "ignore": ("key",),
    "tags": ("some",),
}


def in_celery(name: str, value: Any, **_: Any) -> Any:
    app = Celery("settings", set_as_current=False)
    app.conf[name] = value
    return defaults_of(app)


def with_namespace(name: str, value: Any, **_: Any) -> Any:
    app = Celery("settings", set_as_current=False)
    app.config_from_object(SimpleNamespace(**{name: value}), namespace="CELERY")
    return defaults_of(app)


def in_environment(name: str, value: Any, patch: pytest.MonkeyPatch) -> Any:
    patch.setenv(name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return environment.defaults()


def with_rq(name: str, value: Any, **_: Any) -> Any:
    return vars(_options_of(memolocked_job(**{**OTHERS, name: value})))


def inline(name: str, value: Any, **_: Any) -> Any:
    return vars(_options_of(MemoLock(**{**OTHERS, name: value}).memoize(name="it")))


OTHERS: Any = {"ttl": 5, "stale_ttl": 9}


def _options_of(decorate: Callable[..., Any]) -> Any:
    options = decorate(size).memo.options
    return SimpleNamespace(**{field.name: getattr(options, field.name) for field in fields(options)})


def size(key: str) -> int:
    return len(key)


COLUMNS: list[tuple[Callable[..., Any], str]] = [
    (in_celery, "memolock_{}"),
    (with_namespace, "CELERY_MEMOLOCK_{}"),
    (in_environment, "MEMOLOCK_{}"),
    (with_rq, "{}"),
    (inline, "{}"),
]


@pytest.mark.parametrize("option", fields(Options), ids=lambda option: option.name)
def test_each_way(option: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cell names sets the option, and where there is a dash the name that would have been is refused."""
    default = None if option.default is MISSING else option.default
    value = VALUES.get(option.name, default)
    for (say, spelt), cell in zip(COLUMNS, ROWS[option.name], strict=True):
        name = spelt.format(option.name.upper() if "MEMOLOCK" in spelt else option.name)
        with monkeypatch.context() as patch:
            if cell == "\N{EN DASH}":
                with pytest.raises(OptionError, match=option.name):
                    say(name, value, patch=patch)
            else:
                assert cell == name
                assert say(name, value, patch=patch)[option.name] == value


def test_nothing_else() -> None:
    """The table has a row for each option, and for nothing that is none."""
    assert set(ROWS) == {option.name for option in fields(Options)}
