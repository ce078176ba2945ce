"""What became of a fault is read from the divergences of the ledger, and the tables say which target is met."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.audit import KINDS, Audit, outcome_of, random_flips, random_wrongs


def event(step: int, wrong: int, consequence: str) -> dict[str, Any]:
    return {"step": step, "wrong": [wrong], "consequence": consequence}


def test_a_flip_is_found_once_at_its_version() -> None:
    [flip] = random_flips(1, {"w": 7}, random.Random(3))
    right = event(flip.step, int(flip.rank), "go_back")
    assert outcome_of(flip, [right]).items() >= {"found": True, "named": True}.items()
    for other in ([], [right | {"step": flip.step + 1}], [right, right], [right | {"wrong": [9]}]):
        assert not outcome_of(flip, other)["named"]


def test_a_wrong_rank_is_found_in_the_next_check_and_replaced_at_once() -> None:
    for wrong in random_wrongs(9, random.Random(3)):
        rank, due = int(wrong.rank), wrong.step - 1 + (wrong.step - 1) % 2
        events = [event(due - 7, rank, "go_back"), event(due, rank, "go_back"), event(due - 2, rank, "replace")]
        assert outcome_of(wrong, events).items() >= {"found": True, "named": True}.items()
        assert not outcome_of(wrong, events[:1])["found"]
        assert not outcome_of(wrong, events[:2])["named"]


def test_a_row_for_each_kind_of_fault_with_target_and_result() -> None:
    outcomes = [{"kind": kind, "found": True, "named": kind != "wrong"} for kind in (*KINDS, "wrong")]
    facts = {"unexpected": 0, "differing_steps": 0, "steps": 9, "rewind_s": [0.1]}
    (table,) = Audit().tables({"faults": outcomes, **facts})
    assert [row[-1] for row in table.rows] == [*["100.0%: met"] * 4, "0.0%: missed"]
