"""Guesses which tensors are static. The guess decides their place in a shard and is verified at every version.

Apart from `commit.mirroring`, because a guess depends on the trainer's tensors only.
"""

from __future__ import annotations

from torch import Tensor

from lightning_ckptless.internals.torch_internals import version_counter
from lightning_ckptless.trainer.state.layout_tensors import digest_of
from lightning_ckptless.trainer.state.tensors import StateIndex

Trace = tuple[int, int, str]
"""A tensor's address, torch's count of writes to it, and a digest if the tensor is on the CPU."""


class StaticWatch:
    """Inspects a trainer's tensors whenever a layout is planned: first before its first step, then after it."""

    def __init__(self) -> None:
        self._seen: dict[str, Trace] = {}

    def look(self, index: StateIndex) -> frozenset[str]:
        """Return the names of the tensors that appear to be static.

        These are parameters without gradients, and buffers seen before, that were not written to since the last look.

        Args:
            index: locates the tensors.
        """
        wholes, here = index.tensors(), index.read()
        seen, self._seen = (
            self._seen,
            {
                name: _trace(here[name])
                for name, whole in wholes.items()
                if not whole.requires_grad and not name.startswith("optimizer/")
            },
        )
        return frozenset(
            name
            for name, trace in self._seen.items()
            if (name in seen or name not in index.private) and seen.get(name, trace) == trace
        )


def _trace(tensor: Tensor) -> Trace:
    # Batch norm updates its statistics without incrementing the write counter.
    return tensor.data_ptr(), version_counter(tensor), digest_of(tensor) if tensor.device.type == "cpu" else ""
