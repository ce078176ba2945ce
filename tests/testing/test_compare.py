"""Comparison of hand-written traces and log files: differences are found, named and ordered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless.ledger import LEDGER_NAME, Ledger
from lightning_ckptless.testing.compare import LOG_ROWS, compare, compare_traces
from lightning_ckptless.testing.trace_reader import Point, read_trace

Row = dict[str, Any]


def batch(step: int, generation: int = 1, **facts: str) -> Row:
    digests = {"parameters": f"p{step}", "torch_rng": f"r{step}"} | facts
    where = {"kind": "batch", "fit": 0, "epoch": 0, "batch": step - 1, "step": step}
    return {**where, "generation": generation, "at": float(step), "digests": digests, "values": {"loss": "0.5"}}


def end(step: int, generation: int = 1, **facts: str) -> Row:
    return {**batch(step, generation, **facts), "kind": "end", "batch": -1}


def begin(generation: int = 1, log_dir: str = "/logs/version_0") -> Row:
    loggers = [{"kind": "CSVLogger", "log_dir": log_dir}]
    return {"kind": "begin", "fit": 0, "generation": generation, "epoch": 0, "step": 0, "at": 0.0, "loggers": loggers}


def write(folder: Path, *ranks: Sequence[Row]) -> Path:
    folder.mkdir(parents=True)
    for rank, rows in enumerate(ranks):
        (folder / f"trace-rank{rank}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(steps: int = 4) -> list[Row]:
    return [begin(), *(batch(step) for step in range(1, steps + 1)), end(steps)]


def test_equal_traces_are_identical(tmp_path: Path) -> None:
    verdict = compare_traces(write(tmp_path / "a", run(), run()), write(tmp_path / "b", run(), run()))
    assert verdict.identical
    assert verdict.first is None
    assert (verdict.ranks, verdict.points, verdict.repeated) == (2, 10, 0)
    assert "identical" in str(verdict)


def test_replayed_steps_are_counted_and_agree(tmp_path: Path) -> None:
    again = [begin(), batch(1), batch(2), begin(2), batch(2, 2), batch(3, 2), batch(4, 2), end(4, 2)]
    verdict = compare_traces(write(tmp_path / "a", run()), write(tmp_path / "b", again))
    assert verdict.identical
    assert verdict.repeated == 1


def test_an_earlier_attempt_that_differs_is_found(tmp_path: Path) -> None:
    """Even if the last attempt is correct: the state at the fault was wrong."""
    first = [begin(), batch(1), batch(2, parameters="other"), batch(3)]
    again = [*first, batch(2, 2), batch(3, 2), batch(4, 2), end(4, 2)]
    verdict = compare_traces(write(tmp_path / "a", run()), write(tmp_path / "b", again))
    assert not verdict.identical
    assert verdict.first is not None
    assert "attempt of generation 1" in verdict.first.where
    assert (verdict.first.expected, verdict.first.found) == ("p2", "other")


@pytest.mark.parametrize(("consequence", "identical"), [("go_back", True), ("send", False)])
def test_steps_discarded_because_replicas_differed_may_differ(
    tmp_path: Path, consequence: str, identical: bool
) -> None:
    rows = [begin(), batch(1), batch(2, parameters="flipped"), batch(3, parameters="too"), batch(3)]
    again = [*rows, batch(2, 2), batch(3, 2), batch(4, 2), end(4, 2)]
    write(tmp_path / "a" / "trace", run())
    write(tmp_path / "b" / "trace", again)
    Ledger(tmp_path / "b" / "runs" / "run" / LEDGER_NAME).record(
        "divergence", generation=1, step=2, committed=1, wrong=[], consequence=consequence
    )
    assert compare(tmp_path / "a", tmp_path / "b").identical is identical


def test_the_step_in_flight_at_a_fault_may_differ(tmp_path: Path) -> None:
    """A device may end a collective with a lost rank without an error; the result is rolled back."""
    again = [begin(), batch(1), batch(2, gradients="cut"), batch(2, 2), batch(3, 2), batch(4, 2), end(4, 2)]
    assert compare_traces(write(tmp_path / "a", run()), write(tmp_path / "b", again)).identical


def test_the_last_attempt_is_compared_with_the_reference(tmp_path: Path) -> None:
    again = [begin(), batch(1), batch(2), batch(2, 2, parameters="other"), batch(3, 2), batch(4, 2), end(4, 2)]
    verdict = compare_traces(write(tmp_path / "a", run()), write(tmp_path / "b", again))
    assert verdict.first is not None
    assert verdict.first.where == "rank 0, step 2, batch 1 of epoch 0"
    assert verdict.first.field == "parameters"


def test_the_earliest_difference_of_all_ranks_comes_first(tmp_path: Path) -> None:
    late, early = run(), run()
    late[4] = batch(4, torch_rng="late")
    early[2] = batch(2, torch_rng="early")
    verdict = compare_traces(write(tmp_path / "a", run(), run()), write(tmp_path / "b", late, early))
    assert [(d.rank, d.step, d.found) for d in verdict.differences] == [(1, 2, "early"), (0, 4, "late")]


def test_missing_and_unexpected_points_are_found(tmp_path: Path) -> None:
    lost = [*run()[:3], *run()[4:]]
    more = [*run()[:5], batch(5), *run()[5:]]
    right = write(tmp_path / "a", run())
    missing = compare_traces(right, write(tmp_path / "b", lost)).first
    assert missing is not None
    assert (missing.step, missing.found) == (3, "nothing")
    extra = compare_traces(right, write(tmp_path / "c", more)).first
    assert extra is not None
    assert (extra.step, extra.expected) == (5, "nothing")


def test_a_missing_field_and_a_missing_rank_are_found(tmp_path: Path) -> None:
    right = write(tmp_path / "a", run(), run())
    less = run()
    del less[1]["values"]["loss"]
    first = compare_traces(right, write(tmp_path / "b", less, run())).first
    assert first is not None
    assert (first.field, first.expected, first.found) == ("loss", "0.5", "nothing")
    assert not compare_traces(right, write(tmp_path / "c", run())).identical


def test_empty_traces_are_not_identical(tmp_path: Path) -> None:
    verdict = compare_traces(write(tmp_path / "a"), write(tmp_path / "b"))
    assert not verdict.identical
    assert "nothing to compare" in str(verdict)


def test_a_torn_line_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "trace-rank0.jsonl"
    path.write_text(f'{json.dumps(batch(1))}\n{{"kind": "bat\n{json.dumps(batch(1, 2))}\n')
    trace = read_trace(path, 0)
    assert trace.torn_lines == 1
    assert [line.generation for line in trace.attempts()[Point(0, "batch", 0, 1, 0)]] == [1, 2]


def rows(text: str) -> Iterator[str]:
    yield "step,loss,ckptless/goodput"
    yield from text.split()


def finished(folder: Path, csv_rows: str, *, folders: int = 1, checkpoints: str = "last.ckpt\n") -> Path:
    write(folder / "trace", run())
    logs = folder / "logs"
    (logs / "0").mkdir(parents=True)
    (logs / "folders.txt").write_text(f"{folders}\n")
    (logs / "0" / "checkpoints.txt").write_text(checkpoints)
    (logs / "0" / "metrics.csv").write_text("\n".join(rows(csv_rows)) + "\n")
    return folder


def test_our_own_log_values_are_not_compared(tmp_path: Path) -> None:
    a = finished(tmp_path / "a", "0,0.5,0.9 1,0.4, 2,0.3,")
    b = finished(tmp_path / "b", "0,0.5,0.1 1,0.4,0.7 1,,0.8 2,0.3,")
    verdict = compare(a, b)
    assert verdict.identical, verdict
    assert verdict.rows == 3 + 2


def test_repeated_missing_and_moved_log_rows_are_found(tmp_path: Path) -> None:
    right = finished(tmp_path / "a", "0,0.5, 1,0.4, 2,0.3,")
    found = {
        name: compare(right, finished(tmp_path / name, text)).first
        for name, text in (
            ("twice", "0,0.5, 1,0.4, 1,0.4, 2,0.3,"),
            ("missing", "0,0.5, 2,0.3,"),
            ("moved", "1,0.4, 0,0.5, 2,0.3,"),
        )
    }
    twice, missing, moved = found.values()
    assert twice is not None and missing is not None and moved is not None
    assert (twice.step, twice.found) == (1, "twice")
    assert (missing.step, missing.found) == (1, "nothing")
    assert moved.where.endswith("row 0")
    assert (moved.expected, moved.found) == ("loss=0.5, step=0", "loss=0.4, step=1")


def test_every_missing_and_repeated_row_is_reported(tmp_path: Path) -> None:
    right = finished(tmp_path / "a", "0,0.5, 1,0.4, 2,0.3, 3,0.2,")
    verdict = compare(right, finished(tmp_path / "b", "0,0.5, 3,0.2, 3,0.2,"))
    assert [(d.step, d.expected, d.found) for d in verdict.by_field()[LOG_ROWS]] == [
        (1, "once", "nothing"),
        (2, "once", "nothing"),
        (3, "once", "twice"),
    ]


def test_a_column_that_differs_is_named_with_its_row(tmp_path: Path) -> None:
    right = finished(tmp_path / "a", "0,0.5, 1,0.4, 2,0.3,")
    (difference,) = compare(right, finished(tmp_path / "b", "0,0.5, 1,0.7, 2,0.3,")).differences
    assert (difference.field, difference.step) == ("loss", 1)
    assert (difference.expected, difference.found) == ("0.4", "0.7")
    assert difference.where.endswith("row of step 1")


def test_ignored_values_are_not_compared(tmp_path: Path) -> None:
    right = finished(tmp_path / "a", "0,0.5, 1,0.4,")
    other = finished(tmp_path / "b", "0,0.9, 1,0.8,")
    rows = run()
    rows[2]["digests"]["torch_rng"] = "other"
    (other / "trace" / "trace-rank0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(compare(right, other).by_field()) == {"loss", "torch_rng"}
    verdict = compare(right, other, ignore=["lo*", "*_rng", "unheard_of"])
    assert verdict.identical
    assert verdict.ignored == ("loss", "torch_rng")


def test_an_extra_log_folder_and_an_extra_checkpoint_file_are_found(tmp_path: Path) -> None:
    right = finished(tmp_path / "a", "0,0.5,")
    folders = compare(right, finished(tmp_path / "b", "0,0.5,", folders=2)).first
    files = compare(right, finished(tmp_path / "c", "0,0.5,", checkpoints="last.ckpt\nlast-v1.ckpt\n")).first
    assert folders is not None and folders.where == "log folders"
    assert files is not None and "last-v1.ckpt" in files.where
