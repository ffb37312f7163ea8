"""Processes that end with us, however we end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["started"]

# The shell starts a keeper and becomes the program. The keeper waits at a pipe whose only writer we are: when we are
# gone, by whatever signal, it kills its process group.
_KEEPER = """
exec 3<&0 </dev/null
{ read -r line; kill -9 0; } <&3 3<&- >/dev/null 2>&1 &
exec "$@" 3<&-
"""


@contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str], log: Path, pass_fds: Sequence[int] = (), pipe: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a process group of its own for the time of a with block; its output goes to a file.

    Args:
        pipe: keep standard output apart, to be read here.
    """
    with log.open("a") as file:
        process = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "sh", *command],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if pipe else file,
            stderr=file,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            text=True,
        )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for end in (process.stdin, process.stdout):
            if end is not None:
                end.close()
        process.wait()
