"""Random generators of worker processes, carried home by the batches that they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.internals import torch_internals
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng, owned_generators, set_owned_generators


class Stamped:
    """A batch with the generators of the worker that made it."""

    def __init__(self, data: Any, worker: int, generators: Packed) -> None:
        self.data, self.worker, self.generators = data, worker, generators

    def pin_memory(self) -> Stamped:
        """Called by the loader's pinning thread."""
        return Stamped(torch_internals.pin(self.data), self.worker, self.generators)


class StampingCollate:
    """The user's collate function, with a stamp on what it returns in a worker."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        """Collate; in a worker, stamp."""
        data = self.collate(samples)
        if (worker := get_worker_info()) is None:
            return data
        generators = pack((capture_rng(), owned_generators(worker.dataset)))
        return Stamped(data, worker.id, generators)


class WorkerStart:
    """The user's `worker_init_fn`, then the generators that the worker had."""

    def __init__(self, init: Callable[[int], None] | None, generators: dict[int, Packed]) -> None:
        self.init, self.generators = init, generators

    def __call__(self, worker_id: int) -> None:
        """Called in a worker when it starts."""
        if self.init is not None:
            self.init(worker_id)
        if (saved := self.generators.get(worker_id)) is not None:
            worker = get_worker_info()
            assert worker is not None
            rng, owned = unpack(saved)
            apply_rng(rng)
            set_owned_generators(worker.dataset, owned)
