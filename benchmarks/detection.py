"""SIGKILL to the first sign of the exit that an agent detects, by the memory that the kernel has to free.

The workers are real, and the agent's own code watches them. For comparison: the time until the kernel reports the exit,
which it does only after the memory is freed. An agent would otherwise have to wait for that.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

from benchmarks import machine
from benchmarks.quantiles import median, quantile
from benchmarks.report import Report, base_parser, progress_bar
from benchmarks.tables import Table, verdict
from lightning_ckptless.membership.agent.process_control import ForkedProcesses
from lightning_ckptless.membership.agent.worker_context import WorkerContext
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.worker.program import Program
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

    Args:
        parent: fork server.
        folder: folder for the worker's output.
        size_gib: memory that the worker touches, in GiB.
        after_s: pause before the kill in seconds, so that kills are spread over the polling interval.
    """
    script, sign = folder / "hold.py", folder / "ready"
    script.write_text(_HOLD)
    sign.unlink(missing_ok=True)
    program = Program("script", str(script), (str(size_gib), str(sign)))
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


def detection_table(results: dict[str, list[dict[str, float]]]) -> Table:
    """Return the table of detection times."""
    table = Table(
        "SIGKILL to the first sign of the exit, by the memory of the worker",
        ("memory", "kills", "detected p50 ms", "p99 ms", "max ms", "reported by the kernel p50 ms", "max ms "),
    )
    for size, kills in results.items():
        detected = [1e3 * kill["detected_s"] for kill in kills]
        reported = [1e3 * kill["reported_s"] for kill in kills]
        figures = (median(detected), quantile(detected, 0.99), max(detected), median(reported), max(reported))
        table.add(f"{size} GiB", len(kills), *(f"{figure:.1f}" for figure in figures))
    everything = [1e3 * kill["detected_s"] for kills in results.values() for kill in kills]
    table.note(f"Detected, p99 over all: {verdict(quantile(everything, 0.99), TARGET_MS, 'ms')}")
    return table


def main() -> None:
    """Read the command line, measure, report."""
    parser = base_parser(__doc__)
    parser.add_argument("--repeats", type=int, help="kills of each size (default: 40; 3 with --quick)")
    args = parser.parse_args()
    repeats = args.repeats or (3 if args.quick else 40)
    report = Report(args)
    results: dict[str, Any] = {f"{size:g}": [] for size in SIZES_GIB}
    with (
        progress_bar() as progress,
        tempfile.TemporaryDirectory() as folder,
        ForkServer(path=[str(machine.ROOT)]) as parent,
    ):
        task = progress.add_task("", total=repeats * len(SIZES_GIB))
        for number in range(repeats):
            for size in SIZES_GIB:
                progress.update(task, description=f"a worker with {size:g} GiB")
                results[f"{size:g}"].append(kill_one(parent, Path(folder), size, 0.0007 * number))
                progress.advance(task)
    report.finish([detection_table(results)], results)


if __name__ == "__main__":
    main()
