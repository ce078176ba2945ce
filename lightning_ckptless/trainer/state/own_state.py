"""The state of one callback or datamodule: its `state_dict`, plain attributes, generators and clocks.

Attributes are restored first. `load_state_dict` is called only if `state_dict` then still differs from the saved one,
and attributes are restored again after it: many implementations assume a fresh object. They add an offset to a running
clock, remove entries from the dictionary, or set a flag for the start of the next fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.internals.lightning.averaging import AVERAGE_STATE, averages_weights
from lightning_ckptless.internals.lightning.clocks import ages_of, readings_of, set_ages, set_windows, windows_of
from lightning_ckptless.internals.lightning.distribution import is_a
from lightning_ckptless.trainer.state.attribute_reader import AttributeReader
from lightning_ckptless.trainer.state.plain_values import is_same, measure, plain_attributes, set_plain_attributes
from lightning_ckptless.trainer.state.rng import set_owned_generators

_SMALL_BYTES = 65_536
_OF_THE_PROCESS = {"ProgressBar": (), "Timer": ("_offset",), "DeviceStatsMonitor": ()}
"""Callbacks whose attributes belong to the process, with the attributes that are state nevertheless."""


class OwnState:
    """Reads the state of one callback or datamodule.

    Args:
        owner: the callback or datamodule.
        leave: names of attributes to exclude.
        calls_state_dict: whether its `state_dict()` is part of it.
        tell: called with the name of a container that cannot be captured.

    Attributes:
        reader: reads its attributes, unless they belong to the process.
    """

    def __init__(
        self,
        owner: Any,
        leave: Collection[str],
        *,
        calls_state_dict: bool = True,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._owner = owner
        self._calls_state_dict = calls_state_dict
        self._kept = _attributes_of_the_process(owner)
        self.reader = AttributeReader(owner, {*leave, *readings_of(owner)}, tell)

    def state(self) -> dict[str, Any]:
        """Return its `state_dict`. Called before `capture`, as it may change attributes."""
        return _state_of(self._owner) if self._calls_state_dict else {}

    def capture(self, state: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the current state. It refers to live objects: pack it before continuing.

        Args:
            state: the result of `state`; None to call it first.
        """
        owner, kept = self._owner, self._kept
        state = self.state() if state is None else state
        if kept is None:
            plain, generators = self.reader.plain(), self.reader.generators()
        else:
            plain, generators = plain_attributes(owner, leave={name for name in vars(owner) if name not in kept}), {}
        return {
            "state": state,
            "plain": plain,
            "generators": generators,
            "held": self.reader.held,
            "others": self.reader.others,
            "ages": ages_of(owner),
            "windows": windows_of(owner),
        }

    def put(self, saved: dict[str, Any]) -> None:
        """Restore what `capture` returned, in a survivor or in a new process.

        Args:
            saved: its state.
        """
        owner = self._owner
        self._put_attributes(saved)
        if saved["state"] and not _attributes_suffice(owner) and not is_same(owner.state_dict(), saved["state"]):
            owner.load_state_dict(copy.deepcopy(saved["state"]))
            self._put_attributes(saved)

    def _put_attributes(self, saved: dict[str, Any]) -> None:
        owner, plain = self._owner, unpack(pack(saved["plain"]))
        if self._kept is None:
            self.reader.put(plain, saved["held"], {*saved["others"], *readings_of(owner)})
        else:
            set_plain_attributes(owner, plain)
        set_owned_generators(owner, saved["generators"])
        set_ages(owner, saved["ages"])
        set_windows(owner, saved["windows"])


def is_observer(callback: Any) -> bool:
    """Return whether a callback observes the run without being part of it, so that no version contains its state."""
    return hasattr(callback, "ckptless_observer")


def hyperparameters(owner: Any) -> dict[str, Any]:
    """Return the small plain values kept by `save_hyperparameters()`, which a tuner may have changed."""
    held = vars(owner).get("_hparams")
    if not isinstance(held, dict):
        return {}
    return {key: value for key, value in held.items() if (measure(value, _SMALL_BYTES) or _SMALL_BYTES) < _SMALL_BYTES}


def set_hyperparameters(owner: Any, saved: dict[str, Any]) -> None:
    """Restore what `hyperparameters` returned."""
    if saved:
        held = vars(owner)["_hparams"]
        for key in hyperparameters(owner).keys() - saved.keys():
            del held[key]
        held.update(saved)


def _attributes_of_the_process(owner: Any) -> tuple[str, ...] | None:
    return next((kept for name, kept in _OF_THE_PROCESS.items() if is_a(owner, "callbacks", name)), None)


def _state_of(owner: Any) -> dict[str, Any]:
    state = owner.state_dict()
    if not isinstance(state, dict):
        # A mock returns a non-dict from any method.
        return {}
    if averages_weights(owner):
        return {key: value for key, value in state.items() if key != AVERAGE_STATE}
    return state


def _attributes_suffice(owner: Any) -> bool:
    """Return whether there is nothing left to load: a Timer's `state_dict` differs at every call."""
    return is_a(owner, "callbacks", "Timer") or averages_weights(owner)
