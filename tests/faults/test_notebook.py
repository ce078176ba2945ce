"""Training from a notebook, represented by this process: workers are its forks, and it gets their results."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lightning_ckptless import CkptlessModelParallelStrategy, CkptlessStrategy
from lightning_ckptless.errors import LaunchError, OptionsError, WorkerError
from tests.faults.matrix import is_version
from tests.faults.notebook import STEPS_PER_EPOCH, cells, equal, events, trainer_in, weights
from tests.trainer.tiny import DISTRIBUTIONS, callback

NOTEBOOK = "ckptless_notebook"


@pytest.fixture(scope="module", params=DISTRIBUTIONS)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of Lightning's own strategy for notebooks."""
    model, loader = cells(request.param)
    trainer = trainer_in(tmp_path_factory.mktemp("ddp_notebook"), "ddp_notebook", request.param)
    with pytest.MonkeyPatch.context() as patch:
        # Our workers have one thread, too.
        patch.setenv("OMP_NUM_THREADS", "1")
        # Lightning's launcher sets this variable and does not remove it.
        patch.setenv("MASTER_PORT", "")
        patch.delenv("MASTER_PORT")
        trainer.fit(model, loader, loader)
    return {
        "distribution": request.param,
        "weights": weights(model),
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
    }


KILLED_RANK = "kill:rank=1:step=8"


