"""The command `ckptless`: registers its sub-commands, one file each, and reports their errors."""

from __future__ import annotations

import sys

import typer

from lightning_ckptless.cli.clean import clean
from lightning_ckptless.cli.doctor import doctor
from lightning_ckptless.cli.drain import drain
from lightning_ckptless.cli.drill import drill
from lightning_ckptless.cli.export import export
from lightning_ckptless.cli.forecast import forecast
from lightning_ckptless.cli.rewind import rewind
from lightning_ckptless.cli.run import run
from lightning_ckptless.cli.status import status
from lightning_ckptless.cli.timeline import timeline
from lightning_ckptless.cli.watch import watch
from lightning_ckptless.errors import CkptlessError

USAGE_EXIT_CODE = 2

app = typer.Typer(
    name="ckptless",
    help="Fault-tolerant training for PyTorch Lightning: survives the loss of any rank, bit for bit.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

# Everything after `run`, `--help` included, is parsed by torchrun's argument parser.
_PASS_THROUGH = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}
app.command(context_settings=_PASS_THROUGH)(run)
for command in (doctor, drain, drill, forecast, status, watch, rewind, export, clean, timeline):
    app.command()(command)


def main() -> None:
    """Run the command line. Reports a `CkptlessError` as one line on stderr and exit code 2, without a traceback."""
    try:
        app()
    except CkptlessError as error:
        print(f"ckptless: {error}", file=sys.stderr)
        sys.exit(USAGE_EXIT_CODE)
