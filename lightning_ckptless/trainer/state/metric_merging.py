"""Merges accumulated metrics and logged values of earlier ranks into those of the current ranks.

What `self.log` and metrics accumulate in an epoch covers the samples that one rank has seen. When the world size
changes, each earlier rank's accumulation is merged into exactly one current rank, and an added rank starts empty: the
reduction over ranks at the end of the epoch counts every sample once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch

from lightning_ckptless.internals.lightning.metrics import REDUCTIONS

log = logging.getLogger(__name__)

HostStateDict = dict[str, Any]
"""The host state of a trainer, as `HostState.capture` returns it."""
_INITIAL = {"max": float("-inf"), "min": float("inf")}
"""Initial logged value by reduction; 0 for the others."""
_STAGES = ("training", "validation")


def merge(state: HostStateDict, other: HostStateDict, reductions: Mapping[str, Mapping[str, str | None]]) -> None:
    """Merge another rank's logged values and metrics into a host state.

    Args:
        state: changed in place.
        other: host state of the other rank, from the same version.
        reductions: reduction over ranks by metric and state name: `sum`, `mean`, `max`, `min`, `cat`; None if unknown.
    """
    for stage in _STAGES:
        items = state["results"][stage]["items"]
        for key, theirs in other["results"][stage]["items"].items():
            if key not in items:
                items[key] = copy.deepcopy(theirs)
            elif theirs["is_tensor"]:
                _merge_logged(items[key], theirs)
    for name, theirs in other["metrics"].items():
        _merge_metric(name, state["metrics"][name], theirs, reductions.get(name, {}))


def clear(state: HostStateDict, defaults: Mapping[str, Mapping[str, Any]]) -> None:
    """Reset logged values and metrics in a host state that another rank captured.

    The names of logged values stay: even if no step of the epoch is left, all ranks reduce them at its end.

    Args:
        state: changed in place.
        defaults: initial values of each metric's states.
    """
    for item in _logged(state):
        if item["is_tensor"]:
            item["value"] = torch.full_like(item["value"], _INITIAL.get(item["reduce_fx"], 0))
        if "cumulated_batch_size" in item:
            item["cumulated_batch_size"] = torch.zeros_like(item["cumulated_batch_size"])
        item["update_count"] = 0
    for name, saved in state["metrics"].items():
        saved["states"] = copy.deepcopy(dict(defaults[name]))
        saved["update_count"], saved["forward_cache"] = 0, None


def discard_computed(state: HostStateDict) -> None:
    """Drop cached results: they predate the merge, and all ranks must agree on which values they still reduce."""
    for saved in (*_logged(state), *state["metrics"].values()):
        saved["computed"] = None


def _logged(state: HostStateDict) -> list[dict[str, Any]]:
    """Return everything accumulated by `self.log`."""
    return [item for stage in _STAGES for item in state["results"][stage]["items"].values()]


def _merge_logged(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    if theirs["has_reset"]:
        return
    if mine["has_reset"]:
        mine |= {k: copy.deepcopy(theirs[k]) for k in ("value", "cumulated_batch_size", "has_reset") if k in theirs}
    elif theirs["reduce_fx"] in ("mean", "sum"):
        mine["value"] = mine["value"] + theirs["value"]
        if "cumulated_batch_size" in mine:
            mine["cumulated_batch_size"] = mine["cumulated_batch_size"] + theirs["cumulated_batch_size"]
    else:
        reduce = torch.maximum if theirs["reduce_fx"] == "max" else torch.minimum
        mine["value"] = reduce(mine["value"], theirs["value"])
    mine["update_count"] += theirs["update_count"]


def _merge_metric(
    name: str, mine: dict[str, Any], theirs: dict[str, Any], reductions: Mapping[str, str | None]
) -> None:
    if not theirs["update_count"]:
        return
    if not mine["update_count"]:
        mine |= copy.deepcopy(theirs)
        return
    for key, value in theirs["states"].items():
        reduce = REDUCTIONS.get(reductions.get(key) or "")
        if reduce is None:
            log.warning(
                "ckptless: %s.%s has no known reduction over ranks: a lost rank's part of this epoch is dropped",
                name, key,
            )  # fmt: skip
            continue
        counts = mine["update_count"], theirs["update_count"]
        mine["states"][key] = reduce(mine["states"][key], value, *counts)
    mine["update_count"] += theirs["update_count"]
    mine["computed"] = None
