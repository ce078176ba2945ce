"""Memory that is left to a container: the least that any of its control groups allows."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from lightning_ckptless.replica.memory_limit import available_memory_bytes

MIB = 1 << 20


def _group(folder: Path, **files: object) -> None:
    """Write files of a control group; `memory_max=` becomes `memory.max`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{value}\n")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def test_the_limit_of_a_container_counts_without_the_cache_of_files(tmp_path: Path, membership: Path) -> None:
    membership.write_text("0::/\n")
    _group(tmp_path, memory_max=64 * MIB, memory_current=50 * MIB, memory_stat=f"anon 7\ninactive_file {6 * MIB}")
    assert available_memory_bytes(tmp_path, membership) == 20 * MIB


def test_the_least_of_all_groups_above_counts(tmp_path: Path, membership: Path) -> None:
    membership.write_text("0::/pod/container\n")
    _group(tmp_path / "pod/container", memory_max="max", memory_current=MIB)
    _group(tmp_path / "pod", memory_max=9 * MIB, memory_current=5 * MIB)
    assert available_memory_bytes(tmp_path, membership) == 4 * MIB


def test_the_older_kind_of_groups_counts_even_where_the_path_is_that_of_the_host(
    tmp_path: Path, membership: Path
) -> None:
    membership.write_text("5:cpu:/docker/3fa2\n4:memory:/docker/3fa2\n0::/\n")
    folder = tmp_path / "memory"
    _group(folder, memory_limit_in_bytes=8 * MIB, memory_usage_in_bytes=9 * MIB)
    assert available_memory_bytes(tmp_path, membership) == 0


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path, membership: Path) -> None:
    found = available_memory_bytes(tmp_path, membership)
    assert found == pytest.approx(psutil.virtual_memory().available, rel=0.2)
