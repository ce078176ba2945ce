"""SIGKILL to the first sign of the exit that an agent detects, by the memory that the kernel has to free.

The workers are real, and the agent's own code watches them. For comparison: the time until the kernel reports the exit,
which it does only after the memory is freed. An agent would otherwise have to wait for that.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

from benchmarks.harness.machine import ROOT
from benchmarks.harness.report import Default, Program, Results, Steps, add_count
from benchmarks.harness.table import Column, Group, Table, count_of, each, p99, verdict
from lightning_ckptless.membership.agent.process_control import ForkedProcesses
from lightning_ckptless.membership.agent.worker_context import WorkerContext
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.worker.program import Program as Script
from lightning_ckptless.membership.worker.startup import Job

TARGET_MS = 50.0
SIZES_GIB = (0.0, 1.0, 4.0)
_HOLD = """
import sys, time
held = bytearray(int(float(sys.argv[1]) * 2**30))
held[::4096] = bytes(len(held[::4096]))
open(sys.argv[2], "w").close()
time.sleep(600)
"""
_PAUSE_S = 0.02
_READY_S = 120.0


def kill_one(parent: ForkServer, folder: Path, size_gib: float, after_s: float) -> dict[str, float]:
    """Start a worker that holds `size_gib` of memory, kill it, and measure the time to its detection.

    The kill follows a pause of `after_s`, so that kills are spread over the polling interval.
    """
    script, sign = folder / "hold.py", folder / "ready"
    script.write_text(_HOLD)
    sign.unlink(missing_ok=True)
    program = Script("script", str(script), (str(size_gib), str(sign)))
    context = WorkerContext(
        ForkedProcesses(lambda: parent),
        {0: {}},
        lambda env: Job(program, {**os.environ, **env}, str(folder)),
        DefaultLogsSpecs(log_dir=str(folder), redirects=Std.ALL),
    )
    context.start()
    workers = context.workers
    workers.inside.add(0)
    deadline = time.monotonic() + _READY_S
    while not sign.exists():
        assert time.monotonic() < deadline, f"a worker has not touched {size_gib} GiB within {_READY_S:g} s"
        time.sleep(_PAUSE_S)
    time.sleep(after_s)
    try:
        killed_at = time.time()
        os.kill(workers.pids()[0], signal.SIGKILL)
        while not workers.signs():
            workers.watch(1.0)
        seen_at = time.time()
        while workers.running:
            workers.wait_for_end(1.0)
        return {"detected_s": seen_at - killed_at, "reported_s": time.time() - killed_at}
    finally:
        context.close(signal.SIGKILL)


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Kill a worker of each size `args.repeats` times, alternating."""
    results |= {f"{size:g}": [] for size in SIZES_GIB}
    steps.expect(args.repeats * len(SIZES_GIB))
    with tempfile.TemporaryDirectory() as folder, ForkServer(path=[str(ROOT)]) as parent:
        for number in range(args.repeats):
            for size in SIZES_GIB:
                steps.begin(f"a worker with {size:g} GiB")
                results[f"{size:g}"].append(kill_one(parent, Path(folder), size, 0.0007 * number))
                steps.done()


def each_ms(quantity: str) -> Callable[[Group], list[float]]:
    return each(lambda kill: 1e3 * kill[quantity])


COLUMNS = (
    Column("memory", lambda group: f"{group.name} GiB"),
    Column("kills", count_of),
    Column("detected p50 ms", each_ms("detected_s"), ".1f", median),
    Column("p99 ms", each_ms("detected_s"), ".1f", p99),
    Column("max ms", each_ms("detected_s"), ".1f", max),
    Column("reported by the kernel p50 ms", each_ms("reported_s"), ".1f", median),
    Column("max ms", each_ms("reported_s"), ".1f", max),
)


def tables(_: Namespace, results: Results) -> list[Table]:
    groups = [Group(size, kills) for size, kills in results.items()]
    detected_ms = [value for group in groups for value in each_ms("detected_s")(group)]
    notes = [f"Detected, p99 over all: {verdict(p99(detected_ms), TARGET_MS, 'ms')}"]
    return [
        Table.of("SIGKILL to the first sign of the exit, by the memory of the worker", groups, *COLUMNS, notes=notes)
    ]


def options(parser: ArgumentParser) -> None:
    add_count(parser, "--repeats", Default(40, 3), "kills of each size")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
