"""Values that must never be missing: refreshed by Celery beat, or by whoever runs a signature."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from celery_memolock import MISS
from tests.workers.conftest import BROKERS, ROOT, in_background, until
from tests.workers.shop import Shop

AnyShop = tuple[Shop, str, str]


@BROKERS
def test_beat(any_shop: AnyShop, tmp_path: Path) -> None:
    """`refresh_every` registers the calls with beat, and their values are there without anybody asking."""
    made, broker, store = any_shop
    environment = {"SHOP_BROKER": broker, "SHOP_STORE": store, "SHOP_PREFIX": made.app.conf.memolock_prefix}
    beat = ["-m", "celery", "-A", "tests.workers.shop:app", "beat", "--max-interval", "1", "--schedule"]
    assert made.warm.peek("warm 1") is MISS
    with subprocess.Popen(
        [sys.executable, *beat, str(tmp_path / "schedule")],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:
        try:
            for key in ("warm 1", "warm 2"):
                until(lambda key=key: made.warm.peek(key) is not MISS and made.warm.peek(key) > 1)  # type: ignore[misc]
        finally:
            running.kill()  # SIGTERM is an exception in beat, which AMQP's code may swallow


def test_refresher(any_shop: AnyShop, key: str) -> None:
    """A signature refreshes the value when it is run, as one flight with whoever waits."""
    made, *_ = any_shop
    made.tasks["gated"].refresher(key).delay()
    made.await_start(key)
    waiting = in_background(made.gated.get_cached, key)
    made.open_gate(key, "warm")
    assert waiting.result(30) == "warm"
    assert made.ran(key) == 1
    made.tasks["gated"].refresher(key).delay()
    made.await_start(key)
    assert made.gated.get_cached(key) == "warm"
    made.open_gate(key, "warmer")
    until(lambda: made.gated.get_cached(key) == "warmer")
