"""What became of a fault is read from the divergences of the ledger, and the tables say which target is met."""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

from benchmarks.audit import KINDS, outcome_of_flip, outcome_of_wrong, random_flips, random_wrongs, tables


def event(step: int, wrong: int, consequence: str, *tensors: str) -> dict[str, Any]:
    return {"step": step, "wrong": [wrong], "consequence": consequence, "tensors": list(tensors)}


def test_a_flip_is_found_at_its_version_or_not_at_all() -> None:
    [flip] = random_flips(1, {"w": 7}, random.Random(3))
    right = event(flip.step, int(flip.rank), "go_back", f"{flip.tensor}[0:7]")
    assert outcome_of_flip(flip, [right]).items() >= {"found": True, "named": True, "located": True}.items()
    for other in ([], [right | {"step": flip.step + 1}], [right, right]):
        assert not outcome_of_flip(flip, other)["found"]


def test_a_wrong_rank_is_found_in_the_next_check_and_replaced_at_once() -> None:
    for wrong in random_wrongs(9, random.Random(3)):
        rank, due = int(wrong.rank), wrong.step - 1 + (wrong.step - 1) % 2
        events = [event(due - 7, rank, "go_back"), event(due, rank, "go_back"), event(due - 2, rank, "replace")]
        assert outcome_of_wrong(wrong, events).items() >= {"found": True, "named": True, "located": True}.items()
        assert not outcome_of_wrong(wrong, events[:1])["found"]
        assert not outcome_of_wrong(wrong, events[:2])["located"]


def test_a_row_for_each_kind_of_fault_with_target_and_result() -> None:
    outcomes = [{"kind": kind, "found": True, "named": kind != "wrong", "located": True} for kind in (*KINDS, "wrong")]
    facts = {
        "unexpected": 0,
        "differing_steps": 0,
        "steps": 9,
        "rewind_s": [0.1],
        "took_s": {"flip": 2.0, "wrong": 1.0},
    }
    (table,) = tables(Namespace(size="tiny"), {"faults": outcomes, **facts})
    assert [row[-1] for row in table.rows] == [*["100.0%: met"] * 4, "0.0%: missed"]
