"""What the kernel has killed for lack of memory: both versions of cgroups, from inside and outside of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckptless.membership.oom_kills import PROC, OomKills, memory_cgroup
from tests.membership.cgroups import fake_cgroup

V1_MOUNTS = """\
35 31 0:32 / {tmp}/pids rw,relatime - cgroup cgroup rw,pids
36 31 0:33 {root} {tmp}/memory rw,relatime - cgroup cgroup rw,memory
"""


def version_1(folder: Path, *, root: str, place: str, limit_bytes: int) -> Path:
    """A cgroup of version 1 beside an empty one of version 2; returns what stands for `/proc/self`."""
    (folder / "proc").mkdir()
    (folder / "proc/cgroup").write_text("8:pids:/else\n4:memory:/docker/abc\n0::/docker/abc\n")
    (folder / "proc/mountinfo").write_text(V1_MOUNTS.format(root=root, tmp=folder))
    cgroup = folder / "memory" / place
    cgroup.mkdir(parents=True)
    (cgroup / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    (cgroup / "memory.stat").write_text(f"cache 0\nhierarchical_memory_limit {limit_bytes}\n")
    return folder / "proc"


@pytest.mark.parametrize(("root", "place"), [("/", "docker/abc"), ("/docker/abc", ".")])
def test_version_1_is_found_wherever_its_hierarchy_is_mounted(root: str, place: str, tmp_path: Path) -> None:
    found = memory_cgroup(version_1(tmp_path, root=root, place=place, limit_bytes=1 << 30))
    assert found is not None
    assert (found.kills(), found.limit_bytes(), found.is_unified) == (7, 1 << 30, False)


def test_the_largest_number_of_version_1_means_no_limit(tmp_path: Path) -> None:
    found = memory_cgroup(version_1(tmp_path, root="/", place="docker/abc", limit_bytes=0x7FFFFFFFFFFFF000))
    assert found is not None and found.limit_bytes() is None


def test_the_limit_of_version_2_is_the_least_up_to_the_mount(tmp_path: Path) -> None:
    proc = fake_cgroup(tmp_path, kills=0, limit="1000")
    (proc / "cgroup").write_text("0::/outer/inner\n")
    inner = tmp_path / "cgroup/outer/inner"
    inner.mkdir(parents=True)
    (inner / "memory.events").write_text("oom_kill 2\n")
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("4000\n")
    found = memory_cgroup(proc)
    assert found is not None and (found.folder, found.kills(), found.limit_bytes()) == (inner, 2, 1000)


def test_kills_are_news_once(tmp_path: Path) -> None:
    kills = OomKills(fake_cgroup(tmp_path, kills=5, limit="max"))
    assert kills.news() == ""
    (tmp_path / "cgroup/memory.events").write_text("oom_kill 8\n")
    assert kills.news() == (
        f"the kernel has killed 3 process(es) of cgroup {tmp_path}/cgroup for lack of memory since the start "
        "(oom_kill was 5, is 8); its memory has no limit of its own"
    )
    assert kills.news() == ""


def test_a_process_without_a_visible_cgroup_has_no_news(tmp_path: Path) -> None:
    assert memory_cgroup(tmp_path) is None
    assert OomKills(tmp_path).news() == ""
    (tmp_path / "cgroup").write_text("garbage\n0::/\n")
    (tmp_path / "mountinfo").write_text("garbage - \n")
    assert memory_cgroup(tmp_path) is None


def test_the_real_files_can_be_read() -> None:
    found = memory_cgroup(PROC)
    assert found is None or (found.kills() or 0) >= 0
