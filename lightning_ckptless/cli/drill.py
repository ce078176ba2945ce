"""`ckptless drill`: verifies that a script recovers from faults with bit-identical results."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from lightning_ckptless.cli.flags import InPlace, Standbys

if TYPE_CHECKING:
    from lightning_ckptless.testing.drill import DrillReport
    from lightning_ckptless.testing.starters import Ladder


class LauncherName(StrEnum):
    """Command that starts the script."""

    CKPTLESS = "ckptless"
    PYTHON = "python"
    TORCHRUN = "torchrun"


TimeLimit = Annotated[float | None, typer.Option("--timeout", min=0, metavar="SECONDS", help="Time limit for one run.")]
IgnoredValues = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Names of values that may differ. May be given several times."),
]


def drill(
    script: Annotated[str, typer.Argument(help="Training script, or module name with -m.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGUMENTS]", help="Arguments passed to the script, after --.")
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(metavar="FAULT", help="Fault to inject, see above. May be given several times."),
    ] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module, as in python -m.")] = False,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            min=1,
            metavar="N",
            help="Ranks (default: 2, or more if a fault names a higher rank); with python the script decides.",
        ),
    ] = None,
    launcher: Annotated[LauncherName, typer.Option(help="Command that starts the script.")] = LauncherName.CKPTLESS,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the report as JSON.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep traces, ledgers, log files and output here.")
    ] = None,
    isolate: Annotated[bool, typer.Option("--isolate", help="Give each run its own working directory.")] = False,
    max_restarts: Annotated[int, typer.Option(min=0, metavar="N", help="Maximum number of recoveries.")] = 100,
    in_place: InPlace = None,
    standbys: Standbys = None,
    timeout_s: TimeLimit = None,
    ignore: IgnoredValues = None,
) -> None:
    """Run a script without and with faults, and compare every step of the two runs bit for bit.

    The script must be deterministic: it has to seed its random number generators.

    * `ckptless drill train.py --fault kill:rank=1:step=7`
    * `ckptless drill train.py --nproc 4 --fault kill:rank=0:step=3:at=backward --fault raise:rank=2:step=9 -- --lr 0.1`

    FAULT is `kind:rank=R:step=S[:at=MOMENT][:times=N]`, `flip:rank=R:step=S:tensor=NAME`, `wrong:rank=R:step=S` or
    `rewind:step=S:to=T`.

    * kinds: kill, crash, raise, exit, leave, hang, stop
    * R: a rank, or `all`; S: the optimizer step in progress, counted from 1
    * moments: training_step, backward, optimizer_step, commit, mirror, accumulation, validation, epoch_end,
      regroup, connect, restore, rewind, go_back

    PATTERN is a shell-style pattern for the names of tensors, logged values or columns that the report shows:
    `--ignore samples_per_s`, `--ignore 'callback * (Speed)'`.

    Exit code: 0 if the runs are identical, 1 if not, 2 if the drill cannot run.
    """
    from lightning_ckptless.errors import OptionsError
    from lightning_ckptless.testing.starters import Ladder

    if not fault:
        raise OptionsError("no fault given: use --fault, e.g. --fault kill:rank=1:step=7")
    command = [*(["-m"] if module else []), script, *(arguments or [])]
    output = folder or Path(tempfile.mkdtemp(prefix="ckptless-drill-"))
    report = run_and_report(
        command,
        fault,
        output,
        nproc=nproc or ranks_named(fault),
        launcher=launcher,
        isolate=isolate,
        ladder=Ladder(max_restarts, in_place, standbys),
        timeout_s=timeout_s,
        ignore=ignore or (),
    )
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    _finish(report.identical, output, keep=folder is not None)


def _finish(identical: bool, output: Path, *, keep: bool) -> NoReturn:
    """Remove the output of a successful drill unless the user asked to keep it, and exit."""
    if identical and not keep:
        shutil.rmtree(output)
    else:
        typer.echo(f"output kept in {output}", err=True)
    raise typer.Exit(0 if identical else 1)


def ranks_named(faults: Sequence[str]) -> int:
    """Return the number of ranks needed for every fault to find its rank, at least two."""
    from lightning_ckptless.protocol.fault_script import parse_faults

    return max(2, *(fault.rank + 1 for fault in parse_faults(",".join(faults)) if isinstance(fault.rank, int)), 0)


def run_and_report(
    command: Sequence[str],
    faults: Sequence[str],
    folder: Path,
    *,
    nproc: int,
    launcher: str = "ckptless",
    isolate: bool = False,
    ladder: Ladder | None = None,
    timeout_s: float | None = None,
    ignore: Sequence[str] = (),
) -> DrillReport:
    """Run a drill with progress on stderr and the report on stdout.

    Args:
        command: script, or `-m` and a module, followed by its arguments.
        faults: faults to inject.
        folder: folder that receives all output.
        nproc: number of ranks.
        launcher: command that starts the script.
        isolate: give each run its own working directory.
        ladder: recovery settings; None for those of the script.
        timeout_s: time limit for one run, in seconds.
        ignore: patterns for the names of values that may differ.
    """
    from rich.console import Console

    from lightning_ckptless.cli.view.drill import ProgressView, show_report
    from lightning_ckptless.testing.drill import Ladder, run_drill

    with ProgressView(Console(stderr=True)) as view:
        report = run_drill(
            command,
            ",".join(faults),
            folder=folder,
            nproc=nproc,
            launcher=launcher,  # type: ignore[arg-type]  # checked where it is used
            isolate=isolate,
            ladder=ladder or Ladder(),
            timeout_s=timeout_s,
            ignore=ignore,
            progress=view.update,
        )
    show_report(report, Console())
    return report
