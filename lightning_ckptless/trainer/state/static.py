"""Which tensors seem to stand still. A guess: it decides where they lie in a shard, and is checked at every version."""

from __future__ import annotations

from torch import Tensor

from lightning_ckptless.internals.torch_internals import version_counter
from lightning_ckptless.trainer.state.layout_tensors import digest_of
from lightning_ckptless.trainer.state.tensors import StateIndex

Trace = tuple[int, int, str]
"""Address of a tensor, how often torch has counted a write into it, and a digest where reading it is quick."""


class StaticWatch:
    """Looks at the tensors of a trainer whenever a layout is planned: first before its first step, then behind it."""

    def __init__(self) -> None:
        self._seen: dict[str, Trace] = {}

    def look(self, index: StateIndex) -> frozenset[str]:
        """Names of the tensors that seem to stand still.

        Parameters without gradients, and buffers that have been the same before. None that was written to since.

        Args:
            index: where the tensors are.
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
    # Batch norm changes its statistics without a count.
    return tensor.data_ptr(), version_counter(tensor), digest_of(tensor) if tensor.device.type == "cpu" else ""
