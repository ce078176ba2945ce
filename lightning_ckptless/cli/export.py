"""`ckptless export`: the state of a run as a file, while the run goes on and after."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """What kind of file."""

    LIGHTNING = "lightning"
    DCP = "dcp"
    SAFETENSORS = "safetensors"


def export(
    run: Annotated[
        str | None, typer.Argument(help="Id or folder of the run, or a folder of durable states; the newest run.")
    ] = None,
    step: Annotated[str, typer.Option(metavar="N", help="Optimizer step, or latest.")] = "latest",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File, or folder with dcp (default: named by run and step).")
    ] = None,
    kind: Annotated[Format, typer.Option("--format", help="What is written, as below.")] = Format.LIGHTNING,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    run_root: Annotated[
        Path | None, typer.Option(help="Folder of all runs (default: CKPTLESS_RUN_ROOT, or ./ckptless).")
    ] = None,
    arena_dir: Annotated[
        Path | None, typer.Option(help="Folder of the shared memory (default: as the run says).")
    ] = None,
) -> None:
    """Write the state of a run as a file: of a live one without slowing it, of a dead one from what is left.

    * `ckptless export -o model.ckpt`
    * `ckptless export 20250131-120000-3fa2 --step 120 --format safetensors`
    * `ckptless export /shared/durable -o model.ckpt`

    A run's state is read from shared memory, which holds its last two versions, or else from its durable states. A
    version that is overwritten while it is read is never mixed with the next one: the newest is read instead.

    Formats:

    * `lightning`: a checkpoint, for `Trainer.fit(ckpt_path=...)` and `LightningModule.load_from_checkpoint`
    * `dcp`: a folder, for `torch.distributed.checkpoint.load`
    * `safetensors`: the weights alone
    """
    from lightning_ckptless.cli.export_source import find_source
    from lightning_ckptless.errors import OptionsError

    at = None
    if step != "latest":
        if not step.isdigit():
            raise OptionsError(f"--step {step!r}: expected a number or 'latest'")
        at = int(step)
    # A wrong name is told before torch is imported.
    source = find_source(run, run_root, arena_dir)
    from lightning_ckptless.cli.export_file import write_export

    typer.echo(write_export(source, at, kind.value, output, force=force))
