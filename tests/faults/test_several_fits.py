"""Programs that call their trainers several times: recovery from a fault in a later call, and its results."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.drill import run_variant
from lightning_ckptless.testing.variant import Variant
from tests.faults.conftest import REPOSITORY

SCRIPT = """
import hashlib, json, os, resource, signal, sys, time
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

torch.set_num_threads(1)
FLOW, KILL = sys.argv[1], sys.argv[2:]
call, batches, results = 0, 0, []

def maybe_kill(rank):
    global batches
    batches += 1
    if KILL and [call, batches] == [int(n) for n in KILL[0].split(":")] and str(rank) in KILL[1]:
        marker = f"killed-{rank}"
        if not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

class Net(L.LightningModule):
    def __init__(self, lr=0.1):
        super().__init__()
        self.lr, self.seen = lr, 0
        layers = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(), torch.nn.Linear(8, 1)
        self.net = torch.nn.Sequential(*layers)

    def loss(self, batch):
        maybe_kill(self.global_rank)
        return (self.net(batch) - batch.sum(1, keepdim=True)).pow(2).mean()

    def training_step(self, batch, _):
        self.seen += 1
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch, _):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch, _):
        return self.net(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def data(self, seed, shuffle=False):
        rows = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))
        return DataLoader(rows, batch_size=4, shuffle=shuffle)

    def train_dataloader(self):
        return self.data(1, shuffle=True)

    def val_dataloader(self):
        return self.data(2)

    test_dataloader = predict_dataloader = val_dataloader

def trainer(epochs=1, **more):
    return L.Trainer(
        accelerator="cpu", devices=2, strategy="ckptless", max_epochs=epochs, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, logger=CSVLogger("."),
        callbacks=[ModelCheckpoint(monitor="val_loss")], **more,
    )

def counted(name):
    original = getattr(L.Trainer, name)
    def method(*args, **kwargs):
        global call, batches
        call, batches = call + 1, 0
        return original(*args, **kwargs)
    setattr(L.Trainer, name, method)

for name in ("fit", "validate", "test", "predict"):
    counted(name)

class WithoutMemory(L.Callback):
    # From the end of training to the end of the call, the last rank gets no large piece of memory.
    def on_train_end(self, trainer, module):
        if trainer.global_rank == 1 and not os.path.exists("limited"):
            open("limited", "w").close()
            used_bytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 8_000_000, resource.RLIM_INFINITY))

    def teardown(self, trainer, module, stage):
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def val_loss(of):
    results.append(float(of.callback_metrics["val_loss"]))
    return results[-1]

L.seed_everything(3, workers=True)
model, last = Net(), trainer()
if FLOW == "validate, fit":
    results.append(last.validate(model))
    last.fit(model)
elif FLOW == "fit, another fit":
    last.fit(model)
    val_loss(last)
    model, last = Net(), trainer()
    last.fit(model)
elif FLOW == "fit without memory, fit":
    model.register_buffer("large", torch.zeros(6_000_000))
    last.callbacks.append(WithoutMemory())
    last.fit(model)
    model, last = Net(), trainer()
    last.fit(model)
elif FLOW == "fit, of which one rank returns late":
    class Late(L.Callback):
        def on_fit_end(self, trainer, module):
            while KILL and trainer.global_rank == 1 and not os.path.exists("returned"):
                time.sleep(0.005)
            maybe_kill(trainer.global_rank)
    last.callbacks.append(Late())
    last.fit(model)
    if last.global_rank == 0:
        open("returned", "w").close()
elif FLOW == "fit, same trainer":
    last.fit(model)
    val_loss(last)
    last.fit_loop.max_epochs = 2
    last.fit(model)
elif FLOW == "fit, save, resume":
    last.fit(model)
    last.save_checkpoint("saved.ckpt")
    best, last = last.checkpoint_callback.best_model_path, trainer(2)
    last.fit(model, ckpt_path=best)
elif FLOW == "fit, test best":
    last.fit(model)
    results.append(last.test(model))
    results.append(last.test(ckpt_path="best"))
elif FLOW == "folds":
    for fold in range(3):
        model, last = Net(), trainer()
        last.fit(model, model.data(10 + fold, shuffle=True), model.data(20 + fold))
        val_loss(last)
elif FLOW == "search, fit":
    results.append(Tuner(last).lr_find(model, num_training=14).suggestion())
    results.append(model.lr)
    last.fit(model)
elif FLOW == "fit, predict, fit":
    last.fit(model)
    results.append([len(part) for part in last.predict(model)])
    model, last = Net(), trainer()
    last.fit(model)
elif FLOW == "fit, barrier, fit":
    last.fit(model)
    seen = torch.tensor([float(model.seen)])
    torch.distributed.all_reduce(seen)
    results.append(float(seen))
    last = trainer()
    last.fit(model)
elif FLOW == "trials":
    import optuna

    def objective(trial):
        global model, last
        model, last = Net(trial.suggest_float("lr", 1e-3, 1e-1)), trainer()
        if trial.number == 1:
            class Prune(L.Callback):
                def on_validation_end(self, trainer, module):
                    raise optuna.TrialPruned
            last.callbacks.append(Prune())
        last.fit(model)
        return val_loss(last)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1))
    study.optimize(objective, n_trials=3)
    results.append([(trial.params, trial.value, trial.state.name) for trial in study.trials])

weights = b"".join(tensor.detach().numpy().tobytes() for tensor in model.state_dict().values())
facts = {
    "weights": hashlib.sha256(weights).hexdigest(), "results": results, "seen": model.seen,
    "steps": last.global_step, "metrics": {k: float(v) for k, v in last.callback_metrics.items() if "/" not in k},
    "random": torch.rand(1).item(), "best": os.path.relpath(last.checkpoint_callback.best_model_path or "."),
}
with open(f"facts-{last.global_rank}.json", "w") as file:
    json.dump(facts, file)
