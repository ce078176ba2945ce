"""The progress counters of a loop and its children, as `state_dict()` of the loop returns them.

Lightning copies nested dataclasses with `dataclasses.asdict` at each call. Here the places of the counters are found
once, and each reading sets their values in the same dictionary. They are found again if an object that holds some of
them was replaced, or has gained or lost attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import getitem, is_
from typing import Any

from lightning_ckptless.internals.lightning.distribution import module


class LoopCounters:
    """Reads the counters of a fit loop and all loops below it.

    Args:
        fit: the fit loop.
        distribution: its distribution of Lightning.
    """

    def __init__(self, fit: Any, distribution: str) -> None:
        self._fit = fit
        self._distribution = distribution
        self._found: dict[str, Any] = {}
        self._hooks: list[tuple[str, Callable[[], Any]]] = []
        self._counters: list[tuple[dict[str, Any], str, dict[str, Any]]] = []
        self._holders: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._held: list[Any] = []
        self._attributes: list[dict[str, Any]] = []
        self._sizes: list[int] = []

    def read(self) -> dict[str, Any]:
        """Return the counters, without the positions of dataloaders: the same dictionary at each call."""
        if not self._is_known():
            self._find_all()
        for key, hook in self._hooks:
            self._found[key] = hook()
        for place, name, attributes in self._counters:
            place[name] = attributes[name]
        return self._found

    def _is_known(self) -> bool:
        # In this order: an attribute that is gone cannot be read.
        is_complete = bool(self._found) and list(map(len, self._attributes)) == self._sizes
        return is_complete and all(map(is_, map(getitem, self._holders, self._names), self._held))

    def _find_all(self) -> None:
        base: Any = module(self._distribution, "loops.loop")._Loop
        progress_class = module(self._distribution, "loops.progress")._BaseProgress
        self._found, self._hooks, self._counters = {}, [], []
        self._holders, self._names, self._held, self._attributes = [], [], [], []
        for prefix, loop in self._loops_below(self._fit, "", base):
            attributes = vars(loop)
            self._attributes.append(attributes)
            self._found[f"{prefix}state_dict"] = {}
            # The fit loop would ask every dataloader for its position, which is captured elsewhere.
            if loop is not self._fit and getattr(loop.on_save_checkpoint, "__func__", None) != base.on_save_checkpoint:
                self._hooks.append((f"{prefix}state_dict", loop.on_save_checkpoint))
            for name, value in attributes.items():
                if isinstance(value, progress_class):
                    self._hold(attributes, name)
                    self._found[prefix + name] = self._find(value, progress_class)
        self._sizes = list(map(len, self._attributes))

    def _loops_below(self, loop: Any, prefix: str, base: Any) -> Iterator[tuple[str, Any]]:
        yield prefix, loop
        for name, value in vars(loop).items():
            if isinstance(value, base):
                self._hold(vars(loop), name)
                yield from self._loops_below(value, f"{prefix}{name}.", base)

    def _find(self, progress: Any, progress_class: Any) -> dict[str, Any]:
        attributes, found = vars(progress), dict[str, Any]()
        self._attributes.append(attributes)
        for name, value in attributes.items():
            if isinstance(value, progress_class):
                self._hold(attributes, name)
                found[name] = self._find(value, progress_class)
            else:
                found[name] = value
                self._counters.append((found, name, attributes))
        return found

    def _hold(self, holder: dict[str, Any], name: str) -> None:
        self._holders.append(holder)
        self._names.append(name)
        self._held.append(holder[name])
