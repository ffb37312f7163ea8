"""The documented rights of a user are enough."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from pathlib import Path

import pytest
import redis

from celery_memolock import MISS, MemoLock
from celery_memolock.server import Server

PAGE = (Path(__file__).parent.parent.parent / "docs" / "settings.md").read_text()


def test_documented_rights(caplog: pytest.LogCaptureFixture) -> None:
    """With them everything works: misses, tags, the local cache, and to invalidate all."""
    (command,) = re.findall(r"`(ACL SETUSER [^`]+)`", PAGE)
    with Server() as server, redis.Redis.from_url(server.url) as admin:
        admin.execute_command(*command.split())
        url = server.url.replace("://", "://app:secret@")
        with caplog.at_level(logging.WARNING), MemoLock(url, ttl=60, tags=["all"], local_ttl=60) as memo:
            assert memo.get("a", lambda: 1) == 1
            assert asyncio.run(memo.aget("b", lambda: 2)) == 2
            deadline = time.monotonic() + 10
            while memo.get_entry("a", lambda: 3).source != "local":
                assert time.monotonic() < deadline
                threading.Event().wait(0.01)
            memo.set("c", 3)
            assert memo.invalidate("c") is True
            assert memo.invalidate_tag("all") == 2
            assert memo.peek("a") is MISS
            memo.refresh("a", lambda: 4)
            memo.set("d", 5)
            assert memo.invalidate_all() >= 1
            assert memo.peek("d") is MISS
        assert caplog.text == ""
        denied: list[object] = admin.execute_command("ACL", "LOG")
        assert denied == []
