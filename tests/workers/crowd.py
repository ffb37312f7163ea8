"""One of several web processes: for each line on standard input, ask with many threads at once.

A line is JSON: ``[task, arguments]``. The answer is one JSON list of what the threads got.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from tests.workers.shop import shop


def main() -> None:
    threads = int(sys.argv[1])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        task = shop.tasks[name]
        got: list[Any] = []
        start = threading.Barrier(threads)

        def ask(task: Any = task, arguments: Any = arguments, got: Any = got, start: Any = start) -> None:
            start.wait()
            try:
                got.append(["value", task.get_cached(*arguments)])
            except Exception as error:
                got.append([type(error).__name__, str(error), str(error.__cause__)[-200:]])

        crowd = [threading.Thread(target=ask) for _ in range(threads)]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
        print(json.dumps(got), flush=True)


if __name__ == "__main__":
    assert os.environ["SHOP_BROKER"]
    main()
