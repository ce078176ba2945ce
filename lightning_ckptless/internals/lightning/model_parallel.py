"""What Lightning's strategy for sharded models keeps to itself."""

from __future__ import annotations

from typing import Any

from lightning_ckptless.internals.lightning.distribution import distribution_of, fabric_module

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")
"""Those that Lightning allows for its own strategy, by the strategy's class; ours may be named by a string."""


def sizes_of(strategy: Any) -> tuple[int, int]:
    """Sizes of the mesh: data parallel, tensor parallel. Those that were left open are nodes and ranks per node."""
    data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
    return (
        strategy.num_nodes if data == "auto" else int(data),
        strategy.num_processes if tensor == "auto" else int(tensor),
    )


def fit_mesh(strategy: Any) -> None:
    """Make the data-parallel dimension as long as there are ranks for."""
    _, tensor = sizes_of(strategy)
    strategy._data_parallel_size = strategy.cluster_environment.world_size() // tensor
    strategy._tensor_parallel_size = tensor


def has_mesh(strategy: Any) -> bool:
    """Whether the strategy's mesh has been made."""
    return strategy._device_mesh is not None


def precision_of(strategy: Any) -> str:
    """The precision that the trainer was asked for."""
    return str(strategy.precision_plugin.precision)


def give_mesh(strategy: Any) -> bool:
    """Give the model the strategy's mesh, if there is one; returns whether there is."""
    if not has_mesh(strategy):
        return False
    strategy.lightning_module._device_mesh = strategy._device_mesh
    return True


def make_mesh(strategy: Any) -> Any:
    """The strategy's mesh, made once more."""
    make = fabric_module(distribution_of(strategy), "strategies.model_parallel")._setup_device_mesh
    return make(*sizes_of(strategy), strategy.world_size, strategy.root_device)
