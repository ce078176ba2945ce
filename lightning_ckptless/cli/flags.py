"""Flags of commands that are options of a run or of its strategy, with the help that is declared there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightning_ckptless.configuration.flags import help_of, metavar_of
from lightning_ckptless.configuration.option import options_of
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.options import CkptlessOptions

_OF_STRATEGY = options_of(CkptlessOptions)
_OF_RUN = options_of(LaunchConfig)
_OF_LEDGER = "the one in the ledger"

DEFAULT_COPIES: int = _OF_STRATEGY["copies"].default
DEFAULT_FAILURE_DOMAIN: str = _OF_STRATEGY["failure_domain"].default


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


Copies = Annotated[
    int,
    typer.Option(min=0, metavar=metavar_of(_OF_STRATEGY["copies"]), help=_sentence(_OF_STRATEGY["copies"].about.help)),
]
FailureDomain = Annotated[str, typer.Option(metavar="NAME", help=_sentence(_OF_STRATEGY["failure_domain"].about.help))]
InPlace = Annotated[bool | None, typer.Option("--in-place/--no-in-place", help=_sentence(help_of(_OF_RUN["in_place"])))]
Standbys = Annotated[
    int | None,
    typer.Option(min=0, metavar=metavar_of(_OF_RUN["standbys"]), help=_sentence(help_of(_OF_RUN["standbys"]))),
]
RunRoot = Annotated[Path | None, typer.Option(metavar="FOLDER", help=_sentence(help_of(_OF_RUN["run_root"])))]
ArenaDir = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help=_sentence(help_of(_OF_STRATEGY["arena_dir"], _OF_RUN["arena_dir"].about.none))),
]
ArenaDirOfRun = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help=_sentence(help_of(_OF_STRATEGY["arena_dir"], _OF_LEDGER)))
]
