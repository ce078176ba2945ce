"""Every argument of Lightning's `Trainer`: a run that uses it is killed and compared with the undisturbed run.

Arguments that do not interact share a run.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless.testing.starters import Ladder
from tests.faults.conftest import Drill
from tests.faults.matrix import BASE, Cell
from tests.trainer.tiny import DISTRIBUTIONS, tiny_trainer

SHORT = replace(BASE, epochs=1)

RUNS: dict[str, tuple[Cell, dict[str, Any]]] = {
    "fast_dev_run": (Cell("kill:rank=0:step=2", replace(SHORT, logger="csv")), {"fast_dev_run": 3}),
    "time-based validation": (
        Cell("kill:rank=0:step=3", SHORT),
        {"val_check_interval": "00:01:00:00", "check_val_every_n_epoch": None, "max_time": {"hours": 1}},
    ),
    "limits": (
        Cell("kill:rank=1:step=4"),
        {
            "limit_train_batches": 0.5,
            "limit_val_batches": 0.5,
            "limit_test_batches": 1,
            "limit_predict_batches": 0.5,
            "num_sanity_val_steps": -1,
            "min_epochs": 2,
            "log_every_n_steps": 2,
        },
    ),
    "overfit_batches": (Cell("kill:rank=1:step=5"), {"overfit_batches": 3}),
    "profiler and checks": (
        Cell("kill:rank=0:step=4:at=backward", SHORT),
        {
            "profiler": "simple",
            "detect_anomaly": True,
            "deterministic": True,
            "benchmark": False,
            "inference_mode": False,
            "enable_model_summary": True,
            "enable_autolog_hparams": False,
        },
    ),
    "barebones": (
        Cell("kill:rank=0:step=4", replace(SHORT, logger="none")),
        {"barebones": True, "log_every_n_steps": None, "enable_progress_bar": None, "enable_model_summary": None},
    ),
    "accumulation": (
        Cell("kill:rank=1:step=2:at=accumulation", SHORT),
        {
            "accumulate_grad_batches": 2,
            "val_check_interval": 3,
            "gradient_clip_val": 0.5,
            "gradient_clip_algorithm": "value",
        },
    ),
    "steps instead of epochs": (Cell("kill:rank=0:step=9"), {"max_epochs": -1, "max_steps": 9, "min_steps": 4}),
    "dataloaders reloaded every epoch": (
        Cell("kill:rank=1:step=8", replace(BASE, data="sampler")),
        {"reload_dataloaders_every_n_epochs": 1, "use_distributed_sampler": False, "check_val_every_n_epoch": 2},
    ),
    "asynchronous checkpoints": (
        Cell("kill:rank=0:step=5", replace(SHORT, checkpoint_every=2)),
        {"plugins": ["AsyncCheckpointIO"]},
    ),
    "double precision": (Cell("kill:rank=1:step=3", SHORT), {"precision": "64-true"}),
}
NOT_LONG = ("fast_dev_run", "time-based validation")

IN_OTHER_TESTS = {
    "accelerator": "tests/device/test_kill.py",
    "callbacks": "tests/faults/matrix.py",
    "default_root_dir": "tests/lab/parts.py",
    "devices": "tests/faults/matrix.py",
    "enable_checkpointing": "tests/faults/matrix.py",
    "enable_progress_bar": "tests/faults/test_terminal.py",
    "logger": "tests/faults/matrix.py",
    "num_nodes": "tests/faults/test_nodes.py",
    "strategy": "tests/faults/test_options.py",
}
"""Arguments that other tests use in runs with kills."""

NOT_TESTED = {
    "sync_batchnorm": "torch synchronizes batch norm on accelerators only; plain DDP fails on CPUs, too",
    "model_registry": "it names the upload target of checkpoints in an external service",
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_argument_is_covered(distribution: str) -> None:
    arguments = {*inspect.signature(importlib.import_module(distribution).Trainer.__init__).parameters} - {"self"}
    rows = {name for _, settings in RUNS.values() for name in settings} | {*IN_OTHER_TESTS} | {*NOT_TESTED}
    assert arguments - rows == set(), "arguments of Trainer that no run with kills uses"
    assert rows - arguments == set(), "listed arguments that Trainer does not have"


@pytest.mark.parametrize("path", sorted({*IN_OTHER_TESTS.values()}))
def test_the_other_tests_exist(path: str) -> None:
    assert (Path(__file__).parents[2] / path).exists()


@pytest.mark.parametrize(
    "name", [name if name in NOT_LONG else pytest.param(name, marks=pytest.mark.long) for name in RUNS]
)
def test_kill(name: str, drill: Drill) -> None:
    cell, settings = RUNS[name]
    report = drill(replace(cell, options=replace(cell.options, settings=repr(settings))), Ladder(max_restarts=20))
    assert report.problems == ()
    assert report.identical
    assert (report.in_place, report.relaunches) == (cell.recoveries, 0)


# ---------------------------------------------------------------------- loops

COUNTED = "counter"  # part of every version
GIVEN = "given"  # set by arguments or by the script
DERIVED = "derived"  # computed from the others, or set up again with the data
LOOPS = {
    "fit_loop": {
        "epoch_loop": COUNTED, "epoch_progress": COUNTED, "restarting": COUNTED, "is_resuming": COUNTED,
        "restarted_mid_epoch": COUNTED, "restarted_on_epoch_end": COUNTED, "restarted_on_epoch_start": COUNTED,
        "resumed_on_epoch_end": COUNTED, "batch_idx": DERIVED, "total_batch_idx": DERIVED, "done": DERIVED,
        "skip": DERIVED, "max_batches": DERIVED, "max_epochs": GIVEN, "min_epochs": GIVEN, "max_steps": GIVEN,
        "min_steps": GIVEN, "trainer": GIVEN,
    },
    "epoch_loop": {
        "automatic_optimization": COUNTED, "manual_optimization": COUNTED, "batch_progress": COUNTED,
        "scheduler_progress": COUNTED, "val_loop": COUNTED, "restarting": COUNTED, "is_resuming": COUNTED,
        "restarted_on_last": COUNTED, "restarted_on_train_batch_end": COUNTED, "batch_idx": DERIVED,
        "total_batch_idx": DERIVED, "done": DERIVED, "global_step": DERIVED, "max_steps": GIVEN, "min_steps": GIVEN,
        "trainer": GIVEN,
    },
    "automatic_optimization": {
        "optim_progress": COUNTED, "restarting": COUNTED, "is_resuming": COUNTED, "trainer": GIVEN,
    },
    "manual_optimization": {
        "optim_step_progress": COUNTED, "restarting": COUNTED, "is_resuming": COUNTED, "trainer": GIVEN,
    },
    "val_loop": {
        "batch_progress": COUNTED, "restarting": COUNTED, "is_resuming": COUNTED, "restarted_mid_evaluation": COUNTED,
        "max_batches": DERIVED, "num_dataloaders": DERIVED, "skip": DERIVED, "inference_mode": GIVEN, "verbose": GIVEN,
        "trainer": GIVEN,
    },
}  # fmt: skip
"""How each public attribute of the loops is treated when a version is restored."""


def _public_attributes(loop: Any) -> set[str]:
    properties = {name for name, value in inspect.getmembers(type(loop)) if isinstance(value, property)}
    return {name for name in {*vars(loop)} | properties if not name.startswith("_")}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_loop_attribute_is_classified(distribution: str, tmp_path: Path) -> None:
    fit = tiny_trainer(tmp_path, distribution).fit_loop
    epoch = fit.epoch_loop
    loops = {"fit_loop": fit, "epoch_loop": epoch, "val_loop": epoch.val_loop}
    loops |= {name: getattr(epoch, name) for name in ("automatic_optimization", "manual_optimization")}
    assert {name: _public_attributes(loop) for name, loop in loops.items()} == {
        name: {*rows} for name, rows in LOOPS.items()
    }
    # A version contains the loops' own state dict and a few private flags.
    assert {"epoch_progress", "epoch_loop.batch_progress", "epoch_loop.scheduler_progress"} <= {*fit.state_dict()}
