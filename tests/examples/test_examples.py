"""The examples give identical results with and without faults, under every launcher."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lightning_ckptless.cli.app import app
from lightning_ckptless.cli.timeline import steps_of_trace
from lightning_ckptless.testing.starters import Launcher
from tests.examples.conftest import CHAR_GPT, CONFIGS, DIGITS, EXAMPLES, Drill

CLI = (str(EXAMPLES / "cli.py"), "fit", "--trainer.max_epochs", "1", "--config")
COMMANDS = {
    "digits": DIGITS,
    "char_gpt": CHAR_GPT,
    "config": (*CLI, str(CONFIGS / "two_cpu_ranks.yaml")),
    "digits.yaml": (*CLI, str(EXAMPLES / "digits" / "digits.yaml")),
}
FAULTS = "kill:rank=1:step=5:at=backward,kill:rank=0:step=9:at=commit"


@pytest.mark.parametrize(
    "example", ["char_gpt", *(pytest.param(name, marks=pytest.mark.long) for name in ("digits", "config"))]
)
def test_results_are_identical(example: str, drill: Drill) -> None:
    report = drill(COMMANDS[example], FAULTS)
    assert report.identical, report.problems
    assert (report.in_place, report.relaunches) == (2, 0)
    assert [(r.kind, r.culprit_rank) for r in report.recoveries] == [("killed", 1), ("killed", 0)]
    # A step is mirrored while the next one runs, so the version may be that of the step before.
    steps = [int(re.findall(r"\d+", r.version)[0]) for r in report.recoveries]
    assert steps[0] in (3, 4) and steps[1] in (7, 8)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
@pytest.mark.parametrize("example", ["digits", "char_gpt", "digits.yaml"])
def test_results_are_identical_under_other_launchers(example: str, launcher: Launcher, drill: Drill) -> None:
    report = drill(COMMANDS[example], FAULTS, launcher)
    assert report.identical, report.problems
    assert len(report.recoveries) == 2


def test_the_report_contains_the_recovery(drill: Drill) -> None:
    report = drill(CHAR_GPT, "kill:rank=1:step=5")
    facts = json.loads(json.dumps(report.to_dict()))
    assert facts["identical"] is True
    assert facts["recoveries"][0]["culprit_rank"] == 1
    assert sum(facts["recoveries"][0]["phases"].values()) == pytest.approx(facts["recoveries"][0]["total_s"], abs=1e-4)
    assert facts["verdict"]["rows"] > 16
    steps = steps_of_trace(report.faulted.trace)
    assert [step.step for step in steps] == list(range(1, 17))


def test_a_fault_that_is_not_injected_fails_the_drill(drill: Drill) -> None:
    report = drill(CHAR_GPT, "kill:rank=1:step=99")
    assert report.verdict.identical
    assert not report.identical
    assert report.problems == ("kill:rank=1:step=99 was not injected: the run never reached its step or moment",)


@pytest.mark.slow
def test_the_drill_command(tmp_path: Path) -> None:
    """Exit code, tables and the JSON file of `ckptless drill`."""
    out = tmp_path / "report.json"
    arguments = ["--fault", "kill:rank=1:step=5", "--isolate", "--json", str(out), CHAR_GPT[0], "--", *CHAR_GPT[1:]]
    result = CliRunner().invoke(app, ["drill", *arguments])
    assert result.exit_code == 0, result.output
    assert "IDENTICAL" in result.output and "rank 1: SIGKILL" in result.output
    assert json.loads(out.read_text())["faults"] == ["kill:rank=1:step=5"]
