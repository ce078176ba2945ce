"""Files of anonymous memory behave like files for all processes of the user, and end with their holder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_ckptless.system.memory_files import is_memory_file, is_there, make_memory_file, open_file, stat_file

WRITER = "import sys; open(sys.argv[1], 'r+b').write(b'from another process')"


def _read(path: Path) -> bytes:
    with os.fdopen(open_file(path, os.O_RDONLY), "rb") as file:
        return file.read()


def test_another_process_can_write_to_the_memory_by_its_path(tmp_path: Path) -> None:
    handle = make_memory_file(path := tmp_path / "slot")
    subprocess.run([sys.executable, "-c", WRITER, str(path)], check=True)
    assert _read(path) == os.pread(handle, 100, 0) == b"from another process"
    assert stat_file(path).st_size == 20
    assert is_memory_file(path) and is_there(path)
    os.close(handle)


def test_the_memory_is_freed_when_its_holder_closes_it(tmp_path: Path) -> None:
    os.close(make_memory_file(path := tmp_path / "slot"))
    assert path.is_symlink() and not is_memory_file(path) and not is_there(path)
    for use in (lambda: open_file(path, os.O_RDWR | os.O_CREAT), lambda: stat_file(path)):
        with pytest.raises(FileNotFoundError, match="held this memory has exited"):
            use()


def test_a_descriptor_reused_for_another_file_is_refused(tmp_path: Path) -> None:
    handle = make_memory_file(path := tmp_path / "slot")
    (other := tmp_path / "other").write_text("precious")
    again = os.open(other, os.O_RDWR)
    os.dup2(again, handle, inheritable=False)
    assert path.read_text() == "precious", "the link leads there"
    with pytest.raises(FileNotFoundError):
        open_file(path, os.O_RDWR | os.O_CREAT)
    assert not is_memory_file(path)
    for number in (again, handle):
        os.close(number)


def test_memory_of_another_slot_is_refused(tmp_path: Path) -> None:
    handle = make_memory_file(tmp_path / "slot-0")
    (tmp_path / "slot-0").rename(tmp_path / "slot-1")
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "slot-1", os.O_RDWR)
    os.close(handle)


def test_other_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (link := tmp_path / "link").symlink_to(tmp_path / "file")
    for use in (lambda: open_file(link, os.O_RDONLY), lambda: stat_file(link)):
        with pytest.raises(OSError, match="found a symbolic link"):
            use()


def test_regular_files_are_opened_and_created_private(tmp_path: Path) -> None:
    os.close(open_file(path := tmp_path / "plain", os.O_RDWR | os.O_CREAT))
    assert path.stat().st_mode & 0o777 == 0o600
    assert not is_memory_file(path) and is_there(path) and stat_file(path).st_size == 0
