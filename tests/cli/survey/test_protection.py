"""What is protected is one sentence, and follows from the copies that exist."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_ckptless.cli.survey.protection import protected_now
from lightning_ckptless.protocol.versions import SlotState
from tests.cli.survey.readings import ALL_COPIES, NODES, event, placed, reading, replica

CASES: dict[str, tuple[dict[str, Any], int | None, int | None, str]] = {
    "all copies": ({}, 1, 7, "any 1 node may be lost; newest version step 7, 0.2 s old"),
    "a newer version without copies": (
        {"copies": [*ALL_COPIES, replica(0, 0, 8, SlotState.STAGED), replica(1, 1, 8, SlotState.STAGED)]},
        1,
        7,
        "any 1 node may be lost; newest version step 7, 0.2 s old",
    ),
    "a copy is missing": (
        {"copies": [replica(0, 0), replica(1, 1), replica(1, 0)]},
        0,
        7,
        "not every node may be lost: a holds the only copy of a shard; newest version step 7, 0.2 s old",
    ),
    "no copies": (
        {"events": [placed(copies=0)], "copies": [replica(0, 0), replica(1, 1)]},
        0,
        7,
        "not every node may be lost: a or b holds the only copy of a shard; newest version step 7, 0.2 s old",
    ),
    "no version": (
        {"copies": [replica(0, 0)]},
        None,
        None,
        "nothing is protected in memory: no version is complete: shard 1 of 2 has no replica of step 7",
    ),
    "the other node without an agent": (
        {"dead_agents": ["b"]},
        0,
        7,
        "not every node may be lost: a holds the only copy of a shard; newest version step 7, 0.2 s old",
    ),
    "both without": ({"dead_agents": NODES}, 1, 7, "any 1 node may be lost; newest version step 7, 0.2 s old"),
    "another host": (
        {"events": [placed(), event("committed", 0.8, 0, step=6)], "hosted": ["a"]},
        1,
        6,
        "any 1 node may be lost, according to the ledger; committed step 6, 0.8 s ago",
    ),
    "another host that is lost": (
        {
            "events": [placed(), event("committed", 5.0, 0, step=6), event("node_lost", 1.0, reason="silent")],
            "hosted": ["a"],
        },
        None,
        None,
        "unknown: copies are on other hosts, and no version is committed yet",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_may_be_lost(name: str) -> None:
    facts, losses, step, text = CASES[name]
    found = protected_now(reading(**{"events": [placed()], **facts}))
    assert (found.losses, found.step, found.text) == (losses, step, text)


def test_before_the_first_version() -> None:
    assert protected_now(reading()).text == "nothing is protected yet: no version has been mirrored"


def test_a_single_node() -> None:
    alone = replace(replica(0, 0), world_size=1)
    found = reading([placed(copies=0, nodes=("a",))], copies=[alone], hosted=["a"])
    assert (
        protected_now(found).text == "any worker may be lost, the only node may not; newest version step 7, 0.2 s old"
    )
