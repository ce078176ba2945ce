"""Run a scenario, look for what it leaves behind, and evaluate it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.soak import nodes, one_node
from benchmarks.soak.processes import busy_cores, left_over, open_files, running
from benchmarks.soak.results import Result, judge
from benchmarks.soak.scenario import Scenario
from benchmarks.soak.stage import Undisturbed, place_for
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.drill import Progress


def run(
    scenario: Scenario,
    folder: Path,
    parent: ForkServer,
    undisturbed: Undisturbed,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Run a scenario and evaluate it.

    Args:
        scenario: scenario to run.
        folder: folder for its files; removed if the run passes.
        parent: fork server that all runs share.
        undisturbed: runs to compare with.
        progress: receives the progress of a run on one node.
    """
    with place_for(folder) as place:
        if scenario.configuration.loss is None:
            strike = one_node.prepare(scenario, place, parent, undisturbed, progress)
        else:
            strike = nodes.prepare(scenario, place, parent, undisturbed)
        parent.ready()
        began, files, known = time.monotonic(), open_files(), running()
        with busy_cores(scenario.load):
            evidence = strike()
        leaks = left_over(known | {parent.pid or 0})
        leaks += [f"shared memory {path.name}" for path in place.arenas.iterdir()]
        leaks += [f"temporary {path.name}" for path in place.temporary.glob("ckptless-*")]
        leaks += [f"{count} open: {what}" for what, count in (open_files() - files).items()]
        result = judge(scenario, replace(evidence, leaks=tuple(leaks)))
    result = replace(result, wall_s=round(time.monotonic() - began, 2))
    if not result.good:
        return replace(result, folder=str(folder))
    shutil.rmtree(folder, ignore_errors=True)
    return result
