"""`ckptless forecast`: every option has an effect, every mistake one message, and a run is read from its ledger."""

from __future__ import annotations

import json
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from lightning_ckptless.cli.app import app
from lightning_ckptless.cli.forecast import progress
from lightning_ckptless.cli.forecast_measured import measured_in
from lightning_ckptless.cli.runs import find_run
from lightning_ckptless.cli.view.forecast_plot import COLOURS
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.ledger import Ledger
from tests.cli.ledgers import Writer, recovery, time_spent

JOB = ["--nodes", "64", "--step-s", "10"]
QUICK = ["--trials", "4", "--days", "20", "--no-alternatives"]
MANY = ["--rate", "60"]
TRACE = "0,a,node,3600\n0,b,node,7200\n90000,c,process,\n400000,a,node,100\n"


def ask(*arguments: str) -> dict[str, Any]:
    """The forecast as JSON."""
    result = CliRunner().invoke(app, ["forecast", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def results(found: dict[str, Any]) -> dict[str, Any]:
    """What was computed, without what was only passed through."""
    names = ("expected", "independent", "closed", "comparison", "lost_money", "arena_bytes_per_node", "recommendation")
    return {name: found[name] for name in names}


@cache
def results_before(*base: str) -> dict[str, Any]:
    """The results that an option is compared with."""
    return results(ask(*JOB, *QUICK, *MANY, *base))


# Each option, what it is compared with, and the value that has to change the result.
EFFECTS: dict[str, tuple[list[str], list[str]]] = {
    "--nodes": ([], ["--nodes", "32"]),
    "--ranks-per-node": ([], ["--ranks-per-node", "4"]),
    "--min-nodes": (["--spares", "0"], ["--min-nodes", "50"]),
    "--rack-nodes": (["--burst-share", "0.5"], ["--rack-nodes", "2"]),
    "--step-s": ([], ["--step-s", "5"]),
    "--data-wait-s": ([], ["--data-wait-s", "0.5"]),
    "--version-s": ([], ["--version-s", "0.5"]),
    "--state-bytes": ([], ["--state-bytes", "1e12"]),
    "--price": ([], ["--price", "2.5"]),
    "--mirror-every-n-steps": ([], ["--mirror-every-n-steps", "20"]),
    "--mirror-budget": ([], ["--mirror-budget", "0.001"]),
    "--copies": (["--burst-share", "0.5"], ["--copies", "2"]),
    "--failure-domain": (["--burst-share", "0.5"], ["--failure-domain", "rack"]),
    "--no-in-place": (["--process-share", "1"], ["--no-in-place"]),
    "--standbys": (["--process-share", "1"], ["--standbys", "1"]),
    "--spares": ([], ["--spares", "0"]),
    "--durable-every-s": ([], ["--durable-every-s", "600"]),
    "--preset": ([], ["--preset", "rsc-1"]),
    "--rate": ([], ["--rate", "30"]),
    "--process-share": ([], ["--process-share", "0.9"]),
    "--weibull-shape": ([], ["--weibull-shape", "0.6"]),
    "--burst-share": ([], ["--burst-share", "0.5"]),
    "--burst-nodes": (["--burst-share", "0.5"], ["--burst-nodes", "4"]),
    "--repair-median-h": (["--spares", "1"], ["--repair-median-h", "2"]),
    "--repair-mean-h": ([], ["--repair-mean-h", "20.4"]),
    "--in-place-s": (["--process-share", "1"], ["--in-place-s", "60"]),
    "--standby-s": (["--process-share", "1", "--standbys", "1"], ["--standby-s", "60"]),
    "--relaunch-s": (["--no-in-place"], ["--relaunch-s", "60"]),
    "--join-s": ([], ["--join-s", "60"]),
    "--shrink-s": (["--spares", "0", "--min-nodes", "30"], ["--shrink-s", "60"]),
    "--grow-s": (["--spares", "0", "--min-nodes", "30"], ["--grow-s", "60"]),
    "--durable-restore-s": (["--copies", "0"], ["--durable-restore-s", "600"]),
    "--durable-stall-s": ([], ["--durable-stall-s", "60"]),
    "--days": ([], ["--days", "10"]),
    "--trials": ([], ["--trials", "3"]),
    "--seed": ([], ["--seed", "1"]),
}


@pytest.mark.parametrize("option", EFFECTS)
def test_every_option_has_an_effect(option: str) -> None:
    base, change = EFFECTS[option]
    rate = [] if option == "--preset" else MANY
    assert results(ask(*JOB, *QUICK, *rate, *base, *change)) != results_before(*base)


def test_no_option_is_left_out() -> None:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    params = group.commands["forecast"].params
    options = {text for p in params for text in (*p.opts, *p.secondary_opts)}
    elsewhere = {
        "--in-place", "--alternatives", "--no-alternatives", "--trace", "--trace-nodes", "--trace-days", "--config",
        "--from", "--run-root", "--json", "--plot",
    }  # fmt: skip
    assert options == {*EFFECTS, *elsewhere}


def test_recommendations_can_be_left_out() -> None:
    arguments = [*JOB, *MANY, "--trials", "3", "--days", "2"]
    assert ask(*arguments, "--no-alternatives")["recommendation"] is None
    found = ask(*arguments, "--alternatives")
    assert found["recommendation"]["alternatives"] and found["recommended"]["ettr"] > 0


def test_a_trace_replaces_the_rate(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TRACE)
    arguments = [*JOB, *QUICK, "--trace", str(tmp_path / "t.csv")]
    found = ask(*arguments)
    assert found["failures"].startswith("4 failures of a trace of 3 nodes over")
    assert results(ask(*arguments, "--trace-nodes", "30")) != results(found)
    assert results(ask(*arguments, "--trace-days", "50")) != results(found)


def test_a_yaml_file_has_the_same_names_and_gives_way_to_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("nodes: 64\nstep_s: 10\nrate: 60.0\ntrials: 4\ndays: 20\nspares: auto\n")
    found = ask("--config", str(tmp_path / "job.yaml"), "--no-alternatives")
    assert results(found) == results(ask(*JOB, *QUICK, *MANY))
    assert ask("--config", str(tmp_path / "job.yaml"), "--no-alternatives", "--nodes", "8")["inputs"]["nodes"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nodes is missing: use --nodes 128, or --from RUN"),
        ([*JOB], "no failure rate is given: use one of --preset rsc-1, --rate 6.5, --trace FILE, or --from RUN"),
        ([*JOB, "--rate", "-1"], "rate=-1: expected more than 0 failures per 1,000 node-days"),
        ([*JOB, *MANY, "--copies", "64"], "copies=64 needs 65 nodes"),
        ([*JOB, *MANY, "--spares", "few"], "spares='few': expected an integer of at least 0, or 'auto'"),
        ([*JOB, *MANY, "--trace-days", "3"], "trace_days has no effect with no trace"),
        ([*JOB, "--trace", "missing.csv"], "missing.csv: the trace cannot be read"),
        ([*JOB, *MANY, "--plot", "ettr.pdf"], "ettr.pdf: expected a .png or .svg file"),
        ([*JOB, *MANY, "--config", "missing.yaml"], "missing.yaml: cannot be read as YAML"),
        (["--from", "missing-run"], "missing-run: no ledger.jsonl found"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["forecast", *arguments])
    assert isinstance(result.exception, OptionsError)
    assert message in str(result.exception)
    assert result.output == ""


def test_an_unreadable_trace_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(TRACE + "500000,a,disk,1\n")
    result = CliRunner().invoke(app, ["forecast", *JOB, "--trace", str(path)])
    assert str(result.exception) == f"{path}, line 5: '500000,a,disk,1': kind 'disk': expected node or process"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node: 3\n", "unknown input node; known are"),
        ("- 3\n", "expected a mapping"),
        ("a: [\n", "cannot be read as YAML"),
    ],
)
def test_a_wrong_yaml_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text)
    result = CliRunner().invoke(app, ["forecast", "--config", str(tmp_path / "job.yaml")])
    assert isinstance(result.exception, OptionsError)
    assert message in str(result.exception)


