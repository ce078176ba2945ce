"""The state of one callback or datamodule: its `state_dict`, plain attributes, generators and clocks.

Attributes are restored first. `load_state_dict` is called only if `state_dict` then still differs from the saved one,
and attributes are restored again after it: many implementations assume a fresh object. They add an offset to a running
clock, remove entries from the dictionary, or set a flag for the start of the next fit.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

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
    """

    def __init__(self, owner: Any, leave: Collection[str], *, calls_state_dict: bool = True) -> None:
        self._owner = owner
        self._calls_state_dict = calls_state_dict
        self._kept = _attributes_of_the_process(owner)
        self._reader = AttributeReader(owner, {*leave, *readings_of(owner)})

    def capture(self) -> dict[str, Any]:
        """Return the current state. It refers to live objects: pack it before continuing."""
        owner, kept = self._owner, self._kept
        # Called first, as it may change attributes.
        state = _state_of(owner) if self._calls_state_dict else {}
        attributes = vars(owner)
        if kept is None:
            plain, generators, names = self._reader.plain(), self._reader.generators(), tuple(attributes)
        else:
            leave = {name for name in attributes if name not in kept}
            plain, generators, names = plain_attributes(owner, leave=leave), {}, None
        return {
            "state": state,
            "plain": plain,
            "generators": generators,
            "names": names,
            "ages": ages_of(owner),
            "windows": windows_of(owner),
        }


def set_own_state(owner: Any, saved: dict[str, Any], leave: Collection[str]) -> None:
    """Restore what `OwnState.capture` returned, in a survivor or in a new process.

    Args:
        owner: the callback or datamodule.
        saved: its state.
        leave: names of attributes to exclude.
    """
    _set_attributes(owner, saved, leave)
    if saved["state"] and not _attributes_suffice(owner) and not is_same(owner.state_dict(), saved["state"]):
        owner.load_state_dict(copy.deepcopy(saved["state"]))
        _set_attributes(owner, saved, leave)


def hyperparameters(owner: Any) -> dict[str, Any]:
    """Return the small plain values kept by `save_hyperparameters()`, which a tuner may have changed."""
    held = vars(owner).get("_hparams")
    if not isinstance(held, dict):
        return {}
    return {key: value for key, value in held.items() if (measure(value, _SMALL_BYTES) or _SMALL_BYTES) < _SMALL_BYTES}


def set_hyperparameters(owner: Any, saved: dict[str, Any]) -> None:
    """Restore what `hyperparameters` returned."""
    if saved:
        vars(owner)["_hparams"].update(saved)


def _set_attributes(owner: Any, saved: dict[str, Any], leave: Collection[str]) -> None:
    if saved["names"] is not None:
        for name in set(plain_attributes(owner, leave=leave)) - {*saved["names"], *readings_of(owner)}:
            # Created after that version.
            del vars(owner)[name]
    set_plain_attributes(owner, copy.deepcopy(saved["plain"]))
    set_owned_generators(owner, saved["generators"])
    set_ages(owner, saved["ages"])
    set_windows(owner, saved["windows"])


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
