"""`ckptless run`: runs the agent of one node.

Apart from `app`, because each sub-command has its own file.
"""

from __future__ import annotations

from typing import Annotated

import typer


def run(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[OPTIONS] SCRIPT [ARGUMENTS]", show_default=False)
    ] = None,
) -> None:
    """Run a training script on all ranks of this node and replace workers that die.

    Takes the options of torchrun and some of its own; `ckptless run --help` lists them.

    * `ckptless run --nproc-per-node 4 train.py --lr 0.1`
    * `ckptless run --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29400 --rdzv-id NAME train.py`
    """
    from lightning_ckptless.runner import main

    raise typer.Exit(main(arguments or ["--help"]))
