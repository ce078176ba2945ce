"""Lines are complete even if the writer of an earlier line died."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_ckptless.testing.trace import TraceFile


def test_lines_are_appended_over_generations(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trace.jsonl"
    for number in range(3):
        file = TraceFile(path)
        file.append({"number": number})
        file.close()
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_torn_line_does_not_damage_the_next(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"number": 0}\n{"numb')
    file = TraceFile(path)
    file.append({"number": 1})
    file.close()
    assert path.read_text() == '{"number": 0}\n{"numb\n{"number":1}\n'


def test_a_line_is_written_at_once(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    file = TraceFile(path)
    file.append({"number": 0})
    assert path.read_text() == '{"number":0}\n'
    file.close()
