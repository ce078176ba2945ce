"""The folder of durable states: other folders are refused, and incomplete states are invisible."""

from __future__ import annotations

import json
import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest

from lightning_ckptless.durable.capture import Captured
from lightning_ckptless.durable.folder import DurableFolder, Manifest, write_manifest
from lightning_ckptless.durable.parts import Parts
from lightning_ckptless.errors import DurableError, OptionsError
from lightning_ckptless.protocol.durable_schedule import FOLDER_MARKER
from lightning_ckptless.protocol.versions import Version
from tests.durable.conftest import manifest_of
from tests.outsider import call_as_another_user, needs_another_user, open_to_all

FIRST, SECOND = Version(10, True), Version(20, False)


def folder_with(path: Path, manifest: Manifest, *versions: Version) -> DurableFolder:
    folder = DurableFolder(path)
    folder.prepare()
    for version in versions:
        part = folder.begin(version)
        write_manifest(part, of_version(manifest, version))
        folder.complete(part, version)
    return folder


def of_version(manifest: Manifest, version: Version) -> Manifest:
    return replace(manifest, snapshot=replace(manifest.snapshot, version=version))


def test_a_missing_folder_is_created_and_marked(tmp_path: Path) -> None:
    folder = DurableFolder(tmp_path / "a" / "b")
    folder.require_ours()
    assert not folder.path.exists()
    folder.prepare()
    folder.prepare()
    assert [path.name for path in folder.path.iterdir()] == [FOLDER_MARKER]
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.states() == []


def test_the_writers_of_several_nodes_prepare_a_folder_at_the_same_time(tmp_path: Path) -> None:
    writers, rounds = 8, 20
    together = Barrier(writers)

    def prepare(number: int) -> None:
        folder = DurableFolder(tmp_path / str(number))
        together.wait()
        folder.prepare()
        folder.require_ours()

    with ThreadPoolExecutor(writers) as pool:
        for number in range(rounds):
            list(pool.map(prepare, [number] * writers))
    found = [sorted(path.name for path in folder.iterdir()) for folder in tmp_path.iterdir()]
    assert found == [[FOLDER_MARKER]] * rounds


def test_a_folder_can_be_prepared_after_the_disk_was_full(tmp_path: Path) -> None:
    """A small file system takes the entry of the marker but not its bytes."""
    folder = DurableFolder(tmp_path / "durable")
    folder.path.mkdir(mode=0o700)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            folder.prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    folder.prepare()
    folder.require_ours()
    assert [path.name for path in folder.path.iterdir()] == [FOLDER_MARKER]
    (folder.path / FOLDER_MARKER).write_bytes(b"")
    folder.prepare()
    with folder.locked() as is_locked:
        assert is_locked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"thesis.tex": ""}, "not a folder of durable states: it has thesis.tex and no ckptless-durable.json"),
        ({"a": "", "b": "", "c": "", "d": ""}, "a, b, c and more"),
        ({FOLDER_MARKER: json.dumps({"format": 99})}, "of format 99, expected 5"),
        ({FOLDER_MARKER: "no json"}, "cannot be read"),
    ],
)
def test_other_folders_are_refused(content: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(OptionsError, match=message):
        DurableFolder(tmp_path).require_ours()
    assert {path.name for path in tmp_path.iterdir()} == set(content)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionsError, match="is not a folder"):
        DurableFolder(tmp_path / "file").prepare()


def test_a_state_is_visible_when_it_is_complete(captured: Captured, tmp_path: Path) -> None:
    folder = DurableFolder(tmp_path / "durable")
    folder.prepare()
    part = folder.begin(FIRST)
    manifest = of_version(manifest_of(captured), FIRST)
    write_manifest(part, manifest)
    assert folder.states() == [] and folder.versions() == ()
    path = folder.complete(part, FIRST)
    assert folder.versions() == (FIRST,)
    assert folder.states() == [(path, manifest)]
    folder.drop(FIRST)
    assert folder.states() == []


def test_a_state_replaces_one_of_the_same_version(captured: Captured, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "durable", manifest_of(captured), FIRST)
    (folder.path / "step-0000000010" / "old").write_text("")
    part = folder.begin(FIRST)
    write_manifest(part, manifest_of(captured))
    assert [path.name for path in folder.complete(part, FIRST).iterdir()] == ["state.json"]


def test_the_files_of_a_killed_writer_are_removed(captured: Captured, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "durable", manifest_of(captured), FIRST)
    (folder.begin(SECOND) / "half").write_text("")
    (folder.path / "mine.part").write_text("")
    assert folder.versions() == (FIRST,)
    folder.remove_leftovers()
    names = sorted(path.name for path in folder.path.iterdir())
    assert names == [FOLDER_MARKER, "mine.part", "step-0000000010"]


def test_only_one_writer_can_hold_the_lock(tmp_path: Path) -> None:
    folder = DurableFolder(tmp_path / "durable")
    folder.prepare()
    with folder.locked() as first, folder.locked() as second:
        assert (first, second) == (True, False)
    with folder.locked() as again:
        assert again


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 1}', '{"format": 1, "snapshot": 3}'])
def test_a_state_with_an_unreadable_manifest_is_skipped(text: str, captured: Captured, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "durable", manifest_of(captured), FIRST, SECOND)
    (folder.path / "step-0000000010" / "state.json").write_text(text)
    assert [path.name for path, _ in folder.states()] == ["step-0000000020-before-validation"]
    with pytest.raises(DurableError):
        Manifest.read(folder.path / "step-0000000010")
    (left_out,) = folder.left_out
    assert left_out == folder.path / "step-0000000010"


