"""Checkpoint files are rolled back with the run, and end up as in an uninterrupted run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_ckptless.ledger import Ledger
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.outputs.checkpoint_files import CheckpointFiles, removes_by_path, settle_run
from lightning_ckptless.trainer.reporting.rank_ledger import RankLedger


def after_validation(step: int) -> Version:
    return Version(step, validation_done=True)


def ledger_in(folder: Path) -> RankLedger:
    """The ledger in a folder, as rank 0 writes to it."""
    return RankLedger(Ledger(folder / "ledger.jsonl"), lambda: 0, lambda: 1)


@dataclass
class Program:
    """Writes and removes files step by step, with the names that `ModelCheckpoint` would choose.

    Args:
        folder: folder of the files; the ledger is stored beside it.
        script: letters of the files to write in each step; a capital letter removes the file.
        fit: fit index.
    """

    folder: Path
    script: list[str]
    fit: int = 0
    said: list[str] = field(default_factory=list)
    last: dict[int, dict[str, str]] = field(default_factory=lambda: {0: {}})
    names: dict[int, set[str]] = field(default_factory=lambda: {0: set()})

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.start()

    def start(self) -> None:
        """Start over in a new process."""
        self.files = CheckpointFiles(ledger_in(self.folder.parent), self.fit, self.said.append)

    def operations(self, step: int) -> Iterator[None]:
        """Run a step; pauses before each operation and at its end."""
        after, last = after_validation(step - 1), dict(self.last[step - 1])
        for letter in self.script[step - 1]:
            yield
            if letter.islower():
                path = self._free_path(letter, last.get(letter))
                self.files.saving(path, after)
                yield
                Path(path).write_text(f"{self.fit}: {step}")
                last[letter] = path
            elif (known := last.pop(letter.lower(), None)) and not self.files.removing(known, after):
                Path(known).unlink(missing_ok=True)
        yield
        self.last[step], self.names[step] = last, self.visible()

    def _free_path(self, letter: str, own: str | None) -> str:
        path, number = str(self.folder / f"{letter}.ckpt"), 0
        while os.path.exists(path) and path != own:
            number += 1
            path = str(self.folder / f"{letter}-v{number}.ckpt")
        return path

    def run(self, first: int = 1) -> None:
        """Run to the end; a step is committed when the next one has been run."""
        for step in range(first, len(self.script) + 1):
            for _ in self.operations(step):
                pass
            self.settle(after_validation(step - 1))
        self.files.close()

    def settle(self, committed: Version) -> None:
        """Note a committed version, in a run that keeps no history."""
        self.files.settle(committed, committed)

    def visible(self) -> set[str]:
        """Names of the files that are not hidden."""
        return {path.name for path in self.folder.iterdir() if not path.name.startswith(".")}

    def listing(self) -> dict[str, str]:
        """What a user finds, hidden files included."""
        return {path.name: path.read_text() for path in sorted(self.folder.iterdir())}


SCRIPTS = st.lists(st.text("abAB", max_size=3), min_size=1, max_size=5)


@settings(deadline=None, max_examples=200)
@given(script=SCRIPTS, data=st.data())
def test_an_interrupted_run_leaves_the_files_of_an_uninterrupted_one(script: list[str], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        plain = Program(Path(root, "plain"), script)
        plain.run()
        disturbed = Program(Path(root, "disturbed"), script)
        at, committed = 1, 0
        for _ in range(data.draw(st.integers(0, 4), "faults")):
            fault = data.draw(st.integers(at, len(script)), "fault")
            for step in range(at, fault):
                for _ in disturbed.operations(step):
                    pass
                disturbed.settle(after_validation(step - 1))
            pauses = disturbed.operations(fault)
            for _ in range(data.draw(st.integers(0, 6), "operations")):
                next(pauses, None)
            committed = max(committed, fault - 2)
            back = data.draw(st.integers(committed, fault - 1), "back to")
            if data.draw(st.booleans(), "in a new process"):
                disturbed.start()
            disturbed.files.roll_back(after_validation(back))
            assert disturbed.visible() == plain.names[back]
            at, committed = back + 1, back
        disturbed.run(at)
        assert disturbed.listing() == plain.listing()


def test_a_second_rollback_past_a_removal_leaves_no_copy_of_the_first(tmp_path: Path) -> None:
    program = Program(tmp_path / "files", ["", "", "a", "A", ""])
    for step in (1, 2, 3):
        list(program.operations(step))
    program.files.roll_back(after_validation(2))
    for step in (3, 4):
        list(program.operations(step))
    program.files.roll_back(after_validation(3))
    assert program.listing() == {"a.ckpt": "0: 3"}
    program.run(4)
    assert program.listing() == {}


def test_each_removal_of_a_name_is_held_separately(tmp_path: Path) -> None:
    program = Program(tmp_path / "files", ["a", "Aa", "A", ""])
    for step in (1, 2, 3):
        list(program.operations(step))
    program.files.roll_back(after_validation(2))
    assert program.listing() == {"a.ckpt": "0: 2"}
    program.run(3)
    assert program.listing() == {}


def test_the_message_says_what_was_set_aside_and_why(tmp_path: Path) -> None:
    program = Program(tmp_path / "files", ["", "a", ""])
    for step in (1, 2):
        list(program.operations(step))
    program.files.roll_back(after_validation(1))
    (text,) = program.said
    assert text == (
        f"set {tmp_path}/files/a.ckpt aside: it was written after step 1, to which the run rolls back; the replay "
        "writes it again"
    )
    assert list(program.listing()) == [".a.ckpt.ckptless-aside-0"]
    program.run(2)
    assert program.listing() == {"a.ckpt": "0: 2"}


def test_a_file_that_the_replay_does_not_rewrite_is_restored(tmp_path: Path) -> None:
    program = Program(tmp_path / "files", ["a", "", ""])
    list(program.operations(1))
    program.files.roll_back(after_validation(0))
    program.script[0] = ""
    program.run()
    assert program.listing() == {"a.ckpt": "0: 1"}


def test_a_removed_file_is_held_until_its_removal_is_committed(tmp_path: Path) -> None:
    program = Program(tmp_path / "files", ["a", "A", ""])
    for step in (1, 2):
        list(program.operations(step))
    assert list(program.listing()) == [".a.ckpt.ckptless-removed-0-1-1"]
    program.settle(after_validation(1))
    assert list(program.listing()) == [".a.ckpt.ckptless-removed-0-1-1"]
    program.settle(after_validation(2))
    assert program.listing() == {}


def test_no_fit_touches_the_files_of_another(tmp_path: Path) -> None:
    first = Program(tmp_path / "files", ["", "", "a"])
    first.run()
    second = Program(tmp_path / "files", ["", "b", ""], fit=1)
    list(second.operations(1))
    second.files.roll_back(after_validation(0))
    assert first.listing() == {"a.ckpt": "0: 3"}


def test_a_repeated_fit_keeps_its_files_as_a_later_fit_left_them(tmp_path: Path) -> None:
    first = Program(tmp_path / "files", ["a", "b", "A"])
    first.run()
    second = Program(tmp_path / "files", ["ab", "", ""], fit=1)
    second.last[0] = {"b": str(tmp_path / "files" / "b.ckpt")}
    list(second.operations(1))
    assert second.listing() == {"a.ckpt": "1: 1", "b.ckpt": "1: 1"}
    first.start()
    first.files.roll_back(after_validation(1))
    first.run(2)
    assert second.listing() == {"a.ckpt": "1: 1", "b.ckpt": "1: 1"}


def test_no_copy_is_left_at_the_end_of_the_run(tmp_path: Path) -> None:
    program = Program(tmp_path / "files", ["a", "bA", ""])
    for step in (1, 2):
        list(program.operations(step))
    program.files.roll_back(after_validation(1))
    list(program.operations(2))
    program.files.roll_back(after_validation(1))
    assert program.listing() == {"a.ckpt": "0: 1", ".b.ckpt.ckptless-aside-0": "0: 2"}
    settle_run(tmp_path / "ledger.jsonl")
    assert program.listing() == {"a.ckpt": "0: 1", "b.ckpt": "0: 2"}


def test_folders_of_sharded_models_are_moved_like_files(tmp_path: Path) -> None:
    folder = tmp_path / "step=1.ckpt"
    files = CheckpointFiles(ledger_in(tmp_path), 0, print)

    def write(*names: str) -> None:
        files.saving(str(folder), after_validation(0))
        folder.mkdir()
        for name in names:
            (folder / name).write_text("shard")

    write(".metadata", "meta.pt")
    files.roll_back(after_validation(0))
    assert not folder.exists()
    # The next write is interrupted: the complete copy wins.
    write(".metadata")
    files.close()
    assert sorted(path.name for path in folder.iterdir()) == [".metadata", "meta.pt"]
    assert {path.name for path in tmp_path.iterdir()} == {"ledger.jsonl", "step=1.ckpt"}


def test_remote_files_are_left_alone_and_reported(tmp_path: Path) -> None:
    said: list[str] = []
    files = CheckpointFiles(ledger_in(tmp_path), 0, said.append)
    files.saving("s3://bucket/a.ckpt", after_validation(4))
    assert not files.removing("s3://bucket/a.ckpt", after_validation(4))
    files.roll_back(after_validation(4))
    (text,) = said
    assert text == (
        "s3://bucket/a.ckpt written after step 4 cannot be set aside, because the storage is not a local file system: "
        "the replay may write a second file with -v1 in its name"
    )


def test_the_longest_name_has_room_for_its_copy(tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 250}.ckpt"
    files = CheckpointFiles(ledger_in(tmp_path), 0, print)
    files.saving(str(path), after_validation(0))
    path.touch()
    files.roll_back(after_validation(0))
    assert not path.exists()
    files.close()
    assert path.exists()


def test_a_relative_path_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = CheckpointFiles(ledger_in(tmp_path), 0, print)
    monkeypatch.chdir(tmp_path)
    files.saving("a.ckpt", after_validation(0))
    Path("a.ckpt").touch()
    monkeypatch.chdir("/")
    files.roll_back(after_validation(0))
    assert not (tmp_path / "a.ckpt").exists()


def test_plugins_with_their_own_removal_are_not_intercepted() -> None:
    class Sidecars(TorchCheckpointIO):
        def remove_checkpoint(self, path: object) -> None:
            """Not the path alone."""

    assert removes_by_path(TorchCheckpointIO())
    assert not removes_by_path(Sidecars())
    assert not removes_by_path(AsyncCheckpointIO(Sidecars()))
