"""The storm's witness catches deliberately broken builds; one that cannot fail is no witness."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos.broken import NAMES
from tests.workers.conftest import ROOT

#: One after the other: what a storm finds depends on how much it gets done.
pytestmark = [pytest.mark.one_driver, pytest.mark.xdist_group("storm")]

SEEN_AS = {"no-claim": "overlapping runs of one (fence, attempt)"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("mutant", NAMES)
def test_witness_catches(mutant: str, tmp_path: Path) -> None:
    """A broken build shows as the violation that it leads to, if not in one storm then in another."""
    report = tmp_path / "report.json"
    shown = SEEN_AS.get(mutant, "stale answers")
    for seed in ("1", "2", "3"):
        command = ["-m", "benchmarks.chaos", "--seconds", "20", "--rate", "0.4", "--seed", seed, "--broken", mutant]
        command += ["--json", str(report)]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=110)
        assert report.exists(), done.stderr
        if json.loads(report.read_text())["results"]["violations"][shown] > 0:
            assert done.returncode == 1
            return
        report.unlink()
    raise AssertionError(done.stdout + done.stderr)


@pytest.mark.rabbitmq
def test_storm_over_rabbitmq(amqp: str, tmp_path: Path) -> None:
    """Half a minute of faults with RabbitMQ as the broker: what must not happen does not."""
    report = tmp_path / "report.json"
    command = ["-m", "benchmarks.chaos", "--seconds", "30", "--rate", "1", "--broker", amqp, "--json", str(report)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(report.read_text())["results"]
    assert sum(results["faults"].values()) > 3
    assert results["calls"]["answers"] > 1000