def test_a_manifest_must_match_the_folder_name(captured: Captured, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "durable", manifest_of(captured), FIRST)
    path = folder.path / "step-0000000010"
    write_manifest(path, of_version(manifest_of(captured), Version(18, True)))
    assert folder.states() == []
    with pytest.raises(DurableError, match="expected step 10, as in the folder name, found step 18"):
        Manifest.read(path)


def test_a_changed_step_in_a_manifest_is_detected(captured: Captured, tmp_path: Path) -> None:
    path = folder_with(tmp_path / "durable", manifest_of(captured), FIRST).path / "step-0000000010"
    manifest = path / "state.json"
    manifest.write_text(manifest.read_text().replace('"optimizer_step": 10', '"optimizer_step": 18'))
    with pytest.raises(DurableError, match="damaged: its digest does not match"):
        Manifest.read(path.rename(path.with_name("step-0000000018")))


# ------------------------------------------------------------------ other users

STATE = "step-0000000010"


@needs_another_user
@pytest.mark.parametrize("planted", ["folder", "link", "file"])
def test_a_state_planted_by_another_user_is_not_read(planted: str, captured: Captured, tmp_path: Path) -> None:
    """For example, a group member links to a malicious state in the folder."""
    durable = open_to_all(tmp_path / "durable")
    elsewhere = folder_with(tmp_path / "elsewhere", manifest_of(captured), FIRST).path / STATE

    def plant() -> None:
        if planted == "link":
            (durable / STATE).symlink_to(elsewhere)
        elif planted == "folder":
            (durable / STATE).mkdir()
        else:
            (durable / STATE / ".metadata").write_bytes(b"anything")

    if planted == "file":
        part = DurableFolder(durable).begin(FIRST)
        write_manifest(part, manifest_of(captured))
        part.rename(durable / STATE)
        (durable / STATE).chmod(0o777)
    call_as_another_user(plant)
    if planted == "file":
        (durable / STATE).chmod(0o700)
    with pytest.raises(DurableError, match=r"symbolic link|found one of user 65534"):
        Manifest.read(durable / STATE)
    assert DurableFolder(durable).states() == []
    with pytest.raises(OptionsError, match=r"is not safe.*chmod go-w"):
        DurableFolder(durable).require_ours()


@pytest.mark.parametrize("name", [".", "state.json"])
def test_a_state_writable_by_others_is_not_read(name: str, captured: Captured, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "durable", manifest_of(captured), FIRST)
    path = folder.path / STATE / name
    (folder.path / STATE).chmod(0o711)
    path.chmod(path.stat().st_mode | 0o020)
    with pytest.raises(DurableError, match=r"found mode 0\d\d\d.*chmod go-w"):
        Manifest.read(folder.path / STATE)
    path.chmod(path.stat().st_mode & ~0o020)
    assert len(folder.states()) == 1


def test_a_umask_with_group_write_is_accepted(captured: Captured, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        folder = folder_with(tmp_path / "durable", manifest_of(captured), FIRST)
    finally:
        os.umask(before)
    assert (folder.path / STATE / "state.json").stat().st_mode & 0o020
    folder.require_ours()
    assert len(folder.states()) == 1


def test_a_link_of_the_user_to_the_durable_folder_is_accepted(captured: Captured, tmp_path: Path) -> None:
    folder_with(tmp_path / "durable", manifest_of(captured), FIRST)
    (link := tmp_path / "link").symlink_to("durable")
    folder = DurableFolder(link)
    folder.prepare()
    assert len(folder.states()) == 1
    (tmp_path / "durable").chmod(0o777)
    with pytest.raises(OptionsError, match="is not safe"):
        folder.prepare()


@needs_another_user
def test_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    shared, own = open_to_all(tmp_path / "shared"), tmp_path / "own"
    own.mkdir(mode=0o700)
    call_as_another_user(lambda: (shared / "durable").symlink_to(own))
    with pytest.raises(OptionsError, match=r"is not safe.*symbolic link"):
        DurableFolder(shared / "durable").prepare()
    assert list(own.iterdir()) == []


@needs_another_user
def test_parts_planted_by_another_user_are_not_read(captured: Captured, tmp_path: Path) -> None:
    shared, elsewhere = open_to_all(tmp_path / "durable"), tmp_path / "elsewhere"
    parts, planted = Parts(shared, captured.snapshot), tmp_path / "elsewhere" / "part-0000.bin"
    elsewhere.mkdir(mode=0o700)
    planted.write_bytes(b"not even a part")
    call_as_another_user(lambda: parts.path.symlink_to(elsewhere))
    for touch in (parts.read, lambda: parts.write(captured.layout, {})):
        with pytest.raises((DurableError, PermissionError), match="symbolic link"):
            touch()
    assert list(elsewhere.iterdir()) == [planted]
