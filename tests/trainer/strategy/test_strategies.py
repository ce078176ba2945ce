"""Validation of a strategy's own options before anything is started."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless._registration.names import classes_for
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.lightning_pytorch import CkptlessStrategy
from tests.trainer.tiny import DISTRIBUTIONS


def sharded(root: Path, distribution: str = DISTRIBUTIONS[0], **options: Any) -> Any:
    """The strategy of a trainer with four ranks."""
    strategy = classes_for(distribution).CkptlessModelParallelStrategy(**options)
    return strategy_of(root, distribution, strategy=strategy)


def strategy_of(root: Path, distribution: str, **options: Any) -> Any:
    trainer = importlib.import_module(distribution).Trainer
    return trainer(accelerator="cpu", devices=4, default_root_dir=root, logger=False, **options).strategy


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("sizes", [(2, 2), (4, 1), (1, 4), ("auto", "auto"), ("auto", 4)])
def test_a_mesh_of_all_ranks_is_accepted(distribution: str, sizes: tuple[Any, Any], tmp_path: Path) -> None:
    sharded(tmp_path, distribution, data_parallel_size=sizes[0], tensor_parallel_size=sizes[1]).check_options()


@pytest.mark.parametrize("sizes", [(3, 1), (2, 4), (2, "auto")])
def test_a_mesh_of_another_size_is_refused(sizes: tuple[Any, Any], tmp_path: Path) -> None:
    strategy = sharded(tmp_path, data_parallel_size=sizes[0], tensor_parallel_size=sizes[1])
    with pytest.raises(OptionsError, match=r"makes a mesh of \d ranks, .*has 4: choose sizes whose product"):
        strategy.check_options()


def test_hooks_that_would_gather_a_sharded_model_are_refused(tmp_path: Path) -> None:
    strategy = sharded(tmp_path, data_parallel_size=4, tensor_parallel_size=1, checkpoint_hooks="every_version")
    with pytest.raises(OptionsError, match=r"checkpoint_hooks='every_version' would gather a sharded model"):
        strategy.check_options()


def test_a_device_tier_of_a_sharded_model_is_refused(tmp_path: Path) -> None:
    strategy = sharded(tmp_path, data_parallel_size=4, tensor_parallel_size=1, device_tier="on")
    with pytest.raises(OptionsError, match=r"device_tier='on' needs a state that all ranks replicate"):
        strategy.check_options()


@pytest.mark.parametrize("policy", ["heal", "rewind"])
@pytest.mark.parametrize(("history", "every", "reach"), [(0, 1, 0), (1, 20, 2), (2, 7, 9)])
def test_a_history_too_short_for_the_replay_check_is_refused(policy: Any, history: int, every: int, reach: int) -> None:
    options: dict[str, Any] = {"history": history, "history_every": every, "on_divergence": policy}
    with pytest.raises(OptionsError, match=rf"reach back {reach} steps: set history=2 and history_every=10, or on_"):
        CkptlessStrategy(replay_check_every=10, **options)
    CkptlessStrategy(replay_check_every=max(1, reach), **(options | {"history": max(1, history)}))
    CkptlessStrategy(replay_check_every=10, **(options | {"on_divergence": "raise"}))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"in_place": False}, "has no effect with in_place=False"),
        ({"copies": 0}, "needs copies=1 or more"),
        ({"on_late": "skip"}, "takes every version, but with on_late='skip' some are skipped"),
        ({"history": 2}, "set history=0 instead of 2"),
        ({"replicas": "send"}, "which have to be compared: set replicas='verify', and a checksum"),
        ({"checksum": "none"}, "which have to be compared: set replicas='verify', and a checksum"),
        ({"on_divergence": "warn"}, "choose another value than on_divergence='warn'"),
    ],
    ids=str,
)
def test_options_that_a_device_tier_excludes_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionsError, match=r"^device_tier='on' .*" + re.escape(reason)):
        CkptlessStrategy(device_tier="on", **options)
    CkptlessStrategy(device_tier="off", **options)


def test_a_precision_without_a_counterpart_for_shards_is_refused(tmp_path: Path) -> None:
    # Lightning itself refuses it for a strategy object, but not for a strategy name.
    strategy = strategy_of(tmp_path, DISTRIBUTIONS[0], strategy="ckptless_model_parallel", precision="64-true")
    with pytest.raises(OptionsError, match=r"precision='64-true' is not supported for sharded models: choose among 32"):
        strategy.check_options()


def test_the_options_of_both_strategies_are_the_same(tmp_path: Path) -> None:
    given: dict[str, Any] = {"copies": 0, "in_place": False, "mirror_every_n_steps": 3, "stateless_callbacks": ["One"]}
    assert CkptlessStrategy(**given).options == sharded(tmp_path, **given).options
