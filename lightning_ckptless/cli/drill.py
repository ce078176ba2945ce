"""`ckptless drill`: proves on any script that faults leave no trace."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from lightning_ckptless.testing.drill import DrillReport
    from lightning_ckptless.testing.starters import Ladder


class LauncherName(StrEnum):
    """How the script is started."""

    CKPTLESS = "ckptless"
    PYTHON = "python"
    TORCHRUN = "torchrun"


TimeLimit = Annotated[
    float | None, typer.Option("--timeout", min=0, metavar="SECONDS", help="Time that one run may take.")
]
IgnoredValues = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Values that need not be equal, by name. May be given several times."),
]


def drill(
    script: Annotated[str, typer.Argument(help="Training script, or the name of a module with -m.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGUMENTS]", help="Arguments passed to the script, after --.")
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(metavar="FAULT", help="What goes wrong, as below. May be given several times."),
    ] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module, as in python -m.")] = False,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            min=1,
            metavar="N",
            help="Ranks (default: 2, or as many as the faults name); with python the script's.",
        ),
    ] = None,
    launcher: Annotated[LauncherName, typer.Option(help="How the script is started.")] = LauncherName.CKPTLESS,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON, too.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep traces, ledgers, log files and output here.")
    ] = None,
    isolate: Annotated[bool, typer.Option("--isolate", help="Give each run a working directory of its own.")] = False,
    max_restarts: Annotated[int, typer.Option(min=0, metavar="N", help="Recoveries after which a run gives up.")] = 100,
    in_place: Annotated[
        bool | None, typer.Option("--in-place/--no-in-place", help="Recover so; else as the script's strategy says.")
    ] = None,
    standbys: Annotated[
        int | None, typer.Option(min=0, metavar="K", help="Standbys; else as many as the script's strategy says.")
    ] = None,
    timeout_s: TimeLimit = None,
    ignore: IgnoredValues = None,
) -> None:
    """Run a script uninterrupted and with faults, and compare every step of both.

    The script must give the same result each time: it has to seed its random numbers.

    * `ckptless drill train.py --fault kill:rank=1:step=7`
    * `ckptless drill train.py --nproc 4 --fault kill:rank=0:step=3:at=backward --fault raise:rank=2:step=9 -- --lr 0.1`

    FAULT is `kind:rank=R:step=S[:at=MOMENT][:times=N]`.

    * kinds: kill, crash, raise, exit, leave, hang, stop
    * R: a rank or all; S: the optimizer step that is being made, counted from 1
    * moments: training_step, backward, optimizer_step, commit, mirror, accumulation, validation, epoch_end,
      regroup, restore

    PATTERN is a shell-style pattern for the name of a tensor, a logged value or a column, as the report names them:
    `--ignore samples_per_s`, `--ignore 'callback * (Speed)'`.

    Exit code: 0 if the runs are identical, 1 if not, 2 if the drill cannot be held.
    """
    from lightning_ckptless.errors import OptionsError
    from lightning_ckptless.testing.starters import Ladder

    if not fault:
        raise OptionsError("nothing goes wrong: give --fault, e.g. --fault kill:rank=1:step=7")
    command = [*(["-m"] if module else []), script, *(arguments or [])]
    place = folder or Path(tempfile.mkdtemp(prefix="ckptless-drill-"))
    report = hold_drill(
        command,
        fault,
        place,
        nproc=nproc or ranks_named(fault),
        launcher=launcher,
        isolate=isolate,
        ladder=Ladder(max_restarts, in_place, standbys),
        timeout_s=timeout_s,
        ignore=ignore or (),
    )
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    _end(report.identical, place, keep=folder is not None)


def _end(identical: bool, place: Path, *, keep: bool) -> NoReturn:
    """Leave nothing behind that nobody will want to look at, and exit."""
    if identical and not keep:
        shutil.rmtree(place)
    else:
        typer.echo(f"kept in {place}", err=True)
    raise typer.Exit(0 if identical else 1)


def ranks_named(faults: Sequence[str]) -> int:
    """How many ranks there have to be for all faults to find theirs; two at least."""
    from lightning_ckptless.protocol.fault_script import parse_faults

    return max(2, *(fault.rank + 1 for fault in parse_faults(",".join(faults)) if isinstance(fault.rank, int)), 0)


def hold_drill(
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
    """Hold a drill in front of the user: progress on stderr while it runs, the report on stdout.

    Args:
        command: a script or `-m` and a module, then its arguments.
        faults: what is to go wrong.
        folder: receives everything.
        nproc: ranks.
        launcher: how the script is started.
        isolate: a working directory for each run.
        ladder: how the runs recover; None for as the script says.
        timeout_s: seconds that one run may take.
        ignore: patterns for the names of values that need not be equal.
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
