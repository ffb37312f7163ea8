"""The record of options: defaults, and errors that name what is wrong."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from celery_memolock import OptionError
from celery_memolock.options import CALL_OPTIONS, Options


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


def test_override() -> None:
    """What may differ from call to call is replaced in a copy."""
    options = Options(ttl=5)
    assert options.override({"wait_timeout": 2}).wait_timeout == 2
    assert options.wait_timeout == 30


@pytest.mark.parametrize("name", ["serializer", "key", "prefix", "version", "ignore", "max_value_size", "cache_errors"])
def test_override_of_what_belongs_to_the_task(name: str) -> None:
    """What web and worker must agree on cannot be set for one call."""
    assert name not in CALL_OPTIONS
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
