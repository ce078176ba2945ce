"""Reports the progress of a run by reading the files that it writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_ckptless.ledger import LEDGER_NAME, read_ledger

_INTERVAL_S = 0.2


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run of a drill.

    Args:
        variant: `baseline`, `faulted` or `repeated`.
        step: number of finished optimizer steps.
        of: total number of optimizer steps; None if unknown.
        faults: number of injected faults.
        recoveries: number of recoveries.
        done: whether the run has ended.
        failed: whether it ended with another exit code than 0.
    """

    variant: str
    step: int
    of: int | None
    faults: int
    recoveries: int
    done: bool
    failed: bool = False


class Ending:
    """The end of a watched run, set by the caller.

    Attributes:
        exit_code: exit code; None while it runs, and if it was interrupted.
    """

    exit_code: int | None = None


@contextmanager
def watching(
    folder: Path, variant: str, expected_steps: int | None, progress: Callable[[Progress], None] | None
) -> Iterator[Ending]:
    """Report the progress of the run in a folder from a separate thread, until the context ends.

    Yields:
        An object on which the caller sets the exit code of the run.
    """
    ending = Ending()
    if progress is None:
        yield ending
        return
    watch, over = _Watch(folder, variant, expected_steps), threading.Event()

    def report() -> None:
        while not over.wait(_INTERVAL_S):
            progress(watch.look())

    thread = threading.Thread(target=report, name="ckptless-drill-watch", daemon=True)
    thread.start()
    try:
        yield ending
    finally:
        over.set()
        thread.join()
        progress(replace(watch.look(), done=True, failed=ending.exit_code != 0))


class _Watch:
    def __init__(self, folder: Path, variant: str, expected_steps: int | None) -> None:
        self._trace = folder / "trace" / "trace-rank0.jsonl"
        self._runs = folder / "runs"
        self._variant = variant
        self._of = expected_steps
        self._read_bytes = 0
        self._step = 0

    def look(self) -> Progress:
        self._read_new_lines()
        events = [event for path in self._runs.glob(f"*/{LEDGER_NAME}") for event in read_ledger(path)]
        # Each rank records a fault of all ranks, which counts once.
        faults = {(e.generation, e.fields.get("fault")) for e in events if e.event == "fault_injected"}
        recoveries = sum(event.event == "recovery" for event in events)
        return Progress(self._variant, self._step, self._of, len(faults), recoveries, done=False)

    def _read_new_lines(self) -> None:
        if not self._trace.exists():
            return
        with self._trace.open("rb") as file:
            file.seek(self._read_bytes)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        for line in complete.splitlines():
            try:
                self._step = int(json.loads(line)["step"])
            except (ValueError, KeyError):
                continue
