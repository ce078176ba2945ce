"""The notes in an arena."""

from __future__ import annotations

import pytest

from lightning_ckptless.protocol.durable_schedule import Share
from lightning_ckptless.protocol.retry_policy import RecoveryHistory
from lightning_ckptless.protocol.run_counts import RunCounts
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_notes import ArenaNotes, RankFolders, RecoveryRecord


def test_every_note_is_read_as_it_was_written(arena: Arena) -> None:
    notes = ArenaNotes(
        generation=3,
        origin="",
        finished=True,
        committed=Version(7, False),
        recoveries=RecoveryRecord(RecoveryHistory(2, 1, (1.5, 2.0)), 6),
        counts=RunCounts(3, 2, 1, 7, 1.5),
        folders=(RankFolders("/a", "/b", (("ModelCheckpoint", None), ("SimpleProfiler", "/c"))),),
        logger_identities=[{"kind": "CSVLogger", "identity": {"_version": 3}}],
        durable_share=Share((0, 1), 4, leads=False, every_n_steps=12),
        reaper_agent=11,
        writer_agent=12,
        data_hooks={0: {"train": "AAAA", "validation": None}, 12: {}},
        raised={3: "ValueError after step 2"},
    )
    assert not {name for name, value in vars(notes).items() if value == vars(ArenaNotes())[name]}
    arena.write_notes(notes)
    assert arena.notes() == notes


def test_a_note_replaces_only_the_same_note(arena: Arena) -> None:
    arena.write_notes(ArenaNotes(generation=3, raised={1: "ValueError after step 2"}))
    arena.write_notes(ArenaNotes(generation=4, raised={0: "OSError after step 3"}))
    raised = {0: "OSError after step 3", 1: "ValueError after step 2"}
    assert arena.notes() == ArenaNotes(generation=4, raised=raised)


def test_notes_with_unknown_names_are_ignored() -> None:
    assert ArenaNotes.from_values({"of another release": [1, None], "generation": 2}) == ArenaNotes(generation=2)


def test_notes_of_several_arenas_are_merged() -> None:
    first = ArenaNotes(origin="", logger_identities=[], raised={0: "first"})
    second = ArenaNotes(origin="a.ckpt", finished=True, raised={1: "second"})
    assert ArenaNotes.merged([]) == ArenaNotes()
    assert ArenaNotes.merged([first, second]) == ArenaNotes(origin="a.ckpt", finished=True, raised={0: "first"})


def test_a_damaged_note_is_ignored(arena: Arena, caplog: pytest.LogCaptureFixture) -> None:
    arena.write_notes(ArenaNotes(generation=3, finished=True))
    path = arena.path / "note-generation.json"
    path.write_text(path.read_text().replace("3", "4"))
    assert arena.notes() == arena.notes() == ArenaNotes(finished=True)
    assert caplog.text.count("note-generation.json: ignoring a damaged note") == 1
