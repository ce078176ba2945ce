"""Out-of-memory kills are reported once."""

from __future__ import annotations

from pathlib import Path

from lightning_ckptless.system.control_groups import OomKills
from tests.control_groups import fill, limited_memory


def test_kills_are_reported_once(tmp_path: Path) -> None:
    kills = OomKills(limited_memory(tmp_path, kills=5, limit="max"))
    assert kills.news() == ""
    fill(tmp_path / "cgroup", memory__events="oom_kill 8\n")
    assert kills.news() == (
        f"the kernel has killed 3 processes in cgroup {tmp_path}/cgroup for lack of memory since the start "
        "(oom_kill was 5, is 8); the cgroup has no memory limit of its own"
    )
    assert kills.news() == ""


def test_the_tightest_limit_is_reported(tmp_path: Path) -> None:
    kills = OomKills(limited_memory(tmp_path, kills=0, limit=str(1 << 30)))
    fill(tmp_path / "cgroup", memory__events="oom_kill 1\n")
    assert kills.news() == (
        f"the kernel has killed 1 process in cgroup {tmp_path}/cgroup for lack of memory since the start "
        "(oom_kill was 0, is 1); the cgroup has a limit of 1024 MiB"
    )


def test_a_process_without_a_visible_group_reports_nothing(tmp_path: Path) -> None:
    assert OomKills(tmp_path).news() == ""
