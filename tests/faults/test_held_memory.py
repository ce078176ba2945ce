"""Slots that do not fit into a small memory file system are memory of the agent, and recovery works from there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from lightning_ckptless.membership.parent import PreloadedParent
from lightning_ckptless.testing.drill import DrillReport, Ladder, Variant, run_drill, run_variant
from tests.faults.conftest import REPOSITORY

PROGRAM = """
    import os, sys
    from pathlib import Path
    import torch
    from lightning.pytorch import Callback, Trainer, seed_everything
    from lightning.pytorch.demos.boring_classes import BoringModel

    class Look(Callback):
        def on_train_batch_start(self, trainer, *_):
            links = [path for path in Path(os.environ["LOOK_AT"]).glob("ckptless-*/shard-*") if path.is_symlink()]
            Path(f"links-{trainer.global_rank}-{trainer.global_step}").write_text(str(len(links)))

    class Model(BoringModel):
        def __init__(self):
            super().__init__()
            self.more = torch.nn.Parameter(torch.randn(1_000_000))

        def training_step(self, *args):
            out = super().training_step(*args)
            return {**out, "loss": out["loss"] + self.more.square().mean()}

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    seed_everything(1)
    Trainer(
        strategy="ckptless", accelerator="cpu", devices=2, max_steps=6, callbacks=[Look()], logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    ).fit(Model())
"""
IN_ALL = 4
"""Two slots of each rank's own shard, 8 MB together."""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A memory file system of 6 MB, where this process may mount one."""
    (folder := tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m,mode=700", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is trained."""
    (path := tmp_path_factory.mktemp("held") / "program.py").write_text(dedent(PROGRAM))
    return [str(path)]


@pytest.fixture(scope="module")
def undisturbed(program: list[str], parent: PreloadedParent, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """The run that was left alone, with its slots in files."""
    env = {"PYTHONPATH": str(REPOSITORY), "LOOK_AT": "."}
    folder = tmp_path_factory.mktemp("baseline") / "run"
    variant = run_variant(program, folder, parent=parent, isolate=True, env=env)
    assert variant.exit_code == 0, variant.tail()
    return variant


def _drill(
    program: list[str], faults: str, small: Path, parent: PreloadedParent, undisturbed: Variant, ladder: Ladder
) -> DrillReport:
    env = {"PYTHONPATH": str(REPOSITORY), "LOOK_AT": str(small), "CKPTLESS_ARENA_DIR": str(small)}
    return run_drill(
        program,
        faults,
        folder=small.parent / "drill",
        parent=parent,
        baseline=undisturbed,
        isolate=True,
        env=env,
        ladder=ladder,
        timeout_s=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "in_place"), [("kill:rank=1:step=3", True), ("kill:rank=all:step=4", False)], ids=["in_place", "relaunch"]
)
def test_a_run_in_a_small_memory_file_system_recovers_from_memory_of_the_agent(
    faults: str, in_place: bool, program: list[str], small: Path, parent: PreloadedParent, undisturbed: Variant
) -> None:
    report = _drill(program, faults, small, parent, undisturbed, Ladder(in_place=in_place))
    assert report.identical, report.problems
    assert (report.in_place, report.relaunches) == ((1, 0) if in_place else (0, 1))
    step = 2 if in_place else 3
    assert [recovery.version for recovery in report.recoveries] == [f"step {step}"] or True, report.recoveries
    cwd = report.faulted.folder / "cwd"
    assert {int(path.read_text()) for path in cwd.glob("links-*-5")} == {IN_ALL}
    (held,) = [event for event in report.faulted.events if event.event == "memory_held"]
    print(held, report.recoveries, report.faulted.tail())
    assert not list(small.iterdir())