"""
ENV = {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}

Run = Callable[..., Variant]


@dataclass(frozen=True)
class Fault:
    """A kill in a flow, and the expected recovery.

    Args:
        flow: the calls that the program makes.
        call: number of the call, from 1.
        batch: number of the batch within the call, from 1.
        ranks: the killed ranks.
        how: `in place` or `relaunch`; empty for either.
        reason: part of the reason for a relaunch.
        reported: number of recoveries that a `fit` reports; None for any.
    """

    flow: str
    call: int
    batch: int
    ranks: str
    how: str
    reason: str = ""
    reported: int | None = None

    def __str__(self) -> str:
        return f"{self.flow}: rank {self.ranks} killed in call {self.call}, {self.how}"


FAULTS = [
    Fault("validate, fit", 2, 3, "0", "in place"),
    Fault("fit, same trainer", 2, 2, "1", "in place"),
    Fault("fit, test best", 3, 2, "1", "relaunch", "after fit"),
    Fault(
        "fit without memory, fit", 2, 3, "0", "relaunch", "could not be recorded for new processes: Arena", reported=1
    ),
]
MORE_FAULTS = [
    Fault("validate, fit", 1, 2, "0", "relaunch", "no worker has reached fit"),
    Fault("validate, fit", 1, 2, "01", "relaunch"),
    Fault("validate, fit", 2, 1, "1", "in place"),
    Fault("fit, another fit", 2, 3, "0", "in place"),
    Fault("fit, another fit", 2, 3, "01", ""),
    Fault("fit, same trainer", 2, 2, "0", "in place"),
    Fault("fit, same trainer", 2, 1, "01", ""),
    Fault("fit, save, resume", 2, 2, "0", "in place"),
    Fault("fit, save, resume", 2, 2, "1", "in place"),
    Fault("fit, test best", 2, 2, "0", "relaunch", "after fit"),
    Fault("folds", 3, 3, "0", "in place"),
    Fault("folds", 3, 3, "01", ""),
    Fault("search, fit", 1, 3, "0", "relaunch"),
    Fault("search, fit", 2, 3, "0", "in place"),
    Fault("search, fit", 2, 3, "1", "in place"),
    Fault("fit, predict, fit", 3, 3, "1", "in place"),
    Fault("fit, barrier, fit", 2, 3, "1", "relaunch", "the collective allreduce was called"),
    Fault("trials", 3, 3, "1", "in place"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, parent: ForkServer) -> Run:
    """Return a function that runs the program."""
    script = tmp_path_factory.mktemp("program") / "train.py"
    script.write_text(SCRIPT)

    def run(*args: str) -> Variant:
        folder = tmp_path_factory.mktemp("run") / "run"
        return run_variant([str(script), *args], folder, parent=parent, isolate=True, env=ENV, timeout_s=120)

    return run


@pytest.fixture(scope="module")
def undisturbed(run: Run) -> Callable[[str], Variant]:
    """Return a function that returns the undisturbed run of a flow; each runs once."""
    made: dict[str, Variant] = {}

    def of(flow: str) -> Variant:
        if flow not in made:
            made[flow] = run(flow)
            assert made[flow].exit_code == 0, made[flow].tail()
        return made[flow]

    return of


def outputs_of(variant: Variant) -> dict[str, Any]:
    """Return the results of a run, the rows of its log files, and the names of its files and folders."""
    cwd = variant.folder / "cwd"
    left: dict[str, Any] = {}
    for path in sorted(cwd.rglob("*")):
        name = path.relative_to(cwd).as_posix()
        if name.startswith("killed-"):
            continue
        left[name] = None
        if path.suffix == ".json":
            left[name] = json.loads(path.read_text())
        elif path.name == "metrics.csv":
            with path.open(newline="") as file:
                rows = [
                    {key: value for key, value in row.items() if value and not key.startswith("ckptless/")}
                    for row in csv.DictReader(file)
                ]
            left[name] = [row for row in rows if row.keys() - {"step", "epoch"}]
    return left


def check(fault: Fault, run: Run, undisturbed: Callable[[str], Variant]) -> None:
    disturbed = run(fault.flow, f"{fault.call}:{fault.batch}", fault.ranks)
    assert disturbed.exit_code == 0, disturbed.tail()
    assert outputs_of(disturbed) == outputs_of(undisturbed(fault.flow))
    events = disturbed.events
    found = {event.event for event in events} & {"in_place", "relaunch"}
    assert found, "the ledger has no recovery"
    if fault.how:
        assert (fault.how == "relaunch") == ("relaunch" in found)
    reported = [event for event in events if event.event == "recovery"]
    assert fault.reported in (None, len(reported)), reported
    reasons = [event.fields["reason"] for event in events if event.event == "relaunch"]
    assert not fault.reason or any(fault.reason in reason for reason in reasons), reasons


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_in_a_later_call(fault: Fault, run: Run, undisturbed: Callable[[str], Variant]) -> None:
    check(fault, run, undisturbed)


def test_a_rank_is_lost_before_its_fit_returns_and_after_another_one_has(
    run: Run, undisturbed: Callable[[str], Variant]
) -> None:
    # Eight batches of training and validation, then the hook.
    late = Fault("fit, of which one rank returns late", 1, 9, "1", "relaunch", "rank 0 is after fit", reported=1)
    check(late, run, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("fault", MORE_FAULTS, ids=str)
def test_more_faults_in_later_calls(fault: Fault, run: Run, undisturbed: Callable[[str], Variant]) -> None:
    if fault.flow == "trials":
        pytest.importorskip("optuna", reason="the flow `trials` needs optuna")
    check(fault, run, undisturbed)
