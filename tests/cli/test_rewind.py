"""`ckptless rewind` asks the agents of a live run only."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from lightning_ckptless.cli.app import app
from lightning_ckptless.errors import LaunchError
from tests.cli.ledgers import RUN_ID, write_ledger


def test_a_run_that_has_ended_is_not_asked(tmp_path: Path) -> None:
    write_ledger(tmp_path, ended=True)
    result = CliRunner().invoke(app, ["rewind", RUN_ID, "--to-step", "3", "--run-root", str(tmp_path)])
    assert isinstance(result.exception, LaunchError)
    assert str(result.exception) == f"{RUN_ID} has ended: there is nothing to rewind"
