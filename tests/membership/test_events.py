"""Each event of an agent is recorded, shown, or both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless.console import Console
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.events import (
    Event,
    EventSink,
    NodeLost,
    RecoveredInPlace,
    ReplacementFailed,
    StandbysChanged,
    StandbysRefused,
)

FAULT = FaultReport(1, 77, None, "SIGKILL", 1.0, 2.0, 3.0, 1, 4)


def reported(event: Event, capfd: pytest.CaptureFixture[str]) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """What is recorded and what is shown of an event."""
    recorded: list[tuple[str, dict[str, Any]]] = []
    EventSink(lambda name, **details: recorded.append((name, details)), Console()).report(event)
    return recorded, capfd.readouterr().err


def test_an_event_that_is_recorded_and_shown(capfd: pytest.CaptureFixture[str]) -> None:
    recorded, shown = reported(NodeLost("n0", [1], "node 1 is silent"), capfd)
    assert recorded == [("node_lost", {"node": "n0", "lost": [1], "reason": "node 1 is silent"})]
    assert shown == "ckptless: node 1 is silent; remaining nodes are re-rendezvousing\n"


def test_an_event_that_is_only_recorded(capfd: pytest.CaptureFixture[str]) -> None:
    assert reported(StandbysChanged(1, 2, [9]), capfd) == ([("standbys", {"ready": 1, "wanted": 2, "pids": [9]})], "")


def test_an_event_that_is_only_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert reported(StandbysRefused(OSError("full")), capfd) == ([], "ckptless: continuing without standbys: full\n")


@pytest.mark.parametrize(
    ("new", "how"),
    [
        ({1: (8, "standby"), 2: (9, "standby")}, "standby"),
        ({1: (8, "standby"), 2: (9, "new process")}, "rank 1: standby, rank 2: new process"),
    ],
)
def test_what_replaces_lost_ranks(new: dict[int, tuple[int, str]], how: str) -> None:
    event = RecoveredInPlace("n0", 3, "recovering in place", FAULT, new)
    assert event.sentence == f"rank 1 (pid 77) died by SIGKILL; recovering in place ({how})"
    assert event.details()["cause"] == str(FAULT)


def test_the_output_of_a_new_process_is_shown_once() -> None:
    path = Path("rank1-2.log")
    what = "a new process failed before it joined the other ranks; its output, in rank1-2.log"
    assert ReplacementFailed(path, ["a", "b"], 1).sentence == f"{what}:\n  a\n  b"
    assert ReplacementFailed(path, ["a", "b"], 3).sentence == f"{what}, is the same as above, 3 times so far"
