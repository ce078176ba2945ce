"""Ending a run on request: who may ask, and when all ranks have agreed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lightning_ckptless.internals.lightning.distribution import module
from lightning_ckptless.trainer.commit.run_end import RunEnd
from tests.trainer.tiny import DISTRIBUTIONS, tiny_trainer

AGENT = SimpleNamespace(finish_asked=True)


def mirror(*, passes: bool) -> Any:
    return SimpleNamespace(stop=SimpleNamespace(passes=lambda: passes))


@pytest.mark.parametrize(
    ("watcher", "asked"), [(None, False), (SimpleNamespace(finish_asked=False), False), (AGENT, True)]
)
def test_the_agent_may_ask(watcher: Any, asked: bool, tmp_path: Path) -> None:
    assert RunEnd(tiny_trainer(tmp_path), cast("Any", watcher)).is_asked() is asked


def test_no_run_ends_before_its_first_version(tmp_path: Path) -> None:
    assert not RunEnd(tiny_trainer(tmp_path), cast("Any", AGENT)).is_with(None)


def test_a_single_rank_needs_no_vote(tmp_path: Path) -> None:
    assert RunEnd(tiny_trainer(tmp_path), cast("Any", AGENT)).is_with(mirror(passes=False))


@pytest.mark.parametrize("passes", [True, False])
def test_several_ranks_vote(passes: bool, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, strategy="ddp", devices=2)
    assert RunEnd(trainer, cast("Any", AGENT)).is_with(mirror(passes=passes)) is passes


def test_lightning_ends_the_run_only_when_all_ranks_have_agreed(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    end = RunEnd(trainer, cast("Any", AGENT))
    end.end_if_agreed()
    end.agree()
    assert trainer.received_sigterm
    with pytest.raises(module(DISTRIBUTIONS[0], "utilities.exceptions").SIGTERMException):
        end.end_if_agreed()
