"""What Lightning's strategy for sharded models keeps to itself."""

from __future__ import annotations

from typing import Any

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")
"""Those that Lightning allows for its own strategy, by the strategy's class; ours may be named by a string."""


def sizes_of(strategy: Any) -> tuple[int, int]:
    """Sizes of the mesh: data parallel, tensor parallel. Those that were left open are nodes and ranks per node."""
    data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
    return (
        strategy.num_nodes if data == "auto" else int(data),
        strategy.num_processes if tensor == "auto" else int(tensor),
    )


def precision_of(strategy: Any) -> str:
    """The precision that the trainer was asked for."""
    return str(strategy.precision_plugin.precision)
