"""Random number generators that a dataset, a collate function and what they hold draw from when they make a batch.

A pipeline of augmentations often has generators of its own. They advance in whichever process makes the batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from lightning_ckptless.trainer.state.reachability import has_attributes, reach
from lightning_ckptless.trainer.state.rng import generators_of, owned_generators, set_owned_generators

_SEARCHES = 3
"""Captures that search again: some generators are created with the first batch. Those that the dataset and the collate
function hold themselves are always found."""

States = dict[str, dict[str, Any]]
"""States by name, by the path of the object that holds them."""


class DatasetGenerators:
    """Reads and restores these generators in this process.

    Args:
        dataset: the dataset.
        collate: the collate function of its loader.
    """

    def __init__(self, dataset: Any, collate: Any) -> None:
        self._roots = {
            name: root for name, root in (("dataset", dataset), ("collate", collate)) if has_attributes(root)
        }
        self._owners: Mapping[str, Any] = self._roots
        self._searches = 0

    def capture(self) -> States:
        """Return the states of the generators."""
        if self._searches < _SEARCHES:
            self._searches += 1
            self._owners = self._roots | {path: owner for path, owner in self._all().items() if generators_of(owner)}
        return {path: states for path, owner in self._owners.items() if (states := owned_generators(owner))}

    def apply(self, saved: States) -> None:
        """Restore what `capture` returned here or in a process with an equal dataset."""
        owners = self._all()
        for path, states in saved.items():
            if path in owners:
                set_owned_generators(owners[path], states)

    def _all(self) -> dict[str, Any]:
        return self._roots | {path: it for name, root in self._roots.items() for path, it in reach(root, name)}


class LoaderGenerators:
    """These generators, and those of a loader and its samplers, for a loader that starts over after a fault.

    Args:
        loader: the loader.
        holders: the loader and its samplers.
    """

    def __init__(self, loader: DataLoader[Any], holders: list[Any]) -> None:
        self._of_dataset = DatasetGenerators(loader.dataset, loader.collate_fn)
        self._holders = holders

    def capture(self) -> tuple[States, list[dict[str, Any]]]:
        """Return the states of the generators."""
        return self._of_dataset.capture(), list(map(owned_generators, self._holders))

    def apply(self, saved: tuple[States, list[dict[str, Any]]]) -> None:
        """Restore what `capture` returned."""
        of_dataset, owned = saved
        self._of_dataset.apply(of_dataset)
        for holder, states in zip(self._holders, owned, strict=False):
            set_owned_generators(holder, states)
