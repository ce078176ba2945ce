"""What Lightning's strategies do when their process joins the others, apart from joining a process group."""

from __future__ import annotations

from typing import Any

from lightning_ckptless.internals.lightning.distribution import distribution_of, fabric_module


def prepare_without_group(strategy: Any) -> None:
    """What the strategy's set-up of a process does apart from joining a process group."""
    fabric_module(distribution_of(strategy), "utilities.seed").reset_seed()
    strategy.set_world_ranks()
    strategy._process_group_backend = strategy._get_process_group_backend()


def set_root_folder(trainer: Any, path: str) -> None:
    """Give a trainer another `default_root_dir`."""
    trainer._default_root_dir = path
