"""Which model was last searched as a whole: `make model-all` notes it in searched.txt, and CI compares.

What counts is this folder, and the scripts that the model stands for.
"""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NOTE = HERE / "searched.txt"


def fingerprint() -> str:
    """Return a line for each file that counts, with its hash."""
    files = [*HERE.glob("*.pml"), *HERE.glob("*.py"), *(ROOT / "celery_memolock" / "scripts").glob("*.lua")]
    names = sorted(file.relative_to(ROOT).as_posix() for file in files)
    return "".join(f"{sha256((ROOT / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def main() -> int:
    """Note it with ``--write``, else say what has changed since, and whether nothing has by the exit code."""
    if sys.argv[1:] == ["--write"]:
        NOTE.write_text(fingerprint())
        return 0
    noted = NOTE.read_text().splitlines() if NOTE.exists() else []
    changed = sorted({line.split()[1] for line in {*noted} ^ {*fingerprint().splitlines()}})
    if changed:
        print("changed since the model was last searched as a whole:", *changed)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
