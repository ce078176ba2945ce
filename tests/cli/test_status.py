"""`ckptless status` reads the ledger and the slot headers of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lightning_ckptless.cli.app import app
from lightning_ckptless.ledger import Ledger
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.replica.slot_stamp import Stamp
from tests.cli.ledgers import RUN_ID, write_ledger

DEAD = Owner(pid=2**22 - 1, started_at=1.0)


def fill(arena: Arena, *, shard: int, holder: int, committed: int, staged: int) -> None:
    """Write both slots of a slot pair: one committed, one staged."""
    for slot, step in zip(arena.slots(shard, holder, 64), (committed, staged), strict=True):
        stamp = Stamp(Version(step, True), generation=2, world_size=2, layout="", shard=shard, holder=holder)
        slot.begin(stamp)
        slot.seal(stamp, b"host state", "")
        if step == committed:
            slot.commit()


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    """The arena of a run whose agent is this process: step 6 is committed, step 7 is staged for shard 0 only."""
    made = Arena.create(tmp_path / "shm", RUN_ID, "node-a", Owner.of(os.getpid()))
    fill(made, shard=0, holder=0, committed=6, staged=7)
    fill(made, shard=1, holder=1, committed=6, staged=5)
    yield made
    made.close()


def read_status(root: Path, *more: str) -> Any:
    result = CliRunner().invoke(app, ["status", "--run-root", str(root), "--json", *more])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_a_running_run(tmp_path: Path, arena: Arena) -> None:
    write_ledger(tmp_path / "runs", arena=arena.path, ended=False)
    status = read_status(tmp_path / "runs")
    assert (status["state"], status["generation"], status["world_size"]) == ("running", 3, 2)
    assert (status["committed"], status["commit_lag_steps"]) == ("step 6", 1)
    assert status["restorable"].startswith("step 6 of generation 2 is complete")
    assert [(a["node"], a["alive"], a["torn_headers"]) for a in status["arenas"]] == [("node-a", True, 0)]
    assert [(s["shard"], s["holder"], s["version"], s["state"], s["bytes"]) for s in status["slots"]] == [
        (0, 0, "step 6", "committed", 74),
        (0, 0, "step 7", "staged", 74),
        (1, 1, "step 6", "committed", 74),
        (1, 1, "step 5", "staged", 74),
    ]
    assert [(member["rank"], member["pid"]) for member in status["members"]] == [(0, 70), (1, 80)]
    assert status["standbys"] == {"ready": 1, "wanted": 2}
    assert status["recovery_count"] == 2
    assert status["recoveries"][-1]["cause"] == "died by SIGKILL"


def test_durable_states_are_reported(tmp_path: Path) -> None:
    folder = write_ledger(tmp_path / "runs")
    assert read_status(tmp_path / "runs")["durable"] == ""
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.record("durable_written", step=20, path="/far/durable/step-0000000020")
    assert read_status(tmp_path / "runs")["durable"] == "step 20, in /far/durable"
    ledger.record("durable_failed", step=30, cause="full")
    assert read_status(tmp_path / "runs")["durable"].endswith("in /far/durable; writing step 30 failed")


def test_a_run_whose_agent_has_exited_is_stopped(tmp_path: Path, arena: Arena) -> None:
    write_ledger(tmp_path / "runs", arena=arena.path, ended=False)
    arena.remove()
    dead = Arena.create(tmp_path / "shm", RUN_ID, "node-b", DEAD)
    dead.close()
    status = read_status(tmp_path / "runs")
    assert (status["state"], status["restorable"]) == ("stopped", "the arenas are empty")


def test_an_ended_run(tmp_path: Path) -> None:
    write_ledger(tmp_path / "runs", arena=tmp_path / "shm" / "gone")
    status = read_status(tmp_path / "runs", RUN_ID)
    assert (status["state"], status["goodput"], status["arenas"]) == ("ended", 0.75, [])


def test_a_torn_header_is_counted(tmp_path: Path, arena: Arena) -> None:
    write_ledger(tmp_path / "runs", arena=arena.path)
    torn = next(path for path in sorted(arena.path.glob("shard-0000*slot-1")))
    with torn.open("r+b") as file:
        file.write(b"torn")
    status = read_status(tmp_path / "runs")
    assert status["arenas"][0]["torn_headers"] == 1
    assert len(status["slots"]) == 3


def test_arenas_of_other_runs_are_not_shown(tmp_path: Path, arena: Arena) -> None:
    write_ledger(tmp_path / "runs", arena=arena.path)
    second = Arena.create(tmp_path / "shm", f"{RUN_ID}.1", "node-a", Owner.of(os.getpid()))
    other = Arena.create(tmp_path / "shm", f"{RUN_ID}0", "node-a", Owner.of(os.getpid()))
    assert {a["path"] for a in read_status(tmp_path / "runs")["arenas"]} == {str(arena.path), str(second.path)}
    second.close()
    other.close()


def test_the_tables_are_printed(tmp_path: Path, arena: Arena) -> None:
    write_ledger(tmp_path / "runs", arena=arena.path)
    result = CliRunner().invoke(app, ["status", "--run-root", str(tmp_path / "runs")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for words in (
        RUN_ID,
        "running",
        "step 6",
        "rank 1 (own)",
        "committed",
        "node-a",
        "rank 0 died by SIGKILL",
        "in place",
    ):
        assert words in result.output


def test_what_is_being_drained_is_shown(tmp_path: Path, arena: Arena) -> None:
    ledger = Ledger(write_ledger(tmp_path / "runs", arena=arena.path, ended=False) / "ledger.jsonl")
    rank: dict[str, Any] = {"node": "node-a", "drained_rank": 1}
    ledger.record("drain", **rank, action="replace", cause="asked", reason="draining rank 1: a standby is ready")
    ledger.record(
        "drain", node="node-a", drained_rank=7, action="refuse", cause="asked", reason="rank 7 is not drained"
    )
    ledger.record("drain", node="node-b", action="shrink", cause="unfit", reason="draining node 1: no node waits")
    expected = ["draining rank 1: a standby is ready (asked)", "draining node 1: no node waits (unfit)"]
    assert read_status(tmp_path / "runs")["draining"] == expected
    shown = CliRunner().invoke(app, ["status", "--run-root", str(tmp_path / "runs")], env={"COLUMNS": "200"}).output
    assert "rank 1: a standby is ready" in shown
    ledger.record("drained", **rank, step=7)
    ledger.record("node_drained", node="node-b", step=7)
    assert read_status(tmp_path / "runs")["draining"] == []


def test_waits_are_attributed_to_ranks(tmp_path: Path) -> None:
    folder = write_ledger(tmp_path / "runs")
    ledger = Ledger(folder / "ledger.jsonl")
    for rank, (data_wait_s, own_s) in enumerate(((0.5, 10.0), (0.25, 10.0), (3.0, 10.0), (0.25, 30.0))):
        ledger.record("rank_time", generation=3, rank=rank, data_wait_s=0.0, own_s=0.0, batches=0)
        ledger.record("rank_time", generation=3, rank=rank, data_wait_s=data_wait_s, own_s=own_s, batches=100)
    ranks = read_status(tmp_path / "runs")["ranks"]
    assert [rank["rank"] for rank in ranks] == [3, 2, 0, 1]
    assert ranks[0] == {"rank": 3, "data_wait_s": 0.25, "own_ms": 300.0, "behind_s": pytest.approx(20.0)}
    assert ranks[1]["behind_s"] == 0.0
    shown = CliRunner().invoke(app, ["status", "--run-root", str(tmp_path / "runs")], env={"COLUMNS": "200"}).output
    assert "Ranks that others wait for" in shown and "300.0 ms" in shown


def test_the_time_of_a_run(tmp_path: Path) -> None:
    write_ledger(tmp_path / "runs")
    status = read_status(tmp_path / "runs")
    assert (status["wall_s"], status["goodput_1h"], status["steps_replayed"], status["failures"]) == (11.0, 0.75, 2, 2)
    assert sum(status["time_s"].values()) == status["wall_s"]
    assert status["time_s"]["training"] == 8.25 and status["time_s"]["rewind"] == 0.0
    assert status["mtbf_low_s"] < status["mtbf_s"] == 5.5 < status["mtbf_high_s"]


def plan(folder: Path, *, nodes: tuple[str, ...], copies: int = 1) -> None:
    """Record a placement of two shards, each with a copy on the other node."""
    Ledger(folder / "ledger.jsonl").record(
        "placement",
        kind="node",
        copies=copies,
        holders=[[1], [0]],
        domains=nodes,
        nodes=nodes,
        sizes_bytes=[64, 64],
        version="step 1",
    )


def test_protection_is_read_from_the_arenas(tmp_path: Path, arena: Arena) -> None:
    folder = write_ledger(tmp_path / "runs", arena=arena.path, ended=False)
    assert read_status(tmp_path / "runs")["protection"] == ""
    plan(folder, nodes=("node-a", "node-b"))
    assert read_status(tmp_path / "runs")["protection"].startswith("unknown: the arena of 1 node is on other hosts")
    Ledger(folder / "ledger.jsonl").record("committed", step=7)
    assert read_status(tmp_path / "runs")["protection"].startswith("2 of 2 shards had all copies of step 7")
    other = Arena.create(tmp_path / "shm", RUN_ID, "node-b", Owner.of(os.getpid()))
    status = read_status(tmp_path / "runs")["protection"]
    assert status.startswith("0 of 2 shards have all copies of step 6; missing: shard 0 on rank 1")
    other.close()


def test_the_placement_is_shown(tmp_path: Path, arena: Arena) -> None:
    plan(write_ledger(tmp_path / "runs", arena=arena.path), nodes=("node-a", "node-b"))
    status = read_status(tmp_path / "runs")["plan"]
    assert status["rows"][1] == ["1", "rank 1", "rank 0", "node-b, node-a", "64 bytes"]
    shown = CliRunner().invoke(app, ["status", "--run-root", str(tmp_path / "runs")], env={"COLUMNS": "200"}).output
    for words in ("protected", "holders", "node-b, node-a", "any 1 node ", "always", "never"):
        assert words in shown
