"""gluonts: DeepAR on random windows that are drawn before training.

By default, gluonts draws the windows during training, from one stream over all epochs that cannot be rewound. A
replacement could not resume at the position of the lost rank.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from gluonts.dataset.common import ListDataset
from gluonts.torch.model.deepar import DeepAREstimator
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from tests.third_party.weights import record_weights


class PredrawnDeepAR(DeepAREstimator):
    def create_training_data_loader(self, *args: Any, **kwargs: Any) -> Any:
        batches: Any = list(super().create_training_data_loader(*args, **kwargs))
        return DataLoader(batches, batch_size=None, shuffle=True)


def main() -> None:
    pl.seed_everything(1, workers=True)
    rng = np.random.default_rng(0)
    t = np.arange(100)
    series = [
        {"start": pd.Period("2020-01-01", "D"), "target": 5 + np.sin(t / (3 + k)) + 0.1 * rng.standard_normal(100)}
        for k in range(6)
    ]
    estimator = PredrawnDeepAR(
        freq="D",
        prediction_length=5,
        context_length=10,
        num_layers=1,
        hidden_size=8,
        lags_seq=[1, 7],
        batch_size=8,
        num_batches_per_epoch=12,
        trainer_kwargs={
            "strategy": sys.argv[1],
            "accelerator": "cpu",
            "devices": 2,
            "max_epochs": 3,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": CSVLogger("logs"),
        },
    )
    output = estimator.train_model(ListDataset(series, freq="D"), ListDataset(series, freq="D"))
    record_weights(output.trained_net)


if __name__ == "__main__":
    main()
