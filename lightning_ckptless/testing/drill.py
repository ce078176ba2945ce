"""The drill: one script run twice, left alone and with faults, and compared step by step."""

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
from lightning_ckptless.testing.compare import ExitReport, compare
from lightning_ckptless.testing.fault_marks import FaultMarks
from lightning_ckptless.testing.log_files import collect_logs
from lightning_ckptless.testing.starters import Ladder, Launcher, Start, program_of, shared_parent, start
from lightning_ckptless.testing.traces import read_traces
from lightning_ckptless.testing.variant import Variant, environment_of
from lightning_ckptless.testing.watch import Progress, watching

__all__ = ["DrillReport", "Ladder", "Progress", "Recovery", "Variant", "run_drill", "run_variant"]


AS_THE_SCRIPT_SAYS = Ladder()


@dataclass(frozen=True, slots=True)
class Recovery:
    """What the ledger says about one recovery.

    Args:
        generation: number of the membership that recovered.
        kind: how the culprit ended: killed, exited, raised, or lost with its node.
        culprit_rank: rank that failed first; None where nobody knows.
        cause: what happened to it, in words.
        version: version of the state that the run went on from.
        steps_replayed: optimizer steps that were run again.
        phases: seconds by phase; they sum to `total_s`.
        total_s: from the fault to the end of the first step after it.
        rung: of the ladder: in place, or by a relaunch.
        sources: how many shards came from where.
        moved_bytes: bytes that were sent between ranks.
        at: when it was over, seconds since the epoch.
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
        """The recovery that an event of the ledger tells of."""
        names = ("kind", "culprit_rank", "cause", "version", "steps_replayed", "phases", "total_s", "rung")
        facts = {name: event.fields[name] for name in names}
        moved = {"sources": event.fields.get("sources", {}), "moved_bytes": event.fields.get("moved_bytes", 0)}
        return cls(generation=event.generation or 0, at=event.at, **facts, **moved)


@dataclass(frozen=True, slots=True)
class DrillReport:
    """What a drill has shown.

    Args:
        command: the script and its arguments.
        faults: what was to go wrong.
        unfired: faults whose step or moment the run never came to.
        verdict: how the run with faults compares with the one without.
        baseline: the run that was left alone.
        faulted: the run with faults.
        recoveries: of the run with faults, in their order.
        relaunches: how often all its workers were started again.
        in_place: how often workers were replaced while the others stayed.
        repetition: how a second undisturbed run compares with the first, where the verdict raised the question whether
            the script repeats itself; None where it did not.
        ignore: patterns for the names of the values that were not to be compared.
    """

    command: tuple[str, ...]
    faults: tuple[Fault, ...]
    unfired: tuple[Fault, ...]
    verdict: ExitReport
    baseline: Variant
    faulted: Variant
    recoveries: tuple[Recovery, ...]
    relaunches: int
    in_place: int
    repetition: ExitReport | None = None
    ignore: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether every fault happened, the run came to its end all the same, and no bit of it differs."""
        return self.verdict.identical and self.faulted.exit_code == 0 and not self.unfired

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the drill has not been passed, in sentences; empty if it has."""
        found = []
        if self.faulted.exit_code:
            found.append(
                f"the run with faults ended with exit code {self.faulted.exit_code}; its last words, from "
                f"{self.faulted.folder / 'output'}:\n{self.faulted.tail()}"
            )
        found += [f"{fault} never happened: the run did not come to its step or moment" for fault in self.unfired]
        if not self.verdict.identical:
            found.append(str(self.verdict))
        if self.unrepeatable:
            found.append(
                f"two undisturbed runs differ, too, in {_listed(self.unrepeatable)}: the script gives other results "
                "each time it is run. Seed it (seed_everything(1, workers=True)); values that depend on time or place "
                "are left out by --ignore NAME"
            )
        elif self.differs_before_faults:
            found.append(
                "the runs differ before the first fault happened: the script depends on something that differs between "
                "runs. Seed it first: seed_everything(1, workers=True)"
            )
        return tuple(found)

    @property
    def unrepeatable(self) -> tuple[str, ...]:
        """Names of the values that differ between two undisturbed runs of the script."""
        return () if self.repetition is None else tuple(self.repetition.by_field())

    @property
    def unused_patterns(self) -> tuple[str, ...]:
        """Patterns in `ignore` that no value's name matches."""
        names = self.verdict.ignored
        return tuple(pattern for pattern in self.ignore if not any(fnmatchcase(name, pattern) for name in names))

    @property
    def differs_before_faults(self) -> bool:
        """Whether something differs that was written before the first fault happened: the script does not repeat."""
        times = [event.at for event in self.faulted.events if event.event == "fault_injected"]
        before = min(times, default=0.0)
        return any(difference.at is not None and difference.at < before for difference in self.verdict.differences)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
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
    ladder: Ladder = AS_THE_SCRIPT_SAYS,
    timeout_s: float | None = None,
    ignore: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> DrillReport:
    """Run a script uninterrupted and with faults, and compare the two.

    The script must give the same result whenever it is run: it has to seed its generators. Where the two runs differ,
    it is run uninterrupted once more, to name the values that do not repeat.

    Args:
        command: a script or `-m` and a module, then its arguments.
        faults: as text in the grammar of `protocol.faults`, or as objects.
        folder: receives `baseline/` and `faulted/`, each with traces, ledger, copies of log files and output.
        nproc: workers that `ckptless` and `torchrun` start; with `python` the script's `devices` says it.
        launcher: how the script is started. `ckptless` runs the agent in this process.
        parent: a fork server to fork the workers of `ckptless` from, to be shared by many drills.
        baseline: an uninterrupted run of the same command that has ended; None to run it.
        isolate: give each run a working directory of its own, for a script that writes files by fixed names.
        env: variables for the script.
        ladder: how the runs recover.
        timeout_s: time after which a run is ended; None for none.
        ignore: shell-style patterns for the names of values that need not be equal.
        progress: is called, in another thread, with how far the runs are.

    Raises:
        OptionsError: the command, the launcher or a fault cannot work.
        LaunchError: the script fails without any fault, or a run took too long.
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
            raise OptionsError(f"{fault}: a drill has one node, and a run does not survive the loss of all its nodes")
        if launcher != "python" and isinstance(fault.rank, int) and fault.rank >= nproc:
            raise OptionsError(f"{fault}: there is no rank {fault.rank} among {nproc}: give --nproc {fault.rank + 1}")


def _require_success(baseline: Variant, command: Sequence[str]) -> None:
    if baseline.exit_code:
        raise LaunchError(
            f"{' '.join(command)} ended with exit code {baseline.exit_code} without any fault; its last words, from "
            f"{baseline.folder / 'output'}:\n{baseline.tail()}"
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
    ladder: Ladder = AS_THE_SCRIPT_SAYS,
    timeout_s: float | None = None,
    progress: Callable[[Progress], None] | None = None,
    expected_steps: int | None = None,
) -> Variant:
    """Run a script once, traced; see `run_drill` for the arguments.

    Args:
        command: a script or `-m` and a module, then its arguments.
        folder: receives all that is known about the run; must be empty or missing.
        faults: what is to go wrong, as text.
        nproc: workers to start.
        launcher: how the script is started.
        parent: forks the workers of `ckptless`.
        isolate: give the run a working directory of its own.
        env: variables for the script.
        ladder: how it recovers.
        timeout_s: time after which it is ended.
        progress: is called with how far it is.
        expected_steps: optimizer steps that it will make, for `progress`.
    """
    if folder.exists() and any(folder.iterdir()):
        raise OptionsError(f"{folder} holds files of another drill: give an empty folder")
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
    """Optimizer steps that a run made; None where it has left no trace."""
    steps = [line.point.step for trace in read_traces(variant.trace).values() for line in trace.lines]
    return max(steps, default=None)


def report_on(
    command: Sequence[str], script: Sequence[Fault], baseline: Variant, faulted: Variant, ignore: Sequence[str] = ()
) -> DrillReport:
    """Compare two runs that have ended.

    Args:
        command: the script and its arguments.
        script: what was to go wrong in the second.
        baseline: the run that was left alone.
        faulted: the run with faults.
        ignore: patterns for the names of values that need not be equal.
    """
    events = faulted.events
    happened = FaultMarks.claimed(faulted.run_folder / "faults") if faulted.run_folder else frozenset()
    # torchrun's agent writes nothing down: there every start of rank 0 is one.
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
