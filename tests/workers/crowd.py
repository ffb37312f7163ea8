"""One of several web processes: for each line on standard input, ask with many callers at once.

A line is JSON: ``[driver, task, arguments]``. The answer is one JSON list of what the callers got. They are threads, or
coroutines of one loop.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from typing import Any

from tests.workers.shop import shop


def failure(error: Exception) -> list[str]:
    return [type(error).__name__, str(error), str(error.__cause__)[-200:]]


def threads(task: Any, arguments: list[Any], callers: int) -> list[Any]:
    """Ask from threads that start together."""
    got: list[Any] = []
    start = threading.Barrier(callers)

    def ask() -> None:
        start.wait()
        try:
            got.append(["value", task.get_cached(*arguments)])
        except Exception as error:
            got.append(failure(error))

    crowd = [threading.Thread(target=ask) for _ in range(callers)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    return got


async def coroutines(task: Any, arguments: list[Any], callers: int) -> list[Any]:
    """Ask from coroutines of one loop."""
    asked = await asyncio.gather(*(task.aget_cached(*arguments) for _ in range(callers)), return_exceptions=True)
    return [failure(each) if isinstance(each, Exception) else ["value", each] for each in asked]


def main() -> None:
    callers = int(sys.argv[1])
    print(json.dumps("ready"), flush=True)
    with asyncio.Runner() if sys.version_info >= (3, 11) else _Runner() as runner:
        for line in sys.stdin:
            driver, name, arguments = json.loads(line)
            task = shop.tasks[name]
            if driver == "asyncio":
                got = runner.run(coroutines(task, arguments, callers))
            else:
                got = threads(task, arguments, callers)
            print(json.dumps(got), flush=True)


class _Runner:
    """What `asyncio.Runner` is from Python 3.11 on."""

    def __enter__(self) -> _Runner:
        self._loop = asyncio.new_event_loop()
        return self

    def run(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(coroutine)

    def __exit__(self, *_: object) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()


if __name__ == "__main__":
    main()
