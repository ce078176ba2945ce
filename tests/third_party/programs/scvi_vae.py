"""scvi-tools: its variational autoencoder on counts, with its own sampler, logger and checkpoints of whole models."""

from __future__ import annotations

import sys
from typing import Any

import anndata
import numpy as np
import scvi
from scvi.train import SaveCheckpoint

from lightning_ckptless import CkptlessStrategy
from tests.third_party.weights import record_weights


def main() -> None:
    scvi.settings.seed = 1
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(1.0, 2.0, size=(1, 40)) * np.ones((240, 1))).astype(np.float32)
    cells = anndata.AnnData(counts)
    cells.obs["batch"] = np.array(["a", "b"])[np.arange(240) % 2]
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    model = scvi.model.SCVI(cells, n_hidden=16, n_latent=4)
    # scvi-tools recognizes DDP by `ddp` in the name of the strategy or by the class of the object.
    strategy: Any = CkptlessStrategy(find_unused_parameters=True) if sys.argv[1] == "ckptless" else sys.argv[1]
    model.train(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        batch_size=20,
        train_size=0.8,
        shuffle_set_split=False,
        check_val_every_n_epoch=1,
        enable_progress_bar=False,
        log_every_n_steps=1,
        callbacks=[SaveCheckpoint(dirpath="models", monitor="elbo_validation", save_top_k=2)],
        datasplitter_kwargs={"drop_dataset_tail": True, "drop_last": False},
    )
    record_weights(model.module)


if __name__ == "__main__":
    main()
