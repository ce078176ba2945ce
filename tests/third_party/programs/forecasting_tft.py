"""pytorch-forecasting: a temporal fusion transformer on sums of sines, with its own normalizers and quantile loss."""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from pytorch_forecasting import GroupNormalizer, QuantileLoss, TemporalFusionTransformer, TimeSeriesDataSet

from tests.third_party.weights import record_weights


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for series in range(8):
        t = np.arange(60)
        values = 10 + np.sin(t / (3 + series)) + 0.1 * rng.standard_normal(60)
        rows.append(pd.DataFrame({"time": t, "series": str(series), "value": values, "month": (t % 12).astype(str)}))
    return pd.concat(rows, ignore_index=True)


def main() -> None:
    pl.seed_everything(1, workers=True)
    data = frame()
    training = TimeSeriesDataSet(
        data[data.time < 50],
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        max_prediction_length=4,
        static_categoricals=["series"],
        time_varying_known_categoricals=["month"],
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
        target_normalizer=GroupNormalizer(groups=["series"]),
        add_relative_time_idx=True,
        add_target_scales=True,
    )
    validation = TimeSeriesDataSet.from_dataset(training, data, predict=True, stop_randomization=True)
    model = TemporalFusionTransformer.from_dataset(
        training, learning_rate=0.01, hidden_size=8, attention_head_size=2, hidden_continuous_size=4, dropout=0.1,
        loss=QuantileLoss(), log_interval=0, reduce_on_plateau_patience=2,
    )  # fmt: skip
    trainer = pl.Trainer(
        strategy=sys.argv[1],
        accelerator="cpu",
        devices=2,
        max_epochs=2,
        limit_train_batches=6,
        gradient_clip_val=0.1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger("logs"),
        callbacks=[
            EarlyStopping("val_loss", patience=5),
            LearningRateMonitor(),
            ModelCheckpoint(monitor="val_loss", save_last=True),
        ],
    )
    trainer.fit(
        model,
        training.to_dataloader(train=True, batch_size=16, num_workers=0),
        validation.to_dataloader(train=False, batch_size=16, num_workers=0),
    )
    record_weights(model)


if __name__ == "__main__":
    main()
