"""Each alarm has one condition, names its rank, and ends with its condition."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from lightning_ckptless.cli.survey import alarms
from lightning_ckptless.cli.survey.alarms import AlarmKind
from lightning_ckptless.cli.survey.reading import Reading
from lightning_ckptless.cli.survey.survey import survey_of
from lightning_ckptless.ledger import Event
from lightning_ckptless.protocol.hang_detection import Point
from tests.cli.survey.readings import ALL_COPIES, event, placed, reading, replica, worker

KILLED = {"signal_name": "SIGKILL", "kind": "killed", "node": "a", "pid": 11}


def shown(found: Reading) -> list[tuple[str, int | None]]:
    return [(alarm.kind, alarm.rank) for alarm in survey_of(found).alarms]


def test_nothing_is_wrong() -> None:
    assert shown(reading([placed()], workers=[worker(0), worker(1)])) == []


CASES: dict[AlarmKind, tuple[dict[str, Any], int | None, str]] = {
    AlarmKind.KILLED: ({"events": [event("fault", 1.0, 1, **KILLED)]}, 1, "rank 1 died by SIGKILL"),
    AlarmKind.EXITED: (
        {"events": [event("fault", 1.0, 0, kind="exited", exit_code=3)]},
        0,
        "rank 0 exited with code 3",
    ),
    AlarmKind.HUNG: (
        {"events": [event("fault", 1.0, 1, kind="hung", hung="lags at batch of step 8")]},
        1,
        "rank 1 hung: lags at batch of step 8",
    ),
    AlarmKind.LOST: ({"events": [event("fault", 1.0, None, kind="lost")]}, None, "the members of the run changed"),
    AlarmKind.RAISED: (
        {"events": [event("raised", 1.0, 1, cause="ValueError: x", final=False)]},
        1,
        "rank 1 raised ValueError: x",
    ),
    AlarmKind.NODE_LOST: (
        {"events": [event("node_lost", 1.0, None, node="a", reason="node 1 is silent for 4.0 s")]},
        None,
        "node 1 is silent for 4.0 s",
    ),
    AlarmKind.GONE: ({"states": {1: "Z"}}, 1, "the process of rank 1 (pid 11) has exited"),
    AlarmKind.STOPPED: ({"states": {0: "T"}}, 0, "a signal has stopped rank 0 (pid 10)"),
    AlarmKind.TRACED: ({"states": {0: "t"}}, 0, "a debugger holds rank 0 (pid 10)"),
    AlarmKind.BEHIND: (
        {"workers": [worker(0, silent_s=1.0), worker(1, point=Point.BATCH, silent_s=1.2)]},
        1,
        "the other ranks wait for rank 1, which is at batch of step 8 for 1.2 s",
    ),
    AlarmKind.STRAGGLER: (
        {"workers": [worker(0), worker(1, own_s=0.2)]},
        1,
        "rank 1 takes 200.0 ms per step, 4.0x the median of the others",
    ),
    AlarmKind.AGENT_EXITED: (
        {"dead_agents": ["b"], "states": {1: "X"}, "hosted": ["b"]},
        None,
        "the agent of node b (pid 61) has exited, and its workers end with it",
    ),
    AlarmKind.UNCOVERED: (
        {"copies": [replica(0, 0), replica(1, 1), replica(1, 0)]},
        None,
        "not every node may be lost: a holds the only copy of a shard; newest version step 7, 0.2 s old",
    ),
    AlarmKind.DISK_FULL: ({"free_bytes": 0}, None, "/runs/run: the disk is full"),
    AlarmKind.LEDGER_STALE: ({"events": [event("committed", 30.0, 0, step=1)]}, None, "no version for 30 s"),
    AlarmKind.DURABLE_FAILED: (
        {"events": [event("durable_failed", 1.0, 0, step=40, cause="no space left")]},
        None,
        "the durable state of step 40 could not be written: no space left",
    ),
    AlarmKind.STANDBYS: ({"events": [event("standbys", 1.0, ready=0, wanted=2)]}, None, "0 of 2 standbys are ready"),
}


def test_every_kind_has_a_case() -> None:
    assert set(CASES) == set(AlarmKind)


@pytest.mark.parametrize("kind", CASES)
def test_an_alarm(kind: AlarmKind) -> None:
    facts, rank, words = CASES[kind]
    facts = {**facts, "events": [placed(), *facts.get("events", ())]}
    (alarm,) = survey_of(reading(**facts)).alarms
    assert (alarm.kind, alarm.rank) == (kind, rank)
    assert words in alarm.text


def test_a_worker_that_has_left_without_a_word() -> None:
    left = event("fault", 1.0, 0, kind="killed", exit_code=None, signal_name=None)
    (alarm,) = survey_of(reading([placed(), left])).alarms
    assert (alarm.kind, alarm.rank) == ("gone", 0)
    assert alarm.text == "rank 0 has left, and its agent does not know its exit code"


@pytest.mark.parametrize("later", ["committed", "recovery"])
def test_a_fault_is_over_once_a_step_is_committed(later: str) -> None:
    phases = {"detect_s": 0.1}
    facts: dict[str, Any] = {"step": 9} if later == "committed" else {"phases": phases, "total_s": 0.1}
    fault = event("fault", 2.0, 1, **KILLED)
    found = survey_of(reading([placed(), fault, event(later, 1.0, 0, **facts)]))
    assert found.alarms == ()
    assert [(one.kind, one.rank, one.is_over) for one in found.faults] == [("killed", 1, True)]


def test_ranks_that_wait_at_the_same_point_cause_no_alarm() -> None:
    together = [worker(rank, point=Point.VALIDATION, silent_s=20.0) for rank in (0, 1)]
    assert shown(reading([placed()], workers=together)) == []


def test_a_rank_is_not_behind_within_its_usual_pauses() -> None:
    paused = [worker(0, silent_s=1.5, longest_pause_s=1.0), worker(1, point=Point.BATCH, silent_s=1.6)]
    assert shown(reading([placed()], workers=paused)) == []


def test_short_steps_differ_by_chance() -> None:
    assert shown(reading([placed()], workers=[worker(0, own_s=0.001), worker(1, own_s=0.004)])) == []


def test_a_run_that_has_ended_has_no_alarms() -> None:
    ended: list[Event] = [placed(), event("fault", 9.0, 1, **KILLED), event("run_ended", 1.0, 0)]
    found = survey_of(reading(ended, copies=(), dead_agents=["a", "b"], states={0: "X", 1: "X"}, hosted=()))
    assert (found.state, found.alarms) == ("ended", ())


def test_all_that_is_wrong_is_shown() -> None:
    run = reading([placed()], states={0: "T"}, free_bytes=0, copies=ALL_COPIES[:2])
    assert {kind for kind, _ in shown(run)} >= {"stopped", "disk_full"}


def test_the_table_of_alarms_is_complete() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", inspect.getdoc(alarms) or "", re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(AlarmKind)
