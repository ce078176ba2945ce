"""Run a scenario, look for what it leaves behind, and evaluate it."""

from __future__ import annotations

import gc
import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_ckptless.membership.forkserver.client import ForkServer
from tests import leaks
from tests.busy_cores import busy_cores
from tests.soak import nodes, one_node
from tests.soak.judge import Evidence, Result, judge
from tests.soak.scenario import Scenario
from tests.soak.stage import Place, Undisturbed, place_for

GRACE_S = 10.0
"""Seconds for processes to exit."""


def run(scenario: Scenario, folder: Path, parent: ForkServer, undisturbed: Undisturbed) -> Result:
    """Run a scenario and evaluate it.

    Args:
        scenario: scenario to run.
        folder: folder for its files; removed if the run passes.
        parent: fork server that all runs share.
        undisturbed: runs to compare with.
    """
    prepare = one_node.prepare if scenario.configuration.loss is None else nodes.prepare
    with place_for(folder) as place:
        strike = prepare(scenario, place, parent, undisturbed)
        parent.ready()
        result = judge(scenario, _strike(strike, scenario.load, place, parent))
    if result.good:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _strike(strike: Callable[[], Evidence], load: bool, place: Place, parent: ForkServer) -> Evidence:
    """Make the run with faults, and add to its evidence what it leaves behind."""
    files, known = _open_files(), {process.pid for process in leaks.marked_processes()}
    with busy_cores(os.cpu_count() or 1 if load else 0):
        evidence = strike()
    found = _left_over(known | {parent.pid or 0})
    found += [f"shared memory {path.name}" for path in place.arenas.iterdir()]
    found += [f"temporary {path.name}" for path in place.temporary.glob("ckptless-*")]
    found += [f"{count} open: {what}" for what, count in (_open_files() - files).items()]
    return replace(evidence, leaks=tuple(found))


def _left_over(kept: set[int]) -> list[str]:
    """Return the processes that a run has left behind, after a grace period; they are killed."""
    new = [process for process in leaks.marked_processes() if process.pid not in kept]
    _, alive = psutil.wait_procs(new, timeout=GRACE_S) if new else ([], [])
    found = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            found.append(f"process {process.pid} ({' '.join(process.cmdline())[-120:]})")
            process.kill()
    return found


@cache
def _use_libuv() -> None:
    """Make libuv, on which torch's store runs, open the files that it opens once per process and keeps."""
    TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _open_files() -> Counter[str]:
    """Return the open files of this process, by target; all sockets are counted under one name."""
    _use_libuv()
    gc.collect()
    return Counter(target.split(":[")[0] for target in leaks.open_files().values())
