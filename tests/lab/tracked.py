"""A script that logs to a tracking store, selected by its argument, and functions to read the store."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, TensorDataset

Row = tuple[int, tuple[tuple[str, float], ...]]


@dataclass
class Read:
    """The content of a store for one run.

    Args:
        params: hyperparameters by name.
        rows: metrics in the order of steps, without those of this package.
        status: final status; empty if the store has none.
    """

    params: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    status: str = ""


class Journal(Logger):
    """A custom logger whose store is append-only: one file per run."""

    def __init__(self) -> None:
        self._run = ""

    @property
    def experiment(self) -> Path | None:
        if vars(rank_zero_only)["rank"]:
            return None
        self._run = self._run or uuid.uuid4().hex
        return Path(f"journal-{self._run}.jsonl")

    @property
    def name(self) -> str:
        return "journal"

    @property
    def version(self) -> str:
        return self._run

    def _append(self, kind: str, content: Any) -> None:
        assert self.experiment is not None
        with self.experiment.open("a") as file:
            file.write(json.dumps([kind, content]) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self._append("params", {name: str(value) for name, value in params.items()})

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._append("row", [step, metrics])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._append("status", status)

    def ckptless_identity(self) -> dict[str, Any]:
        return {"run": self._run}

    def set_ckptless_identity(self, identity: dict[str, Any]) -> None:
        self._run = identity["run"]


class Model(pl.LightningModule):
    def __init__(self, lr: float = 0.1, raise_at: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.raise_at = raise_at
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1), torch.nn.Linear(4, 1))

    def training_step(self, batch: Any, _: int) -> Any:
        if self.raise_at and self.global_step + 1 == self.raise_at:
            raise ValueError("the program's own error")
        loss = self.layers(batch[0]).square().mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", self.layers(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_logger(store: str) -> Any:
    if store == "wandb":
        return WandbLogger(project="project", save_dir=".", offline=True)
    if store == "mlflow":
        return MLFlowLogger(_experiment(Path()), tracking_uri="sqlite:///runs.db")
    if store == "mlflow-server":
        return MLFlowLogger(_experiment(Path()), tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    return Journal()


def main(store: str, raise_at: int) -> None:
    pl.seed_everything(1, workers=True)
    data = TensorDataset(torch.randn(48, 4, generator=torch.Generator().manual_seed(0)))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ckptless",
        max_epochs=2,
        logger=make_logger(store),
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[pl.callbacks.LearningRateMonitor()],
    )
    trainer.fit(Model(raise_at=raise_at), DataLoader(data, 4, shuffle=True), DataLoader(data, 4))
    if trainer.is_global_zero:
        assert trainer.checkpoint_callback is not None
        print("best model at", vars(trainer.checkpoint_callback)["best_model_path"])


# ---------------------------------------------------------------------- reading


def read_store(store: str, folder: Path) -> dict[str, Read]:
    """Return the runs of a store in a folder, by name."""
    return {"wandb": _read_wandb, "mlflow": _read_mlflow, "journal": _read_journal}[store](folder)


def _experiment(folder: Path) -> str:
    """Return the experiment name for a folder, unique within the database."""
    return folder.absolute().parent.parent.name


def _row(step: int, metrics: dict[str, float]) -> Iterator[Row]:
    own = tuple(sorted((n, v) for n, v in metrics.items() if not n.startswith(("ckptless/", "_", "trainer/"))))
    if {name for name, _ in own} - {"epoch"}:
        yield step, own


def _read_journal(folder: Path) -> dict[str, Read]:
    runs = {}
    for path in folder.glob("journal-*.jsonl"):
        run = runs[path.stem] = Read()
        for kind, content in map(json.loads, path.read_text().splitlines()):
            if kind == "params":
                run.params |= content
            elif kind == "status":
                run.status = content
            else:
                run.rows += _row(*content)
    return runs


def _read_mlflow(folder: Path) -> dict[str, Read]:
    return read_mlflow_database(folder / "runs.db", folder)


def read_mlflow_database(path: Path, folder: Path) -> dict[str, Read]:
    """Return the runs of a folder. Reads the tables directly, because MLflow's client would keep the file open."""
    with closing(sqlite3.connect(path)) as database:
        select = "SELECT run_uuid, status FROM runs JOIN experiments USING (experiment_id) WHERE experiments.name = ?"
        runs = {name: Read(status=status) for name, status in database.execute(select, [_experiment(folder)])}
        for name, key, value in database.execute("SELECT run_uuid, key, value FROM params"):
            if name in runs:
                runs[name].params[key] = value
        for name, key, value, step in database.execute("SELECT run_uuid, key, value, step FROM metrics"):
            if name in runs:
                runs[name].rows += _row(step, {key: value})
    for run in runs.values():
        run.rows.sort()
    return runs


def _read_wandb(folder: Path) -> dict[str, Read]:
    runs: dict[str, Read] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        run = runs.setdefault(path.stem, Read())
        steps = []
        for record in _wandb_records(path):
            for item in record.config.update:
                if not item.key.startswith("_"):
                    run.params[item.key] = item.value_json
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if row:
                steps.append(row["_step"])
                run.rows += _row(row["trainer/global_step"], row)
        assert steps == list(range(steps[0], steps[0] + len(steps)))
    return runs


def _wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of a W&B file: blocks of 32 KiB; a record may be split into several chunks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
