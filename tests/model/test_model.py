"""The protocol under the model checker Spin: it holds in every configuration, and each broken rule is caught.

Every search is exhaustive within the bounds that its switches set; see docs/model.md. Most configurations have two
sets of bounds. The narrow ones take seconds and are searched always. The wide ones take minutes: `make model-all`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import missing

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

MODEL = Path(__file__).with_name("memolock.pml")

#: Assertions only. Where callers may be left waiting is the other kind's business.
SAFETY: dict[str, tuple[str, ...]] = {
    "faults": (
        "CRASHES=1 FREEZES=1 DUPLICATES=1 FLIGHTS=2",
        "CRASHES=1 FREEZES=1 DUPLICATES=1 INVALIDATIONS=2",
    ),
    "two crashes": (
        "CRASHES=2 DUPLICATES=1 ERRORS FLIGHTS=2",
        "CRASHES=2 DUPLICATES=1 ERRORS",
    ),
    "three callers": (
        "CALLERS=3 CRASHES=1 FLIGHTS=2",
        "CALLERS=3 CRASHES=1 FREEZES=1",
    ),
    "calls in turn": (
        "CALLS=2 FREEZES=1 INVALIDATIONS=2 ERRORS ERROR_RECORD FLIGHTS=2",
        "CALLS=2 FREEZES=1 INVALIDATIONS=2 ERRORS ERROR_RECORD",
    ),
    "retries and faults": (
        "RETRIES=1 CRASHES=1 FREEZES=1 FLIGHTS=2",
        "RETRIES=1 CRASHES=1 FREEZES=1 DUPLICATES=1 FLIGHTS=2",
    ),
    "retries and take-overs": (
        "RETRIES=1 DUPLICATES=1 ERRORS FLIGHTS=2",
        "RETRIES=1 DUPLICATES=1 ERRORS",
    ),
    "requeue fails": (
        "CALLERS=1 RETRIES=1 CRASHES=1 DUPLICATES=1 FLIGHTS=2 GOES_ON STORE_DOWN",
        "RETRIES=1 CRASHES=1 DUPLICATES=1 FLIGHTS=2 GOES_ON STORE_DOWN",
    ),
    "overlap": (
        "WORKERS=3 OVERLAP=2 INVALIDATIONS=2",
        "WORKERS=3 OVERLAP=2 CRASHES=1 FREEZES=1 INVALIDATIONS=2",
    ),
    "one at a time": (
        "OVERLAP=1 CRASHES=1 FREEZES=1 FLIGHTS=2",
        "OVERLAP=1 CRASHES=1 FREEZES=1 INVALIDATIONS=2",
    ),
    "set and expired": (
        "PUTS=1 FREEZES=1 EXPIRIES=1 DUPLICATES=1 FLIGHTS=2 FLEETING",
        "PUTS=1 FREEZES=1 EXPIRIES=1 DUPLICATES=1 FLIGHTS=4 FLEETING",
    ),
    "refresh": (
        "CALLERS=1 REFRESHES=1 CRASHES=1 FREEZES=1 DUPLICATES=1 FLIGHTS=2",
        "CALLERS=1 REFRESHES=1 CRASHES=1 FREEZES=1 DUPLICATES=1",
    ),
    "refresh and retries": (
        "CALLERS=1 REFRESHES=1 RETRIES=1 GOES_ON FLIGHTS=2",
        "CALLERS=1 REFRESHES=1 RETRIES=1 GOES_ON",
    ),
    "abandoned and killed": (
        "TIMEOUTS=1 CRASHES=1 DISOWNED=1 FREEZES=1 ABANDON FLIGHTS=2",
        "TIMEOUTS=1 CRASHES=1 DISOWNED=1 FREEZES=1 DUPLICATES=1 ABANDON",
    ),
    "withdrawn": (
        "WITHDRAWALS=1 CRASHES=1 DUPLICATES=1 FLIGHTS=2",
        "WITHDRAWALS=1 CRASHES=1 DUPLICATES=1 INVALIDATIONS=1",
    ),
    "stale": (
        "STALE CALLS=2 FREEZES=1 INVALIDATIONS=2 FLIGHTS=2",
        "STALE CALLS=2 FREEZES=1 INVALIDATIONS=2",
    ),
    "stale on errors": (
        "STALE ERRORS ERROR_RECORD CALLS=2 TIMEOUTS=1 FLIGHTS=2",
        "STALE ERRORS ERROR_RECORD CALLS=2 INVALIDATIONS=2 TIMEOUTS=1",
    ),
    "stale and crashes": (
        "STALE ERRORS ERROR_RECORD CRASHES=1 INVALIDATIONS=2 FLIGHTS=2",
        "STALE ERRORS ERROR_RECORD CRASHES=1 INVALIDATIONS=2",
    ),
    "early": (
        "STALE EARLY CALLERS=3 INVALIDATIONS=2 FLIGHTS=2",
        "STALE EARLY CALLERS=3 INVALIDATIONS=2",
    ),
    "gently expired": (
        "STALE EXPIRE_CALLS=1 PUTS=1 FLIGHTS=2",
        "STALE EXPIRE_CALLS=1 PUTS=1",
    ),
    "expired before a retry": (
        "EXPIRE_CALLS=1 RETRIES=1 GOES_ON CALLERS=1 FLIGHTS=2",
        "EXPIRE_CALLS=1 RETRIES=1 GOES_ON CALLERS=1",
    ),
    "forced": (
        "FORCES=2 CRASHES=1 FLIGHTS=2",
        "FORCES=2 CRASHES=1 DUPLICATES=1",
    ),
    "forced and retries": (
        "CALLERS=1 FORCES=1 RETRIES=1 FREEZES=1 FLIGHTS=2 GOES_ON",
        "FORCES=1 RETRIES=1 FREEZES=1 FLIGHTS=2 GOES_ON",
    ),
    "forced beside stale": (
        "FORCES=1 STALE FLIGHTS=2",
        "FORCES=1 STALE CALLS=2",
    ),
    "tags": (
        "TAGS STALE PUTS=1 FLIGHTS=2",
        "TAGS STALE PUTS=1 INVALIDATIONS=2",
    ),
    "tags and retries": (
        "TAGS RETRIES=1 CRASHES=1 FLIGHTS=2",
        "TAGS RETRIES=1 CRASHES=1 INVALIDATIONS=2 FLIGHTS=2",
    ),
}

#: Every behaviour ends, and then nobody waits. FLIGHTS is what the faults can cost at most; one more is an error.
LIVE: dict[str, tuple[str, ...]] = {
    "faults": (
        "CRASHES=1 LOST_NOTICES=1 LOST_MESSAGES=1 FLIGHTS=6",
        "CRASHES=1 FREEZES=1 DUPLICATES=1 LOST_NOTICES=1 LOST_MESSAGES=1 FLIGHTS=6",
    ),
    "errors": (
        "CRASHES=1 DISOWNED=1 LOST_NOTICES=1 FLIGHTS=6 ERRORS ERROR_RECORD",
        "CRASHES=1 DISOWNED=1 EXPIRIES=1 LOST_NOTICES=1 LOST_MESSAGES=1 FLIGHTS=6 ERRORS ERROR_RECORD",
    ),
    "retries": (
        "RETRIES=1 CRASHES=1 FLIGHTS=6",
        "RETRIES=1 CRASHES=1 LOST_MESSAGES=1 FLIGHTS=6",
    ),
    "one at a time": (
        "OVERLAP=1 CRASHES=1 INVALIDATIONS=2 FLIGHTS=6",
        "OVERLAP=1 CRASHES=1 FREEZES=1 INVALIDATIONS=2 FLIGHTS=6",
    ),
    "abandoned": (
        "TIMEOUTS=1 CRASHES=1 LOST_NOTICES=1 FLIGHTS=6 ABANDON",
        "TIMEOUTS=1 CRASHES=1 LOST_NOTICES=1 LOST_MESSAGES=1 FLIGHTS=6 ABANDON",
    ),
    "stale": (
        "STALE EXPIRIES=1 LOST_NOTICES=1 FLIGHTS=6 ERRORS",
        "STALE EXPIRIES=1 LOST_NOTICES=1 LOST_MESSAGES=1 FLIGHTS=6 ERRORS",
    ),
    "forced": (
        "FORCES=1 LOST_NOTICES=1 FLIGHTS=6",
        "FORCES=1 CRASHES=1 LOST_NOTICES=1 FLIGHTS=6",
    ),
    "tags": (
        "TAGS CRASHES=1 FLIGHTS=6",
        "TAGS CRASHES=1 LOST_MESSAGES=1 FLIGHTS=6",
    ),
    "withdrawn": (
        "WITHDRAWALS=1 LOST_NOTICES=1 FLIGHTS=6",
        "WITHDRAWALS=2 LOST_NOTICES=1 FLIGHTS=6",
    ),
    "frozen": ("FREEZES=1 DUPLICATES=1 LOST_NOTICES=1 FLIGHTS=6",),
    "expired": ("EXPIRIES=1 LOST_NOTICES=1 LOST_MESSAGES=1 FLIGHTS=6 ERRORS ERROR_RECORD",),
}

#: The switch, what it breaks first, and the smallest configuration that shows it.
MUTANTS = [
    ("M_KEEP_LOCK", "S1", ""),
    ("M_INVALIDATE_KEEPS_VALUE", "S1", ""),
    ("M_STORE_DETACHED", "S1", "CALLERS=1 FLIGHTS=1"),
    ("M_RETRY_KEEPS_ATTEMPT", "S1", "RETRIES=1 GOES_ON"),
    ("M_INVALIDATE_KEEPS_STALE", "S1", "STALE"),
    ("M_INDEX_AFTER_CLAIM", "S1", "TAGS"),
    ("M_INDEX_AFTER_RUN", "S1", "TAGS"),
    ("M_PUT_UNINDEXED", "S1", "TAGS PUTS=1"),
    ("M_FOLLOW_DETACHED", "S2", ""),
    ("M_KEEP_ERROR", "S2", "ERRORS ERROR_RECORD"),
    ("M_STALE_COPY", "S2", "STALE CALLS=2"),
    ("M_SPARE_UNCHECKED", "S2", "STALE ERRORS"),
    ("M_CLAIM_UNCHECKED", "S3", "DUPLICATES=1"),
    ("M_ADOPT_RUNNING", "S3", ""),
    ("M_CONFIRM_CLAIMED", "S3", "DUPLICATES=1"),
    ("M_WITHDRAW_CLAIMED", "S3", "WITHDRAWALS=1 DUPLICATES=1"),
    ("M_RETRY_OVERTAKES", "S3", "RETRIES=1 CRASHES=1 FLIGHTS=2 GOES_ON STORE_DOWN"),
    ("M_SETTLE_UNCHECKED", "S4", ""),
    ("M_SETTLE_ANY_ATTEMPT", "S4", "FREEZES=1 DUPLICATES=1"),
    ("M_REQUEUE_UNCHECKED", "S4", "RETRIES=1 FREEZES=1"),
    ("M_DISOWN_ANY_HOLDER", "S4", "CRASHES=1 DISOWNED=1"),
    ("M_NOTICE_OF_ANY_FLIGHT", "S5", ""),
    ("M_TAKE_LIVE", "C1", ""),
    ("M_OVERLAP_UNCHECKED", "C2", "OVERLAP=1"),
    ("M_REFRESH_JOINS_OLD_RUN", "C3", "CALLERS=1 REFRESHES=1 RETRIES=1 GOES_ON"),
    ("M_EXPIRE_FORGETS_RUN", "C3", "EXPIRE_CALLS=1"),
    ("M_EXPIRE_FORGETS_RETRY", "C3", "EXPIRE_CALLS=1 RETRIES=1 GOES_ON CALLERS=1"),
    ("M_ADOPT_BEFORE_RETRY", "C4", "RETRIES=1"),
    ("M_FORCE_TAKES_OLD_RUN", "C5", "FORCES=1"),
    ("M_FORCE_TAKES_STORED", "C5", "FORCES=1"),
    ("M_NO_POLL", "L1", "LIVE LOST_NOTICES=1"),
    ("M_NEVER_EXPIRES", "L1", "LIVE CRASHES=1"),
    ("M_ABANDON_WAITED", "L1", "LIVE ABANDON"),
]


@dataclass(frozen=True)
class Search:
    """What one search found. `violated` is None if it went through all states and found nothing."""

    violated: str | None
    states: int
    seconds: float
    report: str


Check = Callable[[str, bool], Search]


@pytest.fixture
def check(tmp_path: Path, request: pytest.FixtureRequest) -> Check:
    """Search the model with some switches, for assertions and end states or for cycles."""
    for tool in ("spin", "gcc"):
        if shutil.which(tool) is None:
            missing(f"{tool} is not on PATH: the model is not checked")

    # To optimize takes gcc longer than a search within narrow bounds takes without.
    optimize = "-O2" if request.node.get_closest_marker("exhaustive") else "-O0"

    def run(switches: str, cycles: bool = False) -> Search:
        defines = [f"-D{switch}" for switch in switches.split()]
        shutil.copy(MODEL, tmp_path)
        _run(tmp_path, "spin", "-a", *defines, MODEL.name)
        kind = "-DNP" if cycles else "-DSAFETY"
        _run(tmp_path, "gcc", optimize, "-w", kind, "-DNOFAIR", "-DCOLLAPSE", "-DMEMLIM=3500", "-o", "pan", "pan.c")
        how = ["-l"] if cycles else [] if "LIVE" in switches.split() else ["-E"]
        began = time.monotonic()
        report = _run(tmp_path, "./pan", *how, "-m100000", "-w24")
        states = re.search(r"(\d+) states, stored", report)
        assert states, report
        return Search(_violated(report), int(states[1]), time.monotonic() - began, report)

    return run


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _violated(report: str) -> str | None:
    if named := re.search(r"assertion violated .*\|\|([A-Z]\d)\)", report):
        return named[1]
    if re.search(r"pan:\d+: (invalid end state|non-progress cycle)", report):
        return "L1"
    assert re.search(r"State-vector .* errors: 0", report), report
    assert "Search not completed" not in report, report
    assert "max search depth too small" not in report, report
    return None


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[Search], None]:
    """Have it said at the end how large a search was."""
    return lambda search: record_property("found", f"{search.states:>11,} states, {search.seconds:6.1f} s")


def bounds(table: dict[str, tuple[str, ...]]) -> list[Any]:
    """Return the switches of each search of a table: within narrow bounds, and within the wide ones if there are."""
    narrow = [pytest.param(switches, id=name) for name, (switches, *_) in table.items()]
    wide = [(name, switches) for name, (_, *more) in table.items() for switches in more]
    return narrow + [
        pytest.param(switches, id=f"{name}, wide", marks=pytest.mark.exhaustive) for name, switches in wide
    ]


@pytest.mark.parametrize("switches", bounds(SAFETY))
def test_nothing_wrong_happens(switches: str, check: Check, tell: Callable[[Search], None]) -> None:
    """In no order of steps and faults is a property violated."""
    search = check(switches, False)
    tell(search)
    assert search.violated is None, search.report


@pytest.mark.parametrize("cycles", [False, True], ids=["nobody is left", "no cycle"])
@pytest.mark.parametrize("switches", bounds(LIVE))
def test_everybody_gets_an_answer(switches: str, cycles: bool, check: Check, tell: Callable[[Search], None]) -> None:
    """Every behaviour ends, and at its end nobody waits."""
    search = check(f"LIVE {switches}", cycles)
    tell(search)
    assert search.violated is None, search.report


@pytest.mark.parametrize(("switch", "violates", "switches"), MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_a_broken_rule_is_caught(switch: str, violates: str, switches: str, check: Check) -> None:
    """A model with one broken rule violates the property that the rule is for."""
    assert check(f"{switches} {switch}", False).violated == violates


@pytest.mark.parametrize("switches", sorted({mutant[2] for mutant in MUTANTS}))
def test_it_was_the_broken_rule(switches: str, check: Check) -> None:
    """The same configurations, with all rules intact, violate nothing."""
    assert check(switches, False).violated is None


def test_every_broken_rule_is_listed() -> None:
    """No switch of the model goes unchecked or undocumented."""
    switches = set(re.findall(r"\bM_[A-Z_]+\b", MODEL.read_text()))
    assert switches == {mutant[0] for mutant in MUTANTS}
    page = (MODEL.parents[2] / "docs" / "model.md").read_text()
    assert switches == set(re.findall(r"\bM_[A-Z_]+\b", page))
