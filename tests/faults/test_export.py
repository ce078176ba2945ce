"""Export of the state of a live run: the same content as Lightning's own checkpoint, and Lightning can load it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lightning_ckptless.cli.app import app
from tests.faults.conftest import REPOSITORY
from tests.faults.matrix import BASE
from tests.faults.test_restart import Run, job

__all__ = ["job"]
LAB = Path(__file__).parents[1] / "lab"
OPTIONS = replace(BASE, checkpoint_every=1, ema=True, slow_mirror_s=0.15, strategy_options="{'durable_every_s': 30.0}")

READER = """
    import json, sys
    import lightning.pytorch as pl
    import torch
    from parts import Options, data_class, make_trainer, model_class

    options = Options(devices=1, epochs=3, ema=True)
    distribution = pl

    def score(path):
        pl.seed_everything(1, verbose=False)
        model = model_class(distribution, options).load_from_checkpoint(path)
        model.eval()
        with torch.no_grad():
            return float(sum(model.head(model.body(torch.full((4, 6), 0.1 * i))).logsumexp(1).sum() for i in range(9)))

    exported, own = sys.argv[1:]
    model, data = model_class(distribution, options)(), data_class(distribution, options)()
    trainer = make_trainer(distribution, options, "auto")
    trainer.fit(model, datamodule=data, ckpt_path=exported)
    print(json.dumps({"exported": score(exported), "own": score(own), "steps": trainer.global_step}))
"""


def export(job: Run, *words: str) -> str:
    result = CliRunner().invoke(app, ["export", job.run_id, "--run-root", str(job.folder / "runs"), *words])
    assert result.exit_code == 0, result.output
    return result.output


def equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(equal(*pair) for pair in zip(found, expected, strict=True))
    return bool(found == expected)


@pytest.fixture
def live(job: Run) -> Path:
    """A checkpoint exported while the run was training."""
    training = threading.Thread(target=lambda: job.start(OPTIONS))
    training.start()
    target = job.folder / "live.ckpt"
    try:
        while len(job.events("committed")) < 2 and training.is_alive():
            training.join(0.05)
        assert "from shared memory" in export(job, "-o", str(target))
        assert training.is_alive()
    finally:
        training.join()
    return target


def test_export_of_a_live_run(live: Path, job: Run) -> None:
    found = torch.load(live, weights_only=True)
    step = found["global_step"]
    assert 2 <= step < 12
    (own,) = job.folder.rglob(f"*-step={step}.ckpt")
    expected = torch.load(own, weights_only=True)
    assert found.keys() == expected.keys()
    # The export has the counters after the batch, Lightning's file those during its last hook.
    for name in expected.keys() - {"loops", "callbacks"}:
        assert equal(found[name], expected[name]), name
    assert found["callbacks"].keys() == expected["callbacks"].keys()
    assert found["loops"].keys() == expected["loops"].keys()
    _assert_lightning_resumes(live, own)
    _assert_other_formats(job, found)


def _assert_lightning_resumes(live: Path, own: Path) -> None:
    """A new process loads the same model from the export and resumes from it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(LAB)])}
    code = "\n".join(line[4:] for line in READER.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", code, str(live), str(own)],
        cwd=live.parent, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["exported"] == result["own"]
    assert result["steps"] > 12


def _assert_other_formats(job: Run, live: dict[str, Any]) -> None:
    """The final state can be exported in the other formats."""
    target = job.folder / "weights.safetensors"
    assert "step 12" in export(job, "-o", str(target), "--format", "safetensors")
    data = target.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    head = json.loads(data[8 : 8 + length])
    assert head.pop("__metadata__")["step"] == "12"
    assert head.keys() == live["current_model_state"].keys()
    assert max(facts["data_offsets"][1] for facts in head.values()) == len(data) - 8 - length
    assert "step 12" in export(job, "-o", str(job.folder / "state"), "--format", "dcp")
    assert (job.folder / "state" / ".metadata").exists()
