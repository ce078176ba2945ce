"""What the kernel has killed for lack of memory is told once."""

from __future__ import annotations

from pathlib import Path

from lightning_ckptless.system.control_groups import OomKills
from tests.control_groups import fill, limited_memory


def test_kills_are_news_once(tmp_path: Path) -> None:
    kills = OomKills(limited_memory(tmp_path, kills=5, limit="max"))
    assert kills.news() == ""
    fill(tmp_path / "cgroup", memory__events="oom_kill 8\n")
    assert kills.news() == (
        f"the kernel has killed 3 process(es) of cgroup {tmp_path}/cgroup for lack of memory since the start "
        "(oom_kill was 5, is 8); its memory has no limit of its own"
    )
    assert kills.news() == ""


def test_the_limit_is_the_least_around_the_process(tmp_path: Path) -> None:
    kills = OomKills(limited_memory(tmp_path, kills=0, limit=str(1 << 30)))
    fill(tmp_path / "cgroup", memory__events="oom_kill 1\n")
    assert kills.news().endswith("its memory is limited to 1024 MiB")


def test_a_process_without_a_visible_group_has_no_news(tmp_path: Path) -> None:
    assert OomKills(tmp_path).news() == ""
