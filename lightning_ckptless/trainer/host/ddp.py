"""What Lightning's data-parallel strategy keeps to itself."""

from __future__ import annotations

from typing import Any

from lightning_ckptless.trainer.host.flavour import fabric_module, flavour_of


def model_averaging_period(strategy: Any) -> int | None:
    """Steps between two averagings of the ranks' parameters; None where gradients are averaged, as usual."""
    period: int | None = strategy._model_averaging_period
    return period


def prepare_without_group(strategy: Any) -> None:
    """What the strategy's set-up of a process does apart from joining a process group."""
    fabric_module(flavour_of(strategy), "utilities.seed").reset_seed()
    strategy.set_world_ranks()
    strategy._process_group_backend = strategy._get_process_group_backend()


def wrap_late(strategy: Any) -> None:
    """Wrap the model for data parallelism when everything else is set up; nothing is sent to other ranks."""
    given = strategy._ddp_kwargs
    strategy._ddp_kwargs = {**given, "init_sync": False}
    try:
        strategy.configure_ddp()
    finally:
        strategy._ddp_kwargs = given