def test_the_tables_say_what_is_assumed() -> None:
    arguments = ["forecast", *JOB, *MANY, "--trials", "3", "--days", "5", "--price", "2.5", "--state-bytes", "1e12"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    for words in (
        "512 ranks on 64 nodes", "60 failures per 1,000 node-days", "expected ETTR", "closed form", "training",
        "independent", "Recommended", "Alternatives", "memory per node", "money per 30 days", "checkpoint and restart",
        "version_s = 0.1: a version costs 1 % of a step", "AWS HyperPod",
    ):  # fmt: skip
        assert words in result.output
    assert "days = " not in result.output


def test_a_value_that_is_given_is_no_assumption() -> None:
    assumed = ask(*JOB, *QUICK, *MANY)["assumed"]
    fewer = ask(*JOB, *QUICK, *MANY, "--version-s", "0.1", "--join-s", "14")["assumed"]
    assert sorted(set(assumed) - set(fewer)) == [
        "join_s = 14: detection of a lost node (9.1 s), start of another (4.9 s), measured with 4 nodes (benchmarks)",
        "version_s = 0.1: a version costs 1 % of a step",
    ]


def test_the_plot_has_a_curve_per_scheme(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "ettr.png"
    ask(*JOB, *QUICK, *MANY, "--process-share", "0.75", "--plot", str(target))
    colours = set(np.unique((imread(target)[..., :3] * 255).round().astype(int) @ [0x10000, 0x100, 1]).tolist())
    assert {int(colour[1:], 16) for colour in COLOURS} <= colours
    for name in ("a.svg", "b.svg"):
        ask(*JOB, *QUICK, *MANY, "--plot", str(tmp_path / name))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_progress_bar_appears_after_a_second() -> None:
    out, now = StringIO(), [0.0]
    with progress(Console(file=out, force_terminal=True), lambda: now[0]) as tick:
        tick("the given options", 2)
        assert out.getvalue() == ""
        now[0] = 1.5
        tick("the given options", 2)
    assert "simulating the given options" in out.getvalue()


def test_no_progress_bar_is_written_to_a_file() -> None:
    out, now = StringIO(), iter(range(100))
    with progress(Console(file=out), lambda: 10.0 * next(now)) as tick:
        tick("the given options", 2)
    assert out.getvalue() == ""


# ---------------------------------------------------------------------- from a run


def write_run(root: Path, *, auto: bool = True) -> Path:
    """Write the ledger of a run of four ranks on two nodes with three recoveries, and return the run's folder."""
    folder = root / "measured"
    writer = Writer(folder)
    place: dict[str, Any] = {
        "kind": "node",
        "copies": 1,
        "holders": [[2], [3], [0], [1]],
        "nodes": ["a", "a", "b", "b"],
    }
    writer.at(0.0, "placement", **place, domains=["a", "a", "b", "b"], sizes_bytes=[25, 25, 25, 25])
    writer.at(1.0, "standbys", ready=1, wanted=2)
    if auto:
        writer.at(2.0, "mirror_interval", interval=5, reason="cheap", step_s=0.5, version_s=0.01)
    for step in (10, 20, 30):
        spent = time_spent(0.7 * step, training=0.6 * step, mirror_stall=0.04 * step, data_wait=0.06 * step)
        writer.at(3.0 + 0.7 * step, "time_spent", generation=1, **spent | {"step": step, "versions": step // 2})
    for at_s in (100.0, 200.0):
        writer.at(at_s, "recovery", generation=2, **recovery(2))
    writer.at(250.0, "node_lost", node="a", lost=["b"], reason="silent")
    writer.at(300.0, "recovery", generation=3, **(recovery(2) | {"rung": "relaunch", "total_s": 7.2}))
    for at_s in (400.0, 1000.0, 1600.0):
        writer.at(at_s, "durable_written", step=int(at_s), path="p")
    writer.at(8640.0, "run_ended", goodput=0.9, recoveries=3)
    return folder


def test_a_run_gives_what_it_has_measured(tmp_path: Path) -> None:
    found = measured_in(find_run(str(write_run(tmp_path)), None))
    values = {name: value for name, (value, _) in found.items()}
    assert values == {
        "nodes": 2,
        "ranks_per_node": 2,
        "state_bytes": 100,
        "copies": 1,
        "standbys": 2,
        "step_s": pytest.approx(0.44),
        "data_wait_s": pytest.approx(0.06),
        "version_s": 0.01,
        "mirror_every_n_steps": 5,
        "in_place_s": pytest.approx(0.8),
        "relaunch_s": pytest.approx(7.0),
        "durable_every_s": 600.0,
        "rate": pytest.approx(1000 * 3 / (2 * 0.1)),
        "process_share": pytest.approx(2 / 3),
    }


def test_without_a_measured_interval_the_account_of_the_run_counts(tmp_path: Path) -> None:
    found = measured_in(find_run(str(write_run(tmp_path, auto=False)), None))
    assert found["step_s"][0] == pytest.approx(0.6)
    assert found["version_s"][0] == pytest.approx(0.08)
    assert found["data_wait_s"][0] == pytest.approx(0.06)
    assert found["mirror_every_n_steps"][0] == 2


def test_the_command_takes_a_run_and_lets_options_replace_it(tmp_path: Path) -> None:
    write_run(tmp_path)
    arguments = ["--from", "measured", "--run-root", str(tmp_path), *QUICK]
    found = ask(*arguments)
    assert (found["inputs"]["step_s"], found["inputs"]["nodes"]) == (pytest.approx(0.44), 2)
    assert any(line.startswith("rate = 15000: 3 recoveries of the run on 2 nodes") for line in found["assumed"])
    larger = ask(*arguments, "--nodes", "64", "--preset", "rsc-1")
    assert (larger["inputs"]["nodes"], larger["inputs"]["rate"]) == (64, None)
    assert larger["inputs"]["in_place_s"] == pytest.approx(0.8)


def test_a_run_without_failures_needs_a_rate(tmp_path: Path) -> None:
    folder = tmp_path / "quiet"
    writer = Writer(folder)
    place: dict[str, Any] = {
        "kind": "node",
        "copies": 1,
        "holders": [[1], [0]],
        "nodes": ["a", "b"],
        "domains": ["a", "b"],
    }
    writer.at(0.0, "placement", **place, sizes_bytes=[1, 1])
    for second in (1.0, 2.0):
        writer.at(second, "time_spent", generation=1, **time_spent(second, training=second))
    result = CliRunner().invoke(app, ["forecast", "--from", str(folder)])
    assert "no failure rate is given" in str(result.exception)


def test_a_run_that_has_not_trained_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "new" / "ledger.jsonl").record("run_started", arena="x")
    result = CliRunner().invoke(app, ["forecast", "--from", str(tmp_path / "new")])
    assert "the run has not mirrored a version yet" in str(result.exception)
