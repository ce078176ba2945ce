"""neuralforecast: NHITS, limited by steps, with its own data module and early stopping."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS
from pytorch_lightning.loggers import CSVLogger

from tests.third_party.weights import record_weights


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    t = np.arange(80)
    return pd.concat([
        pd.DataFrame({
            "unique_id": f"series-{k}",
            "ds": pd.date_range("2020-01-01", periods=80),
            "y": np.sin(t / (4 + k)) + 0.1 * rng.standard_normal(80),
        })
        for k in range(8)
    ])  # fmt: skip


def main() -> None:
    model = NHITS(
        h=6, input_size=18, max_steps=15, val_check_steps=5, early_stop_patience_steps=5, mlp_units=[[16, 16]] * 3,
        dropout_prob_theta=0.1, batch_size=2, windows_batch_size=32, random_seed=1, scaler_type="standard",
        strategy=sys.argv[1], accelerator="cpu", devices=2, log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, logger=CSVLogger("logs"), enable_checkpointing=True,
    )  # fmt: skip
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(frame(), val_size=12)
    record_weights(forecast.models[0])


if __name__ == "__main__":
    main()
