"""The drill: runs a script without and with faults and compares the two runs step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lightning_ckptless.errors import LaunchError, OptionsError
from lightning_ckptless.ledger import Event
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.protocol.fault_script import Fault, FaultKind, parse_faults
from lightning_ckptless.testing.compare import Comparison, compare
from lightning_ckptless.testing.drill_progress import Progress, watching
from lightning_ckptless.testing.fault_marks import FaultMarks
from lightning_ckptless.testing.log_files import collect_logs
from lightning_ckptless.testing.starters import Ladder, Launcher, Start, program_of, shared_parent, start
from lightning_ckptless.testing.trace_reader import read_traces
from lightning_ckptless.testing.variant import Variant, environment_of

__all__ = ["DrillReport", "Ladder", "Progress", "Recovery", "Variant", "run_drill", "run_variant"]


SCRIPT_DEFAULTS = Ladder()


@dataclass(frozen=True, slots=True)
class Recovery:
    """One recovery, as recorded in the ledger.

    Args:
        generation: generation after the recovery.
        kind: how the culprit ended: killed, exited, raised, or lost with its node.
        culprit_rank: rank that failed first; None if unknown.
        cause: what happened to it, as text.
        version: version that training resumed from.
        steps_replayed: optimizer steps that were replayed.
        phases: seconds by phase; they sum to `total_s`.
        total_s: seconds from the fault to the end of the first step after it.
        rung: how the run recovered: in place, or by a relaunch.
        sources: number of shards by where they were read from.
        moved_bytes: bytes sent between ranks.
        at: end of the recovery, in seconds since the epoch.
    """

    generation: int
    kind: str
    culprit_rank: int | None
    cause: str
    version: str
    steps_replayed: int
    phases: Mapping[str, float]
    total_s: float
    rung: str
    sources: Mapping[str, int]
    moved_bytes: int
    at: float

    @classmethod
    def from_event(cls, event: Event) -> Recovery:
        """Build a recovery from a `recovery` event of the ledger."""
        names = ("kind", "culprit_rank", "cause", "version", "steps_replayed", "phases", "total_s", "rung")
        facts = {name: event.fields[name] for name in names}
        moved = {"sources": event.fields.get("sources", {}), "moved_bytes": event.fields.get("moved_bytes", 0)}
        return cls(generation=event.generation or 0, at=event.at, **facts, **moved)


@dataclass(frozen=True, slots=True)
class DrillReport:
    """The result of a drill.

    Args:
        command: script and its arguments.
        faults: requested faults.
        unfired: faults whose step or moment was never reached.
        verdict: comparison of the run with faults with the uninterrupted one.
        baseline: uninterrupted run.
        faulted: run with faults.
        recoveries: recoveries of the run with faults, in chronological order.
        relaunches: number of times all its workers were started again.
        in_place: number of recoveries in place.
        repetition: comparison of two uninterrupted runs, made if `verdict` has differences, to find out whether the
            script is deterministic; None if it was not made.
        ignore: patterns for the names of values that were not compared.
    """

    command: tuple[str, ...]
    faults: tuple[Fault, ...]
    unfired: tuple[Fault, ...]
    verdict: Comparison
    baseline: Variant
    faulted: Variant
    recoveries: tuple[Recovery, ...]
    relaunches: int
    in_place: int
    repetition: Comparison | None = None
    ignore: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether every fault was injected, and the run still ended with exit code 0 and identical results."""
        return self.verdict.identical and self.faulted.exit_code == 0 and not self.unfired

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the drill failed, one sentence each; empty if it passed."""
        found = []
        if self.faulted.exit_code:
            found.append(
                f"the run with faults ended with exit code {self.faulted.exit_code}; the end of its output, from "
                f"{self.faulted.folder / 'output'}:\n{self.faulted.tail()}"
            )
        found += [f"{fault} was not injected: the run never reached its step or moment" for fault in self.unfired]
        if not self.verdict.identical:
            found.append(str(self.verdict))
        if self.unrepeatable:
            found.append(
                f"two runs without faults also differ in {_listed(self.unrepeatable)}: the script is not deterministic."
                " Seed it with seed_everything(1, workers=True), and exclude values that depend on time or place with "
                "--ignore NAME"
            )
        elif self.differs_before_faults:
            found.append(
                "the runs differ before the first fault: the script is not deterministic. Seed it with "
                "seed_everything(1, workers=True)"
            )
        return tuple(found)

    @property
    def unrepeatable(self) -> tuple[str, ...]:
        """Names of the values that differ between two uninterrupted runs of the script."""
        return () if self.repetition is None else tuple(self.repetition.by_field())

    @property
    def unused_patterns(self) -> tuple[str, ...]:
        """Patterns in `ignore` that match no value."""
        names = self.verdict.ignored
        return tuple(pattern for pattern in self.ignore if not any(fnmatchcase(name, pattern) for name in names))

    @property
    def differs_before_faults(self) -> bool:
        """Whether something written before the first fault differs, so that the script cannot be deterministic."""
        times = [event.at for event in self.faulted.events if event.event == "fault_injected"]
        before = min(times, default=0.0)
        return any(difference.at is not None and difference.at < before for difference in self.verdict.differences)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return {
            "identical": self.identical,
            "problems": list(self.problems),
            "command": list(self.command),
            "faults": [str(fault) for fault in self.faults],
            "unfired": [str(fault) for fault in self.unfired],
            "verdict": self.verdict.to_dict(),
            "unrepeatable": list(self.unrepeatable),
            "ignored": list(self.verdict.ignored),
            "relaunches": self.relaunches,
            "in_place": self.in_place,
            "recoveries": [asdict(recovery) for recovery in self.recoveries],
            **{name: _facts(variant) for name, variant in (("baseline", self.baseline), ("faulted", self.faulted))},
        }


def _facts(variant: Variant) -> dict[str, Any]:
    return {"folder": str(variant.folder), "exit_code": variant.exit_code, "wall_s": round(variant.wall_s, 3)}


def run_drill(
    command: Sequence[str],
    faults: str | Sequence[Fault],
    *,
    folder: Path,
    nproc: int = 2,
    launcher: Launcher = "ckptless",
    parent: ForkServer | None = None,
    baseline: Variant | Path | None = None,
    isolate: bool = False,
    env: Mapping[str, str] | None = None,
    ladder: Ladder = SCRIPT_DEFAULTS,
    timeout_s: float | None = None,
    ignore: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> DrillReport:
    """Run a script without and with faults, and compare the two runs.

    The script must be deterministic, so it has to seed its random number generators. If the two runs differ, the script
    runs a second time without faults to find the values that are not deterministic.

    Args:
        command: script, or `-m` and a module, followed by its arguments.
        faults: faults as text in the grammar of `protocol.fault_script`, or as objects.
        folder: folder that receives `baseline/` and `faulted/`, each with traces, ledger, copies of log files, output.
        nproc: number of workers for `ckptless` and `torchrun`; with `python` the script's `devices` decides.
        launcher: command that starts the script. `ckptless` runs the agent in this process.
        parent: fork server for the workers of `ckptless`, to be shared by several drills.
        baseline: finished uninterrupted run of the same command; None to run it.
        isolate: give each run its own working directory, for scripts that write files with fixed names.
        env: environment variables for the script.
        ladder: recovery settings of the runs.
        timeout_s: time limit for one run in seconds; None for none.
        ignore: shell-style patterns for the names of values that may differ.
        progress: called from another thread with the progress of the runs.

    Raises:
        OptionsError: the command, the launcher or a fault is invalid.
        LaunchError: the script fails without any fault, or a run exceeded its time limit.
    """
    script = parse_faults(faults) if isinstance(faults, str) else tuple(faults)
    _check(script, nproc, launcher)
    program_of(command)
    with nullcontext(parent) if parent is not None else shared_parent(launcher, command) as forker:

        def run(name: str, text: str, expected_steps: int | None) -> Variant:
            return run_variant(
                command,
                folder / name,
                faults=text,
                nproc=nproc,
                launcher=launcher,
                parent=forker,
                isolate=isolate,
                env=env,
                ladder=ladder,
                timeout_s=timeout_s,
                progress=progress,
                expected_steps=expected_steps,
            )

        if isinstance(baseline, Path):
            baseline = Variant.load(baseline)
        right = baseline or run("baseline", "", None)
        _require_success(right, command)
        faulted = run("faulted", ",".join(map(str, script)), steps_of(right))
        report = report_on(command, script, right, faulted, ignore)
        if faulted.exit_code or not report.verdict.differences:
            return report
        again = run("repeated", "", steps_of(right))
        return replace(report, repetition=compare(right.folder, again.folder, ignore))


def _check(script: Sequence[Fault], nproc: int, launcher: str) -> None:
    for fault in script:
        if fault.kind is FaultKind.NODE:
            raise OptionsError(f"{fault}: a drill has one node, and a run cannot survive the loss of all its nodes")
        if launcher != "python" and isinstance(fault.rank, int) and fault.rank >= nproc:
            raise OptionsError(
                f"{fault}: rank {fault.rank} does not exist, the world size is {nproc}: use --nproc {fault.rank + 1}"
            )


def _require_success(baseline: Variant, command: Sequence[str]) -> None:
    if baseline.exit_code:
        raise LaunchError(
            f"{' '.join(command)} ended with exit code {baseline.exit_code} without any fault; the end of its output, "
            f"from {baseline.folder / 'output'}:\n{baseline.tail()}"
        )


def run_variant(
    command: Sequence[str],
    folder: Path,
    *,
    faults: str = "",
    nproc: int = 2,
    launcher: Launcher = "ckptless",
    parent: ForkServer | None = None,
    isolate: bool = False,
    env: Mapping[str, str] | None = None,
    ladder: Ladder = SCRIPT_DEFAULTS,
    timeout_s: float | None = None,
    progress: Callable[[Progress], None] | None = None,
    expected_steps: int | None = None,
) -> Variant:
    """Run a script once and trace it.

    Args:
        command: script, or `-m` and a module, followed by its arguments.
        folder: folder that receives all output of the run; must be empty or missing.
        faults: faults to inject, as text.
        nproc: number of workers.
        launcher: command that starts the script.
        parent: fork server for the workers of `ckptless`.
        isolate: give the run its own working directory.
        env: environment variables for the script.
        ladder: recovery settings.
        timeout_s: time limit in seconds; None for none.
        progress: called with the progress of the run.
        expected_steps: total number of optimizer steps, for `progress`.
    """
    if folder.exists() and any(folder.iterdir()):
        raise OptionsError(f"{folder} has files of another drill: use an empty folder")
    cwd = folder / "cwd" if isolate else None
    (cwd or folder).mkdir(parents=True, exist_ok=True)
    variables = environment_of(folder.absolute(), faults, env or {})
    what = Start(tuple(command), variables, cwd, folder / "output", folder / "runs", nproc, ladder, timeout_s)
    began_at = time.time()
    with watching(folder, folder.name, expected_steps, progress) as ending:
        exit_code = ending.exit_code = start(launcher, what, parent)
    variant = Variant(folder, exit_code, time.time() - began_at)
    collect_logs(read_traces(variant.trace).values(), folder / "logs", since=began_at)
    variant.save()
    return variant


def steps_of(variant: Variant) -> int | None:
    """Return the number of optimizer steps of a run; None without a trace."""
    steps = [line.point.step for trace in read_traces(variant.trace).values() for line in trace.lines]
    return max(steps, default=None)


def report_on(
    command: Sequence[str], script: Sequence[Fault], baseline: Variant, faulted: Variant, ignore: Sequence[str] = ()
) -> DrillReport:
    """Compare two finished runs.

    Args:
        command: script and its arguments.
        script: faults requested in the second run.
        baseline: uninterrupted run.
        faulted: run with faults.
        ignore: patterns for the names of values that may differ.
    """
    events = faulted.events
    happened = FaultMarks.claimed(faulted.run_folder / "faults") if faulted.run_folder else frozenset()
    # torchrun's agent writes no ledger events, so count the generations that rank 0 reports.
    starts = sum(event.event == "workers_spawned" for event in events) or len(
        {event.generation for event in events if event.event == "run_started"}
    )
    return DrillReport(
        command=tuple(command),
        faults=tuple(script),
        unfired=tuple(fault for index, fault in enumerate(script) if index not in happened),
        verdict=compare(baseline.folder, faulted.folder, ignore),
        baseline=baseline,
        faulted=faulted,
        recoveries=tuple(Recovery.from_event(event) for event in events if event.event == "recovery"),
        relaunches=max(0, starts - 1),
        in_place=sum(event.event == "in_place" for event in events),
        ignore=tuple(ignore),
    )


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
