"""A Python that has imported what many tests need, and forks for each of them: to start one anew takes half a second.

The imports are of modules alone, which leave nothing behind: no app, no connection, no thread.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

_CODE = """
import json, os, sys
import celery, pytest, redis
import celery_memolock

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)

os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number in (1, 2):
    os.dup2(os.open(order["files"][number - 1], os.O_WRONLY), number)
os.environ.clear()
os.environ.update(order["environment"])
os.chdir(order["folder"])
sys.argv = ["-c", *order["arguments"]]
exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
"""


class Forks:
    """Runs code in children of one process, each as if it were a new Python."""

    def __enter__(self) -> Forks:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._process:
            os.killpg(self._process.pid, signal.SIGKILL)

    def run(
        self, code: str, *arguments: str, folder: Path, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run some code in a folder, with these environment variables alone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as errors:
            order = {"code": code, "arguments": arguments, "folder": str(folder), "files": [out.name, errors.name]}
            self._process.stdin.write(json.dumps({**order, "environment": dict(environment)}) + "\n")
            self._process.stdin.flush()
            ended = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(arguments, ended, out.read(), errors.read())
