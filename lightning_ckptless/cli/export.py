"""`ckptless export`: writes the state of a run to a file, during the run or after it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lightning_ckptless.cli.flags import ArenaDirOfRun, RunRoot


class Format(StrEnum):
    """Format of the exported file."""

    LIGHTNING = "lightning"
    DCP = "dcp"
    SAFETENSORS = "safetensors"


def export(
    run: Annotated[
        str | None,
        typer.Argument(help="Run id, run folder or folder of durable states (default: the newest run)."),
    ] = None,
    step: Annotated[str, typer.Option(metavar="N", help="Optimizer step, or latest.")] = "latest",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File, or folder with dcp (default: named by run and step).")
    ] = None,
    kind: Annotated[Format, typer.Option("--format", help="Format to write, see above.")] = Format.LIGHTNING,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")] = False,
    run_root: RunRoot = None,
    arena_dir: ArenaDirOfRun = None,
) -> None:
    """Write the state of a live or finished run to a file, without slowing a live run down.

    * `ckptless export -o model.ckpt`
    * `ckptless export 20250131-120000-3fa2 --step 120 --format safetensors`
    * `ckptless export /shared/durable -o model.ckpt`

    The state is read from shared memory, which holds the last two versions, or from a durable state. The file never
    mixes two versions: if one is overwritten while it is being read, the newest is read instead.

    Formats:

    * `lightning`: a checkpoint for `Trainer.fit(ckpt_path=...)` and `LightningModule.load_from_checkpoint`
    * `dcp`: a folder for `torch.distributed.checkpoint.load`
    * `safetensors`: the weights only
    """
    from lightning_ckptless.cli.export_source import find_source
    from lightning_ckptless.errors import OptionsError

    at = None
    if step != "latest":
        if not step.isdigit():
            raise OptionsError(f"--step {step!r}: expected a number or 'latest'")
        at = int(step)
    # Report a wrong name before the slow import of torch.
    source = find_source(run, run_root, arena_dir)
    from lightning_ckptless.cli.export_file import write_export

    typer.echo(write_export(source, at, kind.value, output, force=force))
