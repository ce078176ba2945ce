"""chemprop: message passing on small molecules, with its own sampler, metrics and learning rate schedule."""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import numpy as np
from chemprop import data, models, nn
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from tests.third_party.weights import record_weights


def main() -> None:
    pl.seed_everything(1, workers=True)
    molecules = [
        f"{'C' * a}{group}{'C' * b}" for a in range(1, 7) for b in range(1, 7) for group in ("O", "N", "C(=O)")
    ]
    targets = np.random.default_rng(0).normal(size=(len(molecules), 1))
    points = [data.MoleculeDatapoint.from_smi(smiles, y) for smiles, y in zip(molecules, targets, strict=True)]
    training, validation = data.MoleculeDataset(points[:96]), data.MoleculeDataset(points[96:])
    scaler = training.normalize_targets()
    validation.normalize_targets(scaler)
    model = models.MPNN(
        nn.BondMessagePassing(d_h=16, depth=2, dropout=0.1),
        nn.MeanAggregation(),
        nn.RegressionFFN(
            input_dim=16, hidden_dim=16, output_transform=nn.UnscaleTransform.from_standard_scaler(scaler)
        ),
        batch_norm=True,
        metrics=[nn.metrics.RMSE(), nn.metrics.MAE()],
    )
    trainer = pl.Trainer(
        strategy=sys.argv[1],
        accelerator="cpu",
        devices=2,
        max_epochs=3,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger("logs"),
        callbacks=[ModelCheckpoint("checkpoints", "best-{epoch}-{val_loss:.2f}", monitor="val_loss", save_last=True)],
    )
    trainer.fit(
        model,
        data.build_dataloader(training, batch_size=8, num_workers=0, seed=1),
        data.build_dataloader(validation, batch_size=8, num_workers=0, shuffle=False),
    )
    record_weights(model)


if __name__ == "__main__":
    main()
