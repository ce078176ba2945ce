"""The ledger: complete lines, concurrent writers, and failures that never stop a run."""

from __future__ import annotations

import json
import logging
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.ledger import Event, Events, Ledger, read_ledger, run_folder
from tests.limits import files_at_most


def test_events_are_read_as_they_were_recorded(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first" / "ledger.jsonl"
    ledger = Ledger(path, clock=count(100.0).__next__)
    assert not path.parent.exists()
    ledger.record("began", world_size=2)
    ledger.record("moved", generation=2, rank=0, phases={"detect_s": 0.5}, folder=tmp_path)
    assert list(read_ledger(path)) == [
        Event("began", 100.0, None, None, {"world_size": 2}),
        Event("moved", 101.0, 2, 0, {"phases": {"detect_s": 0.5}, "folder": str(tmp_path)}),
    ]


def test_an_event_is_one_flat_json_object_per_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, clock=lambda: 1.5).record("fault", rank=1, cause="line\nbreak")
    (line,) = path.read_text().splitlines()
    fields = {"event": "fault", "at": 1.5, "generation": None, "rank": 1, "cause": "line\nbreak"}
    assert json.loads(line) == {**fields, "format": 2, "crc": "1d90dfa4"}


def test_lines_of_concurrent_writers_do_not_interleave(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledgers = [Ledger(path) for _ in range(4)]

    def write(writer: int) -> None:
        for number in range(50):
            ledgers[writer].record("counted", rank=writer, number=number, text="x" * 500)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = read_ledger(path)
    assert read.skipped_lines == 0
    assert sorted((e.rank, e.fields["number"]) for e in read) == [(w, n) for w in range(4) for n in range(50)]


def test_a_full_disk_is_reported_once_and_raises_no_error(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger("/dev/full")
    with caplog.at_level(logging.WARNING):
        ledger.record("began")
        ledger.record("ended")
    (message,) = caplog.messages
    assert message.startswith("/dev/full: cannot write, later events will be missing")
    assert "No space left on device" in message


def test_a_folder_that_cannot_be_created_raises_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    Ledger(tmp_path / "file" / "ledger.jsonl").record("began")
    assert len(caplog.messages) == 1


def test_a_line_truncated_by_a_full_disk_does_not_damage_others(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    with files_at_most(150):
        ledger.record("first")
        ledger.record("cut", text="x" * 200)
    assert path.stat().st_size == 150
    ledger.record("last")
    read = read_ledger(path)
    assert [event.event for event in read] == ["first", "last"]
    assert read.skipped_lines == 1


@pytest.mark.parametrize("torn", [b'{"event": "fault", "at"', b"\xff\xfe", b"[1, 2]", b"7", b'{"event": "fault"}'])
def test_lines_that_are_not_events_are_skipped_and_counted(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record("began")
    with path.open("ab") as file:
        file.write(torn)
    read = read_ledger(path)
    assert [event.event for event in read] == ["began"]
    assert (len(read), read.skipped_lines) == (1, 1)


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        ("committed", {"step": -1}),
        ("run_started", {"world_size": 2}),
        ("workers_spawned", {"pids": {"0": 12}}),
        ("checkpoint", {"action": "save", "fit": 0, "path": 7}),
    ],
)
def test_an_event_that_lacks_a_required_field_is_skipped(tmp_path: Path, event: str, fields: dict[str, Any]) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record(event, **fields)
    assert (len(read_ledger(path)), read_ledger(path).skipped_lines) == (0, 1)


def test_a_changed_digit_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record("committed", step=10)
    path.write_bytes(path.read_bytes().replace(b'"step": 10', b'"step": 18'))
    assert (len(read_ledger(path)), read_ledger(path).skipped_lines) == (0, 1)


def test_a_missing_ledger_is_empty(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / "ledger.jsonl") == Events(())


def test_a_run_has_its_own_folder() -> None:
    assert run_folder("runs", "digits-1") == Path("runs/digits-1")


@pytest.mark.parametrize("run_id", ["", ".", "..", "a/b", "/a", "a\0"])
def test_a_run_id_outside_of_the_root_is_refused(run_id: str) -> None:
    with pytest.raises(OptionsError, match="expected the name of a single folder in 'runs'"):
        run_folder("runs", run_id)
