"""darts: an N-BEATS model; Lightning writes its checkpoints and logs.

With `save_checkpoints=True` or `log_tensorboard=True`, darts manages the folder itself when the model is constructed. A
replacement constructs the model again: with `force_reset=True` it deletes the files of the run, without it it refuses
to start.
"""

from __future__ import annotations

import sys

import numpy as np
import pytorch_lightning as pl
from darts import TimeSeries
from darts.models import NBEATSModel
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from tests.third_party.weights import record_weights


def main() -> None:
    pl.seed_everything(1, workers=True)
    rng = np.random.default_rng(0)
    t = np.arange(140, dtype=np.float32)
    series = [
        TimeSeries.from_values((np.sin(t / (4 + k)) + 0.1 * rng.standard_normal(t.size)).astype(np.float32))
        for k in range(2)
    ]
    model = NBEATSModel(
        input_chunk_length=16, output_chunk_length=4, num_stacks=2, num_blocks=1, num_layers=2, layer_widths=16,
        dropout=0.1, batch_size=16, n_epochs=3, random_state=1,
        pl_trainer_kwargs={
            "strategy": sys.argv[1], "accelerator": "cpu", "devices": 2, "limit_train_batches": 5,
            "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": True, "logger": CSVLogger("logs"),
            "callbacks": [ModelCheckpoint(monitor="val_loss", save_last=True), EarlyStopping("val_loss", patience=5)],
        },
    )  # fmt: skip
    model.fit([s[:100] for s in series], val_series=[s[80:] for s in series])
    record_weights(model.model)


if __name__ == "__main__":
    main()
