"""What is imported is what is required, and the documents name what brings it."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import metadata, packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import celery_memolock

OURS = sorted(Path(celery_memolock.__file__).parent.rglob("*.py"))
PAGE = (Path(__file__).parent.parent.parent / "docs" / "engines.md").read_text()

#: Extras for those who work on celery_memolock.
INSIDE = {"dev", "peers"}


def _required(name: str, extras: set[str]) -> set[str]:
    """Return what a distribution needs, and what those extras add."""
    needed = [Requirement(line) for line in requires(name) or ()]
    return {
        canonicalize_name(each.name)
        for each in needed
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in {"", *extras})
    }


def _imported(path: Path) -> set[str]:
    """Return the packages that a module imports, at its top or later, but for the standard library's and its own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {given.value for given in node.args if isinstance(given, ast.Constant)}
    later = {"annotationlib", "compression"}  # of the standard library from Python 3.14 on
    return {name.split(".")[0] for name in found if not name.startswith(".")} - set(sys.stdlib_module_names) - later


def _extras() -> set[str]:
    return set(metadata("celery-memolock").get_all("Provides-Extra") or ()) - INSIDE


def test_what_is_imported_is_required() -> None:
    """Each package comes from a dependency or from an extra for users, and not by way of another package.

    What Celery and kombu leave to their own extras, but need with Redis as broker, comes without an extra.
    """
    distributions = packages_distributions()
    imported = {path: _required("celery-memolock", _extras()) for path in OURS}
    for module in ("kombu.transport.redis", "celery.backends.redis"):
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        owner = module.split(".")[0]
        imported[Path(spec.origin)] = _required("celery-memolock", set()) | _required(owner, set()) | {owner}
    for path, required in imported.items():
        for package in _imported(path):
            origins = {canonicalize_name(name) for name in distributions.get(package, [])}
            assert origins & required, f"{path.name} imports {package}, which nothing brings"


def test_every_extra_is_documented() -> None:
    """The table of what to install names each extra."""
    assert set(re.findall(r"^\| `celery-memolock\[(\w+)\]`", PAGE, re.MULTILINE)) == _extras()
