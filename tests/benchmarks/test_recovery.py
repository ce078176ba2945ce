import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recovery
from benchmarks.harness.watch import Watch
from benchmarks.harness.wire import Inbox, Note, Wire
from benchmarks.recovery import FRESH, Recovery, own_share_s


def kill(seconds: float, *, repeated: int = 1, lost: int = 0) -> dict[str, Any]:
    moments = {"script": 0.2, "imported": 0.5, "fit": 0.6, "train": 0.7, "step": seconds}
    earlier = {name: at - 0.1 for name, at in moments.items()}
    phases = dict.fromkeys(("detect_s", "abort_s", "regroup_s", "restore_s", "replay_s"), 0.1) | {"other_s": 0.0}
    return {
        "seconds": seconds,
        "killed_at": 1000.0,
        "repeated_steps": repeated,
        "lost_committed_steps": lost,
        "starts": 1.0,
        "step_s": 0.1,
        "ranks": [earlier, moments],
        "ledger": {"phases": phases, "total_s": 0.5, "spawned_at": 1000.1},
    }


def results(*kills: dict[str, Any]) -> dict[str, Any]:
    return {"rivals": {}, "kills": {FRESH: list(kills), "torchrun, ddp": [{"failed": "no sign"}]}}


def test_own_share_leaves_out_start_and_imports() -> None:
    assert own_share_s(kill(0.9)) == pytest.approx(0.9 - (0.5 - 0.1))


def test_summary_counts_survived_kills_and_lost_steps() -> None:
    table, _ = Recovery().tables(results(kill(1.0), kill(3.0, repeated=2, lost=1), kill(2.0)))

    assert table.rows[0] == (FRESH, "3", "3", "2.00", "2.90", "3.00", "0.10", "1", "2", "1", "", "0 of 0")
    assert table.rows[1][:3] == ("torchrun, ddp", "1", "0")


def test_phases_come_from_the_ledger() -> None:
    _, phases = Recovery().tables(results(kill(0.9)))
    assert phases.rows == [(FRESH, *5 * ("0.100",), "0.000", "0.500")]


def test_every_scenario_has_its_own_command_line() -> None:
    lines = [scenario.command(scenario.job) for scenario in recovery.SCENARIOS]
    assert len({tuple(line) for line in lines}) == len(recovery.SCENARIOS)


class Running:
    running = True

    def output_tail(self) -> str:
        return ""


def test_a_watch_distinguishes_the_processes_of_a_rank() -> None:
    wire: Any = None
    watch: Any = Watch(None, Running(), 2)  # type: ignore[arg-type]

    def take(moment: str, pid: int, rank: int, **fields: Any) -> None:
        watch.take(Note(moment, float(pid), pid, rank, fields, wire))

    for pid, rank in ((10, 0), (11, 1)):
        take("script", pid, -1)
        take("step", pid, rank, step=4)
        take("step", pid, rank, step=5)
    take("committed", 10, 0, step=5)
    take("script", 20, 0)
    take("step", 11, 1, step=6)

    assert watch.pids[0] == 20 and watch.pids[1] == 11
    assert (watch.lives[10].first_step, watch.lives[10].last_step, watch.lives[10].committed) == (4, 5, 5)
    assert watch.lives[11].last_step == 6 and watch.lives[20].first_step == 0


def test_notes_replies_and_disconnects_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with Inbox(tmp_path / "socket") as inbox:
        wire = Wire(str(inbox.path))
        wire.send("ready", step=random.randint(1, 9))
        note = inbox.next(10.0)
        assert note is not None and (note.moment, note.rank) == ("ready", 3)
        note.wire.send({"steps": 2})
        assert wire.receive() == {"steps": 2}
        wire.close()
        gone = inbox.next(10.0)
        assert gone is not None and (gone.moment, gone.rank) == ("disconnected", 3)
        assert inbox.next(0.0) is None
