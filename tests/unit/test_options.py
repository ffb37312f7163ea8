"""The record of options: defaults, and errors that name what is wrong."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from celery_memolock import OptionError
from celery_memolock.options import Options, call_options


def test_defaults() -> None:
    """All but `ttl` has a default."""
    options = Options(ttl=5)
    assert (options.wait_timeout, options.lease, options.dispatch_lease, options.queue_timeout) == (30, 10, 5, 300)
    assert (options.poll_interval, options.max_poll_interval, options.error_ttl) == (1, 5, 0)
    assert (options.serializer, options.compression, options.max_value_size) == ("json", None, 16 * 2**20)
    assert (options.prefix, options.version, options.key, options.ignore) == ("memolock", 1, None, ())


def test_timedelta() -> None:
    """Times may be timedeltas, and are kept as seconds."""
    assert Options(ttl=timedelta(minutes=2)).ttl == 120.0


@pytest.mark.parametrize("ttl", [1e15, 10**15, timedelta.max])
def test_for_ever(ttl: Any) -> None:
    """No time is longer than 100 years, be it of the task, of a call or of a function."""
    century = 100 * 365.25 * 86400
    assert Options(ttl=ttl, stale_ttl=ttl).keep_stale == century
    assert Options(ttl=5).override({"ttl": ttl}).ttl == century
    assert Options(ttl=lambda _: ttl).ttl_of(1) == century


def test_frozen() -> None:
    """The record cannot be changed."""
    with pytest.raises(AttributeError):
        Options(ttl=5).ttl = 6  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ttl", 0),
        ("ttl", -1),
        ("ttl", "5"),
        ("ttl", True),
        ("ttl", None),
        ("ttl", float("nan")),
        ("ttl", float("inf")),
        ("ttl", 0.0001),
        ("lease", 0),
        ("error_ttl", -1),
        ("max_crashes", 0),
        ("max_overlap", 1.5),
        ("max_value_size", True),
        ("version", "2"),
        ("nested", "both"),
        ("on_redis_error", "ignore"),
        ("skip_abandoned", 1),
        ("prefix", ""),
        ("prefix", "a{b}"),
        ("prefix", "a b"),
        ("key", 7),
        ("ignore", "request"),
        ("ignore", [1]),
        ("accept", "json"),
        ("serializer", "nope"),
        ("accept", ["nope"]),
        ("compression", "nope"),
        ("cache_errors", [KeyError]),
        ("cache_errors", {"KeyError": 3}),
        ("cache_errors", {KeyError: -3}),
    ],
)
def test_bad_value(name: str, value: Any) -> None:
    """A value that makes no sense is an error that names the option; it is a ValueError too."""
    with pytest.raises(OptionError, match=name) as caught:
        Options(**{"ttl": 5, name: value})
    assert isinstance(caught.value, ValueError)


def test_unknown_option() -> None:
    """An unknown name is refused, with the known ones."""
    with pytest.raises(OptionError, match=r"unknown memolock option 'wait_timout'.*wait_timeout"):
        Options.build({"ttl": 5, "wait_timout": 3})


def test_missing_ttl() -> None:
    """`ttl` has to be given."""
    with pytest.raises(OptionError, match="ttl is missing"):
        Options.build({"lease": 3})


def test_given_over_defaults() -> None:
    """A task's own options win over its app's."""
    options = Options.build({"ttl": 5, "lease": 3}, {"lease": 4, "wait_timeout": 2})
    assert (options.lease, options.wait_timeout) == (3, 2)


@pytest.mark.parametrize(
    ("given", "default", "text"),
    [
        ({"compress_over": 100}, {"compression": "gzip"}, "compress_over=100 needs compression"),
        ({"soft_timeout": 1}, {"stale_ttl": 60}, r"soft_timeout=1\.0 needs stale_ttl"),
        ({"beta": 2}, {"early_refresh": "xfetch"}, "beta=2 goes with early_refresh='xfetch' only"),
    ],
)
def test_what_needs_a_default(given: dict[str, Any], default: dict[str, Any], text: str) -> None:
    """It is refused once it is known that the app has no such default, or where the task itself rules it out."""
    Options.build({"ttl": 5, **given})
    assert Options.build({"ttl": 5, **given}, default).ttl == 5
    with pytest.raises(OptionError, match=text):
        Options.build({"ttl": 5, **given}, {})
    ruled_out: dict[str, Any] = {name: 0 if name == "stale_ttl" else None for name in default}
    with pytest.raises(OptionError, match=text):
        Options.build({"ttl": 5, **given, **ruled_out})


def test_defaults_that_are_for_other_tasks() -> None:
    """What an app says for all makes no task impossible: a default without a meaning for it lies idle."""
    defaults = {
        "soft_timeout": 1,
        "external_timeout": 5,
        "beta": 2,
        "compress_over": 100,
        "compression": "gzip",
        "ttl_jitter": 0.1,
        "serializer": "pickle",
    }
    plain = Options.build({"ttl": 5}, defaults)
    assert (plain.compression, plain.compress_over) == ("gzip", 100)
    assert Options.build({"ttl": 5, "stale_ttl": 5}, defaults).soft_timeout == 1
    assert Options.build({"ttl": 5, "early_refresh": "xfetch"}, defaults).beta == 2
    Options.build({"ttl": 5, "early_refresh": 0.5}, defaults)
    external = Options.build({"ttl": 5, "external": True}, defaults)
    assert (external.external_timeout, external.compression, external.serializer) == (5, None, "json")
    with pytest.raises(OptionError, match="unknown memolock option 'wat'"):
        Options.build({"ttl": 5}, {"wat": 1})


def test_defaults_that_a_call_gives_a_meaning() -> None:
    """A default that lies idle for the task holds for the call that says more; one that a call rules out lies idle."""
    defaults = {"soft_timeout": 1, "external_timeout": 300, "beta": 5, "ttl_jitter": 0.1}
    options = Options.build({"ttl": 5}, defaults)
    assert options.override({"stale_ttl": 60}).soft_timeout == 1
    assert options.override({"external": True}, travels=False).external_timeout == 300
    assert options.override({"early_refresh": "xfetch"}).beta == 5
    drawn = Options.build({"ttl": 5, "early_refresh": "xfetch", "beta": 2, "stale_ttl": 60, "soft_timeout": 1}, {})
    for fewer in ({"early_refresh": None}, {"early_refresh": 0.5}, {"stale_ttl": 0}):
        drawn.override(fewer)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"soft_timeout": 1}, "soft_timeout=1.0 needs stale_ttl"),
        ({"beta": 2, "early_refresh": 0.5}, "beta=2 goes with"),
        ({"external_timeout": 5}, "external_timeout=5.0 needs external"),
        ({"external": True, "ttl_jitter": 0.5}, "external=True does not go with ttl_jitter"),
        ({"external": True}, "external=True does not go with compression"),
    ],
)
def test_override_that_makes_no_sense(overrides: dict[str, Any], text: str) -> None:
    """What the call itself gives has to mean something."""
    with pytest.raises(OptionError, match=re.escape(text)):
        Options(ttl=5, compression="gzip").override(overrides, travels=False)


def test_override() -> None:
    """What may differ from call to call is replaced in a copy."""
    options = Options(ttl=5)
    assert options.override({"wait_timeout": 2}).wait_timeout == 2
    assert options.wait_timeout == 30


@pytest.mark.parametrize("name", ["serializer", "key", "prefix", "version", "ignore", "max_value_size", "cache_errors"])
def test_override_of_what_belongs_to_the_task(name: str) -> None:
    """What web and worker must agree on cannot be set for one call."""
    assert name not in call_options(travels=True)
    with pytest.raises(OptionError, match=f"{name!r} belongs to the task"):
        Options(ttl=5).override({name: 1})
    with pytest.raises(OptionError, match="unknown"):
        Options(ttl=5).override({"wat": 1})


def test_poll_interval_above_its_maximum() -> None:
    """A longer first interval raises the longest."""
    assert Options(ttl=5, poll_interval=8).max_poll_interval == 8


def test_error_ttl_of() -> None:
    """Of several types that fit an error, the first decides; else `error_ttl`."""
    options = Options(ttl=5, error_ttl=1, cache_errors={KeyError: 30, LookupError: 20})
    assert [options.error_ttl_of(error) for error in (KeyError(), IndexError(), ValueError())] == [30, 20, 1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"refresh_calls": "q1"}, "refresh_calls='q1'"),
        ({"refresh_every": 0}, "refresh_every=0"),
        ({"on_progress": print}, "on_progress is for one call"),
        ({"ttl_jitter": 1}, "ttl_jitter=1"),
        ({"early_refresh": 1.0}, "early_refresh=1.0"),
        ({"early_refresh": "soon"}, "early_refresh='soon'"),
        ({"beta": 2}, "beta=2 goes with"),
        ({"early_refresh": "xfetch", "beta": 0}, "beta=0"),
        ({"soft_timeout": 1}, "soft_timeout=1.0 needs stale_ttl"),
        ({"none_ttl": -1}, "none_ttl=-1"),
        ({"stale_ttl": "long"}, "stale_ttl='long'"),
        ({"cache_if": True}, "cache_if=True"),
        ({"typed": 1}, "typed=1"),
        ({"tags": "one"}, "tags='one'"),
        ({"tags": ["a", ""]}, "tags=('a', '')"),
        ({"tags": ["a", 7]}, "tags=['a', 7]"),
        ({"compress_over": -1}, "compress_over=-1"),
        ({"force_refresh": True}, "force_refresh is for one call"),
        ({"refresh_calls": [("q1",)]}, "refresh_calls=(('q1',),) needs refresh_every"),
        ({"external_timeout": 5}, "external_timeout=5.0 needs external"),
        ({"external": True, "none_ttl": 5}, "external=True does not go with none_ttl"),
        ({"external": True, "ttl_jitter": 0.5}, "external=True does not go with ttl_jitter"),
        ({"external": True, "compression": "gzip"}, "external=True does not go with compression"),
        ({"external": True, "accept": ["json"]}, "external=True does not go with accept"),
        ({"external": True, "on_redis_error": "compute"}, "external=True does not go with on_redis_error"),
    ],
)
def test_freshness_that_makes_no_sense(options: dict[str, Any], text: str) -> None:
    """Each is refused where the task is defined, with its name and value."""
    with pytest.raises(OptionError, match=re.escape(text)):
        Options.build({"ttl": 5, **options}, {})


def test_ttl_of_a_value() -> None:
    """What holds for a value: whether it is stored at all, then None's own ttl, then the function's or the number."""
    options = Options(ttl=lambda value: len(value), none_ttl=7, cache_if=lambda value: value != "never")
    assert [options.ttl_of(value) for value in ("four", "never", None, "")] == [4, 0, 7, 0]
    assert Options(ttl=5).ttl_of(None) == 5
    assert all(5.4 < Options(ttl=6, ttl_jitter=0.1).ttl_of(1) <= 6 for _ in range(100))
    with pytest.raises(OptionError, match="cannot be sent"):
        Options(ttl=5).override({"ttl": len})


def test_functions_that_fail() -> None:
    """An error in the function `ttl` or `cache_if` names the option."""
    with pytest.raises(OptionError, match="ttl"):
        Options(ttl=lambda value: value["missing"]).ttl_of({})
    with pytest.raises(OptionError, match="cache_if"):
        Options(ttl=5, cache_if=lambda value: value["missing"]).ttl_of({})


@pytest.mark.parametrize(
    "given",
    [
        {"ttl": 5, "refresh_every": 60},
        {"ttl": 60, "refresh_every": 60},
        {"ttl": 5, "refresh_every": 60, "stale_ttl": 55},
        {"ttl": 60, "refresh_every": 55, "ttl_jitter": 0.1},
    ],
)
def test_refreshes_that_come_too_late(given: dict[str, Any]) -> None:
    """A value that must never be missing would be, from its end to the next refresh; unless it is still served then."""
    with pytest.raises(OptionError, match=r"refresh_every=.* comes too late for ttl=.*stale_ttl"):
        Options.build(given, {})
    Options.build({**given, "stale_ttl": 60}, {})
    Options.build({**given, "ttl": lambda _: 5}, {})


async def coroutine(*_: Any) -> Any:
    """Give something to await."""


class AsyncCallable:
    """An object that gives something to await."""

    async def __call__(self, *_: Any) -> Any:
        """Give it."""


@pytest.mark.parametrize("function", [coroutine, partial(coroutine, 1), AsyncCallable()])
@pytest.mark.parametrize("name", ["cache_if", "key", "on_progress", "tags", "ttl"])
def test_coroutine_functions(name: str, function: Any) -> None:
    """Nobody awaits what they give, which is true for any value: they are refused, for a task and for a call."""
    with pytest.raises(OptionError, match=f"{name}=.* must be a plain function"):
        Options.build({"ttl": 5, name: function})
    if name in call_options(travels=False):
        with pytest.raises(OptionError, match=f"{name}=.* must be a plain function"):
            Options(ttl=5).override({name: function}, travels=False)


def test_back_off_of_stale_values() -> None:
    """What is served on errors is not refreshed without a pause."""
    assert Options(ttl=5, stale_if_error=9).error_ttl_of(KeyError()) == 1
    assert Options(ttl=5, stale_if_error=9, error_ttl=3).error_ttl_of(KeyError()) == 3
    assert Options(ttl=5).error_ttl_of(KeyError()) == 0
