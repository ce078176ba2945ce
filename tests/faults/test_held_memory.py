"""Slots that do not fit into a small shared memory file system are kept in the agent's memory; recovery uses them."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from textwrap import dedent

import pytest
from typer.testing import CliRunner

from lightning_ckptless.cli.app import app
from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.replica.arena import find_arenas
from lightning_ckptless.testing.drill import Ladder, Variant, run_drill, run_variant
from tests.faults.conftest import REPOSITORY
from tests.faults.matrix import is_version
from tests.mounts import small_memory

PROGRAM = """
    import os, sys
    from pathlib import Path
    import torch
    from lightning.pytorch import Callback, Trainer, seed_everything
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning_ckptless import CkptlessStrategy

    class CountLinks(Callback):
        def on_train_batch_start(self, trainer, *_):
            links = [path for path in Path(os.environ["ARENA_FOLDER"]).glob("ckptless-*/shard-*") if path.is_symlink()]
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
    durable = {"durable_every_n_steps": 2, "durable_dir": "durable"} if "DURABLE" in os.environ else {}
    Trainer(
        strategy=CkptlessStrategy(**durable), accelerator="cpu", devices=2, max_epochs=-1,
        max_steps=int(os.environ.get("STEPS", "6")), callbacks=[CountLinks()], logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    ).fit(Model())
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the training script."""
    (path := tmp_path_factory.mktemp("held") / "program.py").write_text(dedent(PROGRAM))
    return [str(path)]


@pytest.fixture(scope="module")
def undisturbed(program: list[str], parent: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """The undisturbed run, with all slots in files."""
    folder = tmp_path_factory.mktemp("baseline") / "run"
    variant = run_variant(
        program,
        folder,
        parent=parent,
        isolate=True,
        env={"PYTHONPATH": str(REPOSITORY), "ARENA_FOLDER": ".", "DURABLE": "yes"},
    )
    assert variant.exit_code == 0, variant.tail()
    return variant


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "ladder", "mib", "recovered"),
    [
        # Before the first step there is no optimizer state, so the slots fit into files.
        pytest.param("kill:rank=1:step=3", Ladder(in_place=True), 10, (1, 0), id="in_place"),
        pytest.param("kill:rank=all:step=4", Ladder(in_place=False), 6, (0, 1), id="relaunch"),
    ],
)
def test_slots_that_do_not_fit_into_shared_memory_recover_from_agent_memory(
    faults: str,
    ladder: Ladder,
    mib: int,
    recovered: tuple[int, int],
    program: list[str],
    parent: ForkServer,
    undisturbed: Variant,
    tmp_path: Path,
) -> None:
    with small_memory(tmp_path / "small", mib) as small:
        report = run_drill(
            program,
            faults,
            folder=tmp_path / "drill",
            parent=parent,
            baseline=undisturbed,
            isolate=True,
            env=_environment(small, DURABLE="yes"),
            ladder=ladder,
            timeout_s=120,
        )
        assert report.identical, report.problems
        assert (report.in_place, report.relaunches) == recovered
        (recovery,) = report.recoveries
        assert is_version(recovery.version, "step 2" if report.in_place else "step 3")
        assert recovery.sources["own arena"] > 0
        links = {path.read_text() for path in (report.faulted.folder / "cwd").glob("links-*-5")}
        assert links == {"4"}, "two slots per shard"
        (held,) = [event for event in report.faulted.events if event.event == "memory_held"]
        assert re.search(rf"4 slots need \d+ more bytes.* free in {small}.*--shm-size=\d+m", held.fields["reason"])
        assert [event.event for event in report.faulted.events].count("durable_written") >= 2
        assert not list(small.iterdir())


@pytest.mark.slow
@pytest.mark.long
def test_torchrun_refuses_ranks_that_do_not_fit_into_shared_memory(program: list[str], tmp_path: Path) -> None:
    with small_memory(tmp_path / "small", 6) as small:
        variant = run_variant(
            program,
            tmp_path / "run",
            launcher="torchrun",
            isolate=True,
            env=_environment(small),
            ladder=Ladder(max_restarts=0),
        )
        assert variant.exit_code != 0
        output = "".join(path.read_text() for path in (tmp_path / "run" / "output").rglob("*") if path.is_file())
        assert "4 slots need 80" in output and "not started by an agent of this package" in output
        assert "FileNotFoundError" not in output and "No space left" not in output
        assert not list(small.glob("ckptless-*/shard-*"))


@pytest.mark.slow
@pytest.mark.long
def test_a_live_run_is_exported_and_its_memory_is_freed_with_the_agent(
    program: list[str], tmp_path: Path, stack: ExitStack
) -> None:
    small = stack.enter_context(small_memory(tmp_path / "small", 6))
    words = ["--nproc-per-node=2", "--rdzv-id=held", f"--run-root={tmp_path / 'runs'}", *program]
    log = stack.enter_context((tmp_path / "log").open("w"))
    agent = subprocess.Popen(
        [sys.executable, "-m", "lightning_ckptless.runner", *words],
        cwd=tmp_path,
        env={**os.environ, **_environment(small, DURABLE="yes", STEPS="100000")},
        stdout=log,
        stderr=log,
    )
    stack.callback(agent.wait)
    stack.callback(agent.kill)
    ledger = tmp_path / "runs" / "held" / "ledger.jsonl"
    while not ledger.exists() or not read_ledger(ledger, only="durable_written"):
        assert agent.poll() is None, (tmp_path / "log").read_text()
        select.select([], [], [], 0.05)
    where = ["held", "--run-root", str(tmp_path / "runs")]
    shown = json.loads(_ckptless("status", *where, "--json"))
    assert {slot["state"] for slot in shown["slots"]} & {"committed", "sealed"} and len(shown["slots"]) == 4
    assert "from shared memory" in _ckptless("export", *where, "-o", str(tmp_path / "live.ckpt"))
    assert "its agent is alive" in _ckptless("clean", "--arena-dir", str(small), "--dry-run")
    agent.kill()
    agent.wait()
    assert find_arenas(small)[0].bytes < 1 << 20
    assert "from the durable state" in _ckptless("export", *where, "-o", str(tmp_path / "late.ckpt"))
    assert "removed" in _ckptless("clean", "held", "--arena-dir", str(small))
    assert not list(small.iterdir())


def _environment(small: Path, **more: str) -> dict[str, str]:
    return {"PYTHONPATH": str(REPOSITORY), "ARENA_FOLDER": str(small), "CKPTLESS_ARENA_DIR": str(small), **more}


def _ckptless(*words: str) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.output
