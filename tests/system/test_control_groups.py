"""Both versions of control groups, inside and outside of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckptless.system.control_groups import Ceiling, ceiling, control_group
from tests.control_groups import fill, first_version, second_version


def test_limits_of_version_2(tmp_path: Path) -> None:
    proc, root = second_version(tmp_path, "/pod/container"), tmp_path / "cgroup"
    fill(root / "pod", memory__max="1000", memory__current="700", memory__stat="anon 1\ninactive_file 100")
    fill(root / "pod" / "container", memory__max="max", memory__current="600", memory__events="oom_kill 2\n")
    fill(root / "pod" / "container", pids__max="64", pids__current="60")
    assert ceiling("memory", proc) == Ceiling(1000, 600, root / "pod")
    assert ceiling("pids", proc) == Ceiling(64, 60, root / "pod" / "container")
    group = control_group("memory", proc)
    assert group is not None and (group.kills(), group.version) == (2, 2)


def test_the_nearest_group_that_counts_the_resource_is_used(tmp_path: Path) -> None:
    proc, root = second_version(tmp_path, "/pod/container"), tmp_path / "cgroup"
    fill(root / "pod" / "container")
    fill(root / "pod", memory__max="1000", memory__current="700", memory__events="oom_kill 3\n")
    group = control_group("memory", proc)
    assert group is not None and (group.folder, group.kills()) == (root / "pod", 3)


@pytest.mark.parametrize(("root", "place"), [("/", "docker/abc"), ("/docker/abc", "."), ("/elsewhere", ".")])
def test_limits_of_version_1_with_any_mount_point(root: str, place: str, tmp_path: Path) -> None:
    proc, memory = first_version(tmp_path, root), tmp_path / "memory" / place
    fill(memory, memory__limit_in_bytes="1000", memory__usage_in_bytes="700", memory__stat="total_inactive_file 200")
    fill(memory, memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    fill(tmp_path / "pids" / "else", pids__max="64", pids__current="60")
    assert ceiling("memory", proc) == Ceiling(1000, 500, memory)
    assert ceiling("pids", proc) == Ceiling(64, 60, tmp_path / "pids" / "else")
    group = control_group("memory", proc)
    assert group is not None and (group.kills(), group.version) == (7, 1)
    fill(memory, memory__limit_in_bytes=str(2**63 - 4096))
    assert ceiling("memory", proc) is None


def test_a_process_without_a_visible_group_has_no_limit(tmp_path: Path) -> None:
    assert control_group("memory", tmp_path) is None
    assert ceiling("memory", second_version(tmp_path)) is None


def test_the_real_files_can_be_read() -> None:
    for resource in ("memory", "pids"):
        group = control_group(resource)
        assert group is None or (group.kills() >= 0 and all(found.limit >= 0 for found in group.ceilings()))
