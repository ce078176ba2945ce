"""Setup of a strategy's process without joining a process group, and the trainer's root folder."""

from __future__ import annotations

from typing import Any

from lightning_ckptless.internals.lightning.distribution import distribution_of, fabric_module


def prepare_without_group(strategy: Any) -> None:
    """Set up the strategy's process without joining a process group."""
    fabric_module(distribution_of(strategy), "utilities.seed").reset_seed()
    strategy.set_world_ranks()
    strategy._process_group_backend = strategy._get_process_group_backend()


def set_root_folder(trainer: Any, path: str) -> None:
    """Set a trainer's `default_root_dir`."""
    trainer._default_root_dir = path
