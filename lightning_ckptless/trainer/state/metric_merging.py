"""Running sums of ranks that are gone: logged values and metrics, which a rank that stays goes on with.

What `self.log` has gathered in an epoch, and what metrics have, is a sum over the samples that a rank has seen. When
another number of ranks goes on, each sum of a rank before is taken on by one rank now, and a rank that is new begins
with none: what is reduced over the ranks at the end of the epoch is made of every sample once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch

from lightning_ckptless.internals.lightning.metrics import REDUCTIONS

log = logging.getLogger(__name__)

Small = dict[str, Any]
"""The host state of a trainer, as `snapshot` captures it."""
_NOTHING = {"max": float("-inf"), "min": float("inf")}
"""What a logged value begins with, by its reduction; 0 for others."""
_STAGES = ("training", "validation")


def absorb(state: Small, other: Small, reductions: Mapping[str, Mapping[str, str | None]]) -> None:
    """Add the sums of another rank to those in a host state.

    Args:
        state: is changed.
        other: host state of the other rank, of the same version.
        reductions: by metric and name of its state, how ranks are reduced: `sum`, `mean`, `max`, `min`, `cat`; None
            where that is not known.
    """
    for stage in _STAGES:
        items = state["results"][stage]["items"]
        for key, theirs in other["results"][stage]["items"].items():
            if key not in items:
                items[key] = copy.deepcopy(theirs)
            elif theirs["is_tensor"]:
                _absorb_logged(items[key], theirs)
    for name, theirs in other["metrics"].items():
        _absorb_metric(name, state["metrics"][name], theirs, reductions.get(name, {}))


def forget(state: Small, defaults: Mapping[str, Mapping[str, Any]]) -> None:
    """Begin with no sums: those in the host state are another rank's.

    That values are logged is not forgotten: where no step of the epoch is left, all ranks reduce them at its end.

    Args:
        state: is changed.
        defaults: by metric the values that its states begin with.
    """
    for item in _logged(state):
        if item["is_tensor"]:
            item["value"] = torch.full_like(item["value"], _NOTHING.get(item["reduce_fx"], 0))
        if "cumulated_batch_size" in item:
            item["cumulated_batch_size"] = torch.zeros_like(item["cumulated_batch_size"])
        item["update_count"] = 0
    for name, saved in state["metrics"].items():
        saved["states"] = copy.deepcopy(dict(defaults[name]))
        saved["update_count"], saved["forward_cache"] = 0, None


def reopen(state: Small) -> None:
    """Have all be computed anew: what was computed is of other sums, and no rank may know what others still reduce."""
    for saved in (*_logged(state), *state["metrics"].values()):
        saved["computed"] = None


def _logged(state: Small) -> list[dict[str, Any]]:
    """All that `self.log` has gathered."""
    return [item for stage in _STAGES for item in state["results"][stage]["items"].values()]


def _absorb_logged(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
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


def _absorb_metric(
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
                "ckptless: %s.%s cannot be added up over ranks: what a lost rank has of this epoch is left out",
                name, key,
            )  # fmt: skip
            continue
        counts = mine["update_count"], theirs["update_count"]
        mine["states"][key] = reduce(mine["states"][key], value, *counts)
    mine["update_count"] += theirs["update_count"]
    mine["computed"] = None
