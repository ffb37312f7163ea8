"""Every test here injects a fault into real processes; `make chaos` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workers.conftest import (
    acks,
    amqp,
    amqp_shop,
    any_shop,
    key,
    measured,
    own_server,
    redis_shop,
    sent,
    start_for_all,
    start_worker,
)

__all__ = [
    "acks",
    "amqp",
    "amqp_shop",
    "any_shop",
    "key",
    "measured",
    "own_server",
    "redis_shop",
    "sent",
    "start_for_all",
    "start_worker",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.chaos)
