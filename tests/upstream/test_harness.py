"""The whole command, on a few tests of our own in place of Lightning's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.house.code import REPOSITORY
from tests.upstream.comparison import read_expected

TESTS = """
import os

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel


class Failing(BoringModel):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise ValueError("the model's own")
        return super().training_step(batch, batch_idx)


class Recorder(pl.Callback):
    message = ""

    def on_exception(self, trainer, module, exception):
        self.message = str(exception)


def fit(folder, model, *callbacks, **options):
    trainer = pl.Trainer(
        default_root_dir=folder, limit_train_batches=3, limit_val_batches=0, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, callbacks=list(callbacks), **options
    )
    trainer.fit(model)
    return type(trainer.strategy).__name__


def test_that_is_equal(tmp_path):
    fit(tmp_path, BoringModel())


def test_that_raises(tmp_path):
    callback = Recorder()
    with pytest.raises(ValueError, match="the model's own"):
        fit(tmp_path, Failing(), callback)
    assert callback.message == "the model's own"


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_that_differs(tmp_path, strategy):
    assert fit(tmp_path, BoringModel(), strategy=strategy) == "DDPStrategy"


def test_that_ends_its_process(tmp_path):
    if fit(tmp_path, BoringModel()) != "DDPStrategy":
        os._exit(3)


def test_after_it(tmp_path):
    fit(tmp_path, BoringModel())


def test_that_is_listed(tmp_path):
    assert fit(tmp_path, BoringModel()) == "DDPStrategy"


def test_that_trains_nothing():
    pass


def test_that_fails_with_ddp(tmp_path):
    assert fit(tmp_path, BoringModel()) != "DDPStrategy"
"""
EXPECTED = """
[[difference]]
reason = "it has a reason"
tests = ["test_few.py::test_that_is_listed", "test_few.py::test_after_it"]
"""


class Harness:
    """The command with its own set of tests.

    Args:
        folder: receives all files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected, self.list = folder / "expected.toml", folder / "tests.txt"
        suite = folder / "lightning" / "tests" / "tests_pytorch"
        suite.mkdir(parents=True)
        (suite / "test_few.py").write_text(TESTS)
        (folder / "lightning" / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
        self.expected.write_text(EXPECTED)

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the command."""
        paths = {"lightning": self.folder / "lightning", "folder": self.folder / "results"}
        paths |= {"list": self.list, "expected": self.expected}
        given = [f"--{name}={path}" for name, path in paths.items()]
        command = [sys.executable, "-m", "tests.upstream", *given, *options]
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)

    def result(self) -> dict[str, Any]:
        """Return the result of the last comparison."""
        found: dict[str, Any] = json.loads((self.folder / "results" / "result.json").read_text())
        return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.long
def test_differences_are_found_and_listed_ones_accepted(tmp_path: Path) -> None:
    harness = Harness(tmp_path)
    found = harness.run("--discover")
    assert found.returncode == 0, found.stderr
    tests = [test.removeprefix("test_few.py::test_") for test in harness.list.read_text().splitlines()]
    first = ["after_it", "that_differs[auto]", "that_differs[ddp]", "that_ends_its_process", "that_is_equal"]
    assert tests == [*first, "that_is_listed", "that_raises"]

    compared = harness.run("--draft")
    assert compared.returncode == 1, compared.stderr
    differences = {d["test"].removeprefix("test_few.py::test_"): d for d in harness.result()["differences"]}
    assert differences.keys() == {"that_differs[auto]", "that_differs[ddp]", "that_ends_its_process", "that_is_listed"}
    assert differences["that_is_listed"]["reason"] == "it has a reason"
    assert differences["that_ends_its_process"]["found"]["message"] == "its process ended with exit code 3"
    assert harness.result()["stale"] == ["test_few.py::test_after_it"]

    harness.expected.write_text(compared.stdout[compared.stdout.index("[[difference]]") :])
    assert len(read_expected(harness.expected)) == 4
    accepted = harness.run("--resume")
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    assert "3 tests pass with both, 4 with DDP alone, 0 of them unexpectedly" in accepted.stdout
