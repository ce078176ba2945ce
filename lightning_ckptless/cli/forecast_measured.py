"""What the ledger of a run says about the inputs of a forecast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from statistics import mean, median
from typing import Any

from lightning_ckptless.cli.runs import Run
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.time_account import Bucket

Measured = dict[str, tuple[Any, str]]
"""By input: its value, and how it was measured."""

_SECONDS_PER_DAY = 86400.0
_RUNGS = {"in place": "in_place_s", "relaunch": "relaunch_s"}


def measured_in(run: Run) -> Measured:
    """Collect what a run has measured. What it has not measured is left out.

    Args:
        run: the run and its ledger.

    Raises:
        OptionsError: the ledger has no placement, so the run has not trained.
    """
    if not run.of("placement"):
        raise OptionsError(
            f"{run.folder}: the run has not mirrored a version yet, so there is nothing to forecast from"
        )
    return {**_cluster(run), **_steps(run), **_recoveries(run), **_durable(run), **_failures(run)}


def _cluster(run: Run) -> Measured:
    facts = run.of("placement")[-1].fields
    per_node = Counter(facts["nodes"])
    found: Measured = {
        "nodes": (len(per_node), "nodes of the run"),
        "ranks_per_node": (max(per_node.values()), "ranks on a node of the run"),
        "state_bytes": (sum(facts["sizes_bytes"]), "size of all shards of the run"),
    }
    if facts["copies"]:
        found["copies"] = (facts["copies"], "copies of the run")
    if standbys := run.of("standbys"):
        found["standbys"] = (standbys[-1].fields["wanted"], "standbys of the run, on the node that reported them last")
    return found


def _steps(run: Run) -> Measured:
    found = _steps_of_account(run)
    intervals = run.of("mirror_interval")
    if not intervals or "step_s" not in intervals[-1].fields:
        return found
    facts = intervals[-1].fields
    # The run compares steps from beginning to beginning, which contain the wait for their data.
    data_s = min(found["data_wait_s"][0], facts["step_s"] / 2) if found else 0.0
    return found | {
        "step_s": (facts["step_s"] - data_s, "step without a version, measured by the run, without waiting for data"),
        "version_s": (facts["version_s"], "cost of a version, measured by the run"),
        "mirror_every_n_steps": (facts["interval"], "interval that the run chose"),
    }


def _steps_of_account(run: Run) -> Measured:
    training_s = stall_s = data_s = 0.0
    steps = versions = 0
    for before, after in pairwise(run.of("time_spent")):
        then, now = before.fields, after.fields
        if before.generation != after.generation or now["step"] < then["step"] or now["versions"] < then["versions"]:
            continue
        training_s += _more(now, then, Bucket.TRAINING)
        stall_s += _more(now, then, Bucket.MIRROR_STALL)
        data_s += _more(now, then, Bucket.DATA_WAIT)
        steps += now["step"] - then["step"]
        versions += now["versions"] - then["versions"]
    if not steps or not versions:
        return {}
    return {
        "step_s": (training_s / steps, f"mean of {steps} steps of the run, without waiting for data or copies"),
        "data_wait_s": (data_s / steps, f"mean wait for data of {steps} steps of the run"),
        "version_s": (stall_s / versions, f"mean delay by {versions} versions of the run"),
        "mirror_every_n_steps": (max(1, round(steps / versions)), "interval of the run"),
    }


def _more(now: Mapping[str, Any], then: Mapping[str, Any], bucket: Bucket) -> float:
    """Seconds that a bucket has gained between two reports."""
    return float(now["seconds"].get(bucket, 0.0) - then["seconds"].get(bucket, 0.0))


def _recoveries(run: Run) -> Measured:
    found: Measured = {}
    recoveries = run.of("recovery")
    for rung, name in _RUNGS.items():
        down_s = [
            e.fields["total_s"] - e.fields["phases"].get("replay_s", 0.0)
            for e in recoveries
            if e.fields["rung"] == rung
        ]
        if down_s:
            found[name] = (
                max(0.0, mean(down_s)),
                f"mean of {len(down_s)} recoveries of the run ({rung}), replay excluded",
            )
    return found


def _durable(run: Run) -> Measured:
    written = [event.at for event in run.of("durable_written")]
    if len(written) < 2:
        return {}
    every_s = median(after - before for before, after in pairwise(written))
    return {"durable_every_s": (every_s, "median time between durable states of the run")}


def _failures(run: Run) -> Measured:
    faults = sum(event.fields["kind"] != "drained" for event in run.of("recovery"))
    days = (run.events[-1].at - run.events[0].at) / _SECONDS_PER_DAY
    if not faults or days <= 0:
        return {}
    nodes = len(set(run.of("placement")[-1].fields["nodes"]))
    lost = len({name for event in run.of("node_lost") for name in event.fields.get("lost", ())})
    share = 1 - min(lost, faults) / faults
    return {
        "rate": (1000 * faults / (nodes * days), f"{faults} recoveries of the run on {nodes} nodes in {days:.3g} days"),
        "process_share": (share, f"{lost} nodes lost in {faults} recoveries of the run"),
    }