@pytest.mark.parametrize(
    ("faults", "recoveries"),
    [
        pytest.param("", [], id="no fault", marks=pytest.mark.long),
        pytest.param(KILLED_RANK, [("in place", 1)], id="rank 1"),
        pytest.param("kill:rank=0:step=8", [("in place", 0)], id="rank 0", marks=pytest.mark.long),
    ],
)
def test_the_notebook_gets_identical_results_after_a_fault(
    undisturbed: dict[str, Any],
    faults: str,
    recoveries: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    distribution = undisturbed["distribution"]
    if distribution != DISTRIBUTIONS[0] and faults != KILLED_RANK:
        pytest.skip("the other distribution is tested with one fault only")
    monkeypatch.setenv("CKPTLESS_FAULTS", faults)
    model, loader = cells(distribution)
    trainer = trainer_in(tmp_path, NOTEBOOK, distribution)
    trainer.fit(model, loader, loader)
    assert equal(weights(model), undisturbed["weights"])
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == undisturbed["metrics"]
    assert (trainer.global_step, trainer.current_epoch) == (2 * STEPS_PER_EPOCH, 2)
    found = events(tmp_path, "recovery")
    assert [(event["rung"], event["culprit_rank"]) for event in found] == recoveries
    assert all(is_version(event["version"], "step 7") for event in found)


def test_all_workers_are_relaunched(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (distribution := undisturbed["distribution"]) != DISTRIBUTIONS[0]:
        pytest.skip("the other distribution is tested with one fault only")
    monkeypatch.setenv("CKPTLESS_FAULTS", "kill:rank=all:step=8")
    model, loader = cells(distribution)
    # In place both could be replaced one after the other, if the second kill comes late.
    trainer = trainer_in(tmp_path, CkptlessStrategy(start_method="fork", in_place=False), distribution)
    trainer.fit(model, loader, loader)
    assert equal(weights(model), undisturbed["weights"])
    [recovery] = events(tmp_path, "recovery")
    assert recovery["rung"] == "relaunch"
    assert is_version(recovery["version"], "step 7")


def test_an_exception_is_raised_in_the_cell(tmp_path: Path) -> None:
    def fail(trainer: Any, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 3:
            raise RuntimeError("no such thing in batch 3")

    model, loader = cells()
    noted: list[BaseException] = []
    hooks = callback(on_train_batch_start=fail, on_exception=lambda _t, _m, error: noted.append(error))
    trainer = trainer_in(tmp_path, NOTEBOOK, callbacks=[hooks])
    with pytest.raises(RuntimeError, match="no such thing in batch 3") as raised:
        trainer.fit(model, loader)
    assert isinstance(raised.value.__cause__, WorkerError)
    assert "in fail" in str(raised.value.__cause__)
    assert noted == [raised.value]
    assert trainer.state.status == "interrupted"


def test_an_exception_that_cannot_be_pickled_is_named(tmp_path: Path) -> None:
    class CellError(Exception):
        """A local class, which cannot be pickled."""

    def fail(*_: Any) -> None:
        raise CellError("no such thing")

    model, loader = cells()
    trainer = trainer_in(tmp_path, NOTEBOOK, callbacks=[callback(on_fit_start=fail)])
    with pytest.raises(LaunchError, match="CellError: no such thing"):
        trainer.fit(model, loader)


def test_an_interrupt_keeps_the_trained_weights(tmp_path: Path) -> None:
    notebook, handler = os.getpid(), signal.getsignal(signal.SIGINT)

    def press(trainer: Any, *_: Any) -> None:
        if trainer.global_rank == 0 and trainer.global_step == 5:
            os.kill(notebook, signal.SIGINT)

    model, loader = cells()
    before, children = weights(model), psutil.Process().children()
    trainer = trainer_in(tmp_path, NOTEBOOK, callbacks=[callback(on_train_batch_end=press)], max_epochs=10_000)
    try:
        # Lightning turns KeyboardInterrupt into SystemExit and ignores the signal from then on.
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.fit(model, loader)
        assert psutil.Process().children() == children
    finally:
        signal.signal(signal.SIGINT, handler)
    assert trainer.global_step >= 5
    assert not equal(weights(model), before)


def test_a_trainer_can_be_used_repeatedly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the second `fit`, which continues from weights that other processes have trained."""
    found = {}
    for faults in ("", "kill:rank=1:step=14"):
        root = tmp_path / (faults or "undisturbed").replace(":", "-")
        monkeypatch.setenv("CKPTLESS_FAULTS", "")
        model, loader = cells()
        trainer = trainer_in(root, NOTEBOOK)
        trainer.fit(model, loader, loader)
        trainer.fit_loop.max_epochs = 4
        monkeypatch.setenv("CKPTLESS_FAULTS", faults)
        trainer.fit(model, loader, loader)
        assert (trainer.global_step, trainer.current_epoch) == (4 * STEPS_PER_EPOCH, 4)
        rungs = [event["rung"] for event in events(root, "recovery")]
        assert rungs == (["in place"] if faults else [])
        found[faults] = weights(model)
    first, second = found.values()
    assert equal(first, second)


@pytest.mark.long
def test_each_call_returns_its_results_to_the_notebook(tmp_path: Path) -> None:
    """Metrics, results, files and counters are the same as if the trainer had run in this process."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    model, loader = cells()
    checkpoints = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    logger = CSVLogger(str(tmp_path))
    trainer = trainer_in(tmp_path, NOTEBOOK, callbacks=[checkpoints], logger=logger, enable_checkpointing=True)
    (before,) = trainer.validate(model, loader, verbose=False)
    trainer.fit(model, loader, loader)
    trained = weights(model)
    assert set(trainer.callback_metrics) == {"loss", "loss_step", "loss_epoch", "val_loss"}
    assert trainer.callback_metrics["val_loss"] < before["val_loss"]
    assert len(checkpoints.best_k_models) == 2
    assert Path(checkpoints.best_model_path).is_file()
    assert checkpoints.best_model_score == min(checkpoints.best_k_models.values())
    assert logger.version == 0
    (tested,) = trainer.test(model, loader, verbose=False)
    assert set(trainer.callback_metrics) == set(tested) == {"test_loss"}
    assert equal(weights(model), trained)
    trainer.test(ckpt_path="best", dataloaders=loader, verbose=False)
    best = torch.load(checkpoints.best_model_path, weights_only=False)["state_dict"]
    assert equal(weights(model), list(best.values()))
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    counts = {name: sum(row[name] != "" for row in rows) for name in ("loss_step", "val_loss", "test_loss")}
    assert counts == {"loss_step": 2 * STEPS_PER_EPOCH, "val_loss": 1 + 2, "test_loss": 2}


@pytest.mark.long
def test_predictions_are_not_returned(tmp_path: Path) -> None:
    model, loader = cells()
    trainer = trainer_in(tmp_path, NOTEBOOK)
    assert trainer.predict(model, loader) is None
    with pytest.raises(OptionsError, match="BasePredictionWriter"):
        trainer.predict(model, loader, return_predictions=True)


def test_unsupported_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loader = cells()
    with pytest.raises(OptionsError, match=r"num_nodes=2: .*%%writefile train.py"):
        trainer_in(tmp_path, NOTEBOOK, num_nodes=2).fit(model, loader)
    with pytest.raises(OptionsError, match="start_method='spawn'"):
        trainer_in(tmp_path, CkptlessStrategy(start_method="spawn")).fit(model, loader)  # type: ignore[arg-type]
    # Interactive interpreters set `sys.ps1`.
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    with pytest.raises(OptionsError, match=r"holds a part of the model, .*`!ckptless run --nproc-per-node 2 train.py`"):
        trainer_in(tmp_path, CkptlessModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)).fit(
            model, loader
        )


def test_the_usual_strategy_name_works_at_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usual name of the strategy in an interactive interpreter; workers print to its output."""
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    model, loader = cells()
    hooks = callback(on_fit_start=lambda trainer, _: print(f"rank {trainer.global_rank} starts — now"))
    trainer = trainer_in(tmp_path, "ckptless", callbacks=[hooks], max_steps=1)
    trainer.fit(model, loader)
    assert trainer.global_step == 1
    printed = capsys.readouterr()
    # Two processes print at the same time, so their lines may be interleaved.
    assert all(f"rank {rank} starts — now" in printed.out for rank in (0, 1))
    assert "ckptless: run" in printed.err
