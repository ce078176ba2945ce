"""Private parts of Lightning's strategy for sharded models.

Apart from the strategy that uses it, because it uses private names of Lightning.
"""

from __future__ import annotations

from typing import Any

from lightning_ckptless.internals.lightning.distribution import distribution_of, fabric_module

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")
"""Precisions that Lightning's strategy supports. Lightning checks them by strategy class, but not for ours by name."""


def sizes_of(strategy: Any) -> tuple[int, int]:
    """Return the sizes of the mesh (data parallel, tensor parallel); `auto` is nodes and ranks per node."""
    data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
    return (
        strategy.num_nodes if data == "auto" else int(data),
        strategy.num_processes if tensor == "auto" else int(tensor),
    )


def fit_mesh(strategy: Any) -> None:
    """Set the data-parallel size to what the world size allows."""
    _, tensor = sizes_of(strategy)
    strategy._data_parallel_size = strategy.cluster_environment.world_size() // tensor
    strategy._tensor_parallel_size = tensor


def has_mesh(strategy: Any) -> bool:
    """Return whether the strategy's mesh has been created."""
    return strategy._device_mesh is not None


def precision_of(strategy: Any) -> str:
    """Return the requested precision of the trainer."""
    return str(strategy.precision_plugin.precision)


def give_mesh(strategy: Any) -> bool:
    """Set the model's mesh to that of the strategy, if there is one; returns whether there is."""
    if not has_mesh(strategy):
        return False
    strategy.lightning_module._device_mesh = strategy._device_mesh
    return True


def make_mesh(strategy: Any) -> Any:
    """Create another mesh like that of the strategy."""
    make = fabric_module(distribution_of(strategy), "strategies.model_parallel")._setup_device_mesh
    return make(*sizes_of(strategy), strategy.world_size, strategy.root_device)
