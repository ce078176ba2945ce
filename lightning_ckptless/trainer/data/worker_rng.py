"""Returns the random generators of dataloader worker processes along with the batches they prepare.

Apart from `loader`, because it runs in the worker processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.internals import torch_internals
from lightning_ckptless.trainer.data.dataset_generators import DatasetGenerators
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng


class BatchWithRng:
    """A batch with the generators of the worker that prepared it."""

    def __init__(self, data: Any, worker: int, generators: Packed) -> None:
        self.data, self.worker, self.generators = data, worker, generators

    def pin_memory(self) -> BatchWithRng:
        """Called by the loader's pinning thread."""
        return BatchWithRng(torch_internals.pin(self.data), self.worker, self.generators)


class RngCollate:
    """The user's collate function, with the worker's generators added to its result."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self._generators: DatasetGenerators | None = None

    def __call__(self, samples: Any) -> Any:
        """Collate; in a worker, add its generators."""
        data = self.collate(samples)
        if (worker := get_worker_info()) is None:
            return data
        if self._generators is None:
            self._generators = DatasetGenerators(worker.dataset, self.collate)
        return BatchWithRng(data, worker.id, pack((capture_rng(), self._generators.capture())))


class WorkerStart:
    """Runs the user's `worker_init_fn`, then restores the worker's generators."""

    def __init__(
        self, init: Callable[[int], None] | None, collate: Callable[[Any], Any], generators: dict[int, Packed]
    ) -> None:
        self.init, self.collate, self.generators = init, collate, generators

    def __call__(self, worker_id: int) -> None:
        """Called in each worker when it starts."""
        if self.init is not None:
            self.init(worker_id)
        if (saved := self.generators.get(worker_id)) is not None:
            worker = get_worker_info()
            assert worker is not None
            rng, owned = unpack(saved)
            apply_rng(rng)
            DatasetGenerators(worker.dataset, self.collate).apply(owned)
