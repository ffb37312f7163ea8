"""Imports go upward only, and each layer keeps to what it is for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import celery_memolock

PACKAGE = Path(celery_memolock.__file__).parent

#: From the bottom to the top; modules of one line do not know each other.
LAYERS = [
    {"clock", "errors"},
    {"bounded", "server", "shape"},
    {"codec", "options"},  # options asks codec, late, whether it knows a format
    {"environment", "keys"},
    {"local", "rooms"},
    {"effects"},
    {"protocol"},
    {"weave", "wire"},
    {"connections", "external", "inbox"},
    {"pipe", "tracker"},
    {"store"},
    {"engine"},
    {"sync"},
    {"aio"},
    {"flight", "memo"},
    {"work"},
    {"engines.celery_beat", "engines.celery_queues", "engines.celery_settings", "engines.inline"},
    {"engines.celery_flight"},
    {"engines.celery_worker", "engines.rq"},
    {"engines.celery"},
    {"rq"},
    {"cli"},
]
PURE = ["clock", "errors", "local", "options", "keys", "codec", "rooms", "effects", "protocol", "weave", "wire"]


def _imports(module: str) -> set[str]:
    """Return what a module imports, our own as dotted names within the package."""
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    depth = module.count(".")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.add(node.module or "")
            else:
                inside = module.split(".")[: depth - (node.level - 1)]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                found |= {"." + ".".join([*inside, name]) for name in names}
    return found


def _layer(module: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if module in layer)


@pytest.mark.parametrize("module", sorted({module for layer in LAYERS for module in layer}))
def test_imports_go_upward(module: str) -> None:
    """A module imports only what stands below it."""
    ours = {name[1:] for name in _imports(module) if name.startswith(".")} - {"demo.command"}
    for imported in ours:
        if {module, imported} != {"options", "codec"}:
            assert _layer(imported) < _layer(module), f"{module} imports {imported}"


@pytest.mark.parametrize("module", PURE)
def test_the_core_is_pure(module: str) -> None:
    """The core knows no server, queue, socket or clock; only the codec knows kombu."""
    roots = {name.split(".")[0] for name in _imports(module) if not name.startswith(".")}
    assert not roots & {"redis", "celery", "socket", "selectors", "asyncio", "time", "logging"}
    if module != "codec":
        assert "kombu" not in roots
    if module not in ("local", "rooms"):
        assert "threading" not in roots


@pytest.mark.parametrize("engine", sorted(path.stem for path in (PACKAGE / "engines").glob("[a-z]*.py")))
def test_engines_hold_no_locking_code(engine: str) -> None:
    """An engine sends and runs: it knows no step of the protocol but those that tell what became of a run."""
    path = PACKAGE / "engines" / f"{engine}.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            assert node.module not in OTHERS
            if node.module == "effects":
                assert {alias.name for alias in node.names} <= TOLD, f"{engine} imports more of the effects"
    for word in ("EVALSHA", "execute_command", "PUBLISH", "hset", "lease_until", ".lua"):
        assert word not in path.read_text()


#: What an engine leaves to others.
OTHERS = {"protocol", "wire", "rooms", "inbox", "connections", "pipe", "tracker", "weave", "sync"}

#: What an engine may know of the effects: a ticket, how runs end, and to say that one was killed.
TOLD = {
    "CachedEntry",
    "Call",
    "Defer",
    "Disown",
    "Finished",
    "GoesOn",
    "Interrupted",
    "Missing",
    "Raised",
    "Returned",
    "Ticket",
}


def test_every_module_has_its_layer() -> None:
    """No module of the package escapes this test."""
    known = {module for layer in LAYERS for module in layer} | {"__init__", "testing", "engines.__init__"}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        assert name in known or name.startswith("demo."), name
