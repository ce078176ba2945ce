"""A script that imports packages that record their importers, and trains once its agent has preloaded them."""

from __future__ import annotations

import importlib
import os
import site
import sys
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from parts import Options, make_run

from lightning_ckptless import CkptlessStrategy
from lightning_ckptless.ledger import read_ledger

WAIT_AT = 3
_POLL_EVERY_S = 0.02


class Waiting(Callback):
    """Waits at a step until the agent has recorded the outcome of the imports."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step != WAIT_AT:
            return
        (path,) = Path(os.environ["CKPTLESS_RUN_ROOT"]).glob("*/ledger.jsonl")
        while not any(event.event.startswith("imports_") for event in read_ledger(path)):
            threading.Event().wait(_POLL_EVERY_S)


if __name__ == "__main__":
    site.addsitedir(sys.argv[1])
    for name in ("careful", "careless", "needs_careless"):
        importlib.import_module(name)
    learns = sys.argv[2] == "learns"
    options = Options(epochs=1, logger="none")
    waiting = (Waiting(),) if learns else ()
    trainer, model, data = make_run(options, CkptlessStrategy(preload_imports=learns), waiting)
    trainer.fit(model, datamodule=data)
