"""The app of these tests in processes that report to Sentry, for workers and web processes."""

from __future__ import annotations

import json
from typing import Any

import sentry_sdk
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.integrations.redis import RedisIntegration
from sentry_sdk.transport import Transport

from tests.workers.shop import app, shop

__all__ = ["app", "shop"]


class ToRecords(Transport):
    """Keeps what the SDK reports where the tests find it. Nothing leaves the machine."""

    def capture_envelope(self, envelope: Any) -> None:
        for event in (envelope.get_event(), envelope.get_transaction_event()):
            if event is not None:
                shop.records.rpush(f"sentry:{app.conf.memolock_prefix}", json.dumps(event, default=str))


sentry_sdk.init(
    dsn="http://public@127.0.0.1:1/1",
    transport=ToRecords,
    integrations=[CeleryIntegration(), RedisIntegration()],
    auto_enabling_integrations=False,  # else it imports each web framework that is installed
    traces_sample_rate=1.0,
)
