"""What calls `MemoLock.get` and `aget`: in this process, and in others that a test keeps and gives orders to."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from celery_memolock import MemoLock
from tests.engines.tasks import Records, Sold, connect
from tests.workers.conftest import ROOT

#: What all of them ask with, so that a lost notice or a lost caller heals while a test waits.
COMMON: dict[str, Any] = {"ttl": 60, "lease": 20.0, "poll_interval": 0.5}

#: Options by name: functions cannot be sent to another process.
OPTIONS: dict[str, dict[str, Any]] = {
    "not stored": {"cache_if": lambda value: False},
    "short lease": {"lease": 1.0},
    "impatient": {"wait_timeout": 0.3},
}


def fetches(records: Records, key: str) -> dict[str, Callable[[], Any]]:
    """Return what computes a key's value, in several ways."""

    def gated() -> str:
        records.note(key)
        return records.stand_at_gate(key)

    def gated_failure() -> str:
        raise Sold(key, gated())

    def every_other() -> int:
        count = records.note(key)
        if count % 2:
            raise Sold(key, count)
        return count

    def slow() -> int:
        count = records.note(key)
        time.sleep(1.6)
        return count

    return {
        "counted": lambda: records.note(key),
        "every other": every_other,
        "gated": gated,
        "gated failure": gated_failure,
        "slow": slow,
    }


class Callers:
    """The callers of one process.

    Args:
        url: the server.
        prefix: of the keys.
    """

    def __init__(self, url: str, prefix: str) -> None:
        self.memo = MemoLock(url, prefix=prefix, **COMMON)
        self._records = connect(url)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def ask(
        self, driver: str, fetch: str, keys: list[str], count: int, options: str = "", most: int | None = None
    ) -> list[Any]:
        """Have so many callers ask for each key → their answers; an error as its name and its arguments.

        Args:
            driver: "threads" or "asyncio".
            fetch: which of `fetches`.
            keys: what they ask for.
            count: how many callers for each.
            options: which of `OPTIONS`.
            most: at most so many at once. Default: all.
        """
        asked = keys * count
        most = most or len(asked)
        given = OPTIONS[options] if options else {}
        functions = {key: fetches(self._records, key)[fetch] for key in keys}
        if driver == "threads":

            def one(key: str) -> Any:
                self._records.server.incr(f"asked:{key}")
                try:
                    return self.memo.get(key, functions[key], **given)
                except Exception as error:
                    return [type(error).__name__, *error.args]

            with ThreadPoolExecutor(most) as pool:
                return list(pool.map(one, asked))

        async def all_of_them() -> list[Any]:
            places = asyncio.Semaphore(most)

            async def other(key: str) -> Any:
                async def called() -> Any:
                    return await asyncio.to_thread(functions[key])

                async with places:
                    await asyncio.to_thread(self._records.server.incr, f"asked:{key}")
                    try:
                        return await self.memo.aget(key, called, **given)
                    except Exception as error:
                        return [type(error).__name__, *error.args]

            return await asyncio.gather(*map(other, asked))

        answers: list[Any] = self.run(all_of_them())
        return answers

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Have something done in the loop of this process."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def serve(self) -> None:
        """Follow the orders that come in by lines, one after the other, until the test has no more."""
        print("ready", flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            prefix = order.pop("prefix")
            if self.memo._server._prefix != prefix:  # another test
                self.memo = MemoLock(self.memo._server._given, prefix=prefix, **COMMON)
            print(json.dumps(self.ask(**order)), flush=True)


class OtherCallers:
    """The callers of another process."""

    def __init__(self, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engines.callers", url],
            cwd=ROOT,
            env=os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._hands = ThreadPoolExecutor(1)  # one order at a time

    def await_ready(self) -> None:
        """Return when it takes orders."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, prefix: str, *order: Any, options: str = "", most: int | None = None) -> Future[list[Any]]:
        """Give it an order; see `Callers.ask`."""
        driver, fetch, keys, count = order
        told = {"prefix": prefix, "driver": driver, "fetch": fetch, "keys": keys, "count": count}
        return self._hands.submit(self._ask, {**told, "options": options, "most": most})

    def _ask(self, order: dict[str, Any]) -> list[Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(order)}\n")
        self._process.stdin.flush()
        answers: list[Any] = json.loads(self._process.stdout.readline())
        return answers

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._hands.shutdown()


if __name__ == "__main__":
    Callers(sys.argv[1], "none").serve()
