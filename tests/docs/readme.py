"""Does what the README says: writes its files, types its commands, and compares what they print.

test_snippets.py does so in the environment of the tests, `.ci/wheel` in new ones:

    python tests/docs/readme.py some/celery_memolock.whl

The standard library is all that this needs.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).parent.parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SIXTY_SECONDS = re.compile(r"^## Sixty seconds\n(.*?)^## ", re.DOTALL | re.MULTILINE)
SESSION = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)

#: What does not end by itself.
LASTING = re.compile(r"celery-memolock server|celery .*worker|rq worker")

#: Seconds for a command, or for a server to print its address. A first install fetches everything.
PATIENCE = 300.0


class Command(NamedTuple):
    """A line that is typed, and what it prints."""

    line: str
    prints: str


def snippets(page: Path) -> dict[str, str]:
    """Return the files that a page shows, by name."""
    return dict(BLOCK.findall(page.read_text()))


def sessions() -> list[list[Command]]:
    """Return the commands of each block of the README's first minute."""
    found = SIXTY_SECONDS.search(README.read_text())
    assert found
    return [
        [Command(*typed.split("\n", 1)) for typed in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
        for block in SESSION.findall(found[1])
    ]


def play(folder: Path, port: int, install: Callable[[list[str]], Path]) -> Iterator[tuple[str, str]]:
    """Do all of it.

    Args:
        folder: where the files go.
        port: what stands in for the README's.
        install: does what a command of pip says → the folder of the programs.

    Yields:
        Each command as the README has it, and what was wrong: "" if nothing was.
    """
    local = f"localhost:{port}"
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CELERY_", "MEMOLOCK_", "RQ_", "PYTHON"))
    }
    for name, text in snippets(README).items():
        (folder / name).write_text(text.replace("localhost:6379", local))
    with ExitStack() as stack:
        lasting = []
        for number, (line, prints) in enumerate(command for session in sessions() for command in session):
            arguments = shlex.split(line.replace("localhost:6379", local), comments=True)
            if arguments[0] == "pip":
                programs = install(arguments)
                environment["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
                yield line, "" if programs.is_dir() else f"there is no {programs}"
            elif LASTING.match(line):
                serves = "server" in arguments
                arguments += ["--port", str(port)] if serves and port != 6379 else []
                log = folder / f"{number}.log"
                with log.open("wb") as file:
                    process = subprocess.Popen(
                        arguments, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                stack.callback(process.kill)
                lasting.append((line, process, log))
                if serves:
                    deadline = time.monotonic() + PATIENCE
                    while not log.read_text() and process.poll() is None and time.monotonic() < deadline:
                        time.sleep(0.02)
            else:
                done = subprocess.run(
                    arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE
                )
                right = (done.returncode, done.stdout, done.stderr) == (0, prints, "")
                logs = "".join(log.read_text() for _, _, log in lasting)
                yield line, "" if right else f"ended with {done.returncode}: {done.stdout}{done.stderr}\n{logs}"
        for line, process, log in reversed(lasting):  # the workers before the server
            process.terminate()
            code = process.wait(PATIENCE)
            yield line, "" if code == 0 else f"ended with {code}: {log.read_text()}"


def free_port(wanted: int = 0) -> int:
    """Return the port that is wanted if it is free, else another one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main(wheel: str) -> None:
    """Do it with a wheel, in a new environment for each command of pip."""
    wrong = []
    with tempfile.TemporaryDirectory(prefix="memolock-readme-") as home:

        def install(arguments: list[str]) -> Path:
            programs = Path(tempfile.mkdtemp(dir=home)) / "bin"
            venv.create(programs.parent, symlinks=True)  # without a pip, whose own packages may be what is missing
            given = [each.replace("celery-memolock", str(Path(wheel).absolute())) for each in arguments[1:]]
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", programs / "python", "-q"]
            subprocess.run([*pip, *given], check=True)
            return programs

        folder = Path(home, "files")
        folder.mkdir()
        began = time.monotonic()
        played = list[str]()
        for line, fault in play(folder, free_port(6379), install):
            played.append(line)
            wrong += [line] if fault else []
            print(f"{time.monotonic() - began:6.1f} s  {'FAILED' if fault else 'ok':7}{line}", flush=True)
            print(fault, end="", file=sys.stderr)
    print(f"{len(played) - len(wrong)} passed, {len(wrong)} failed")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
