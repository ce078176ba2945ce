"""Lets only one rank at a time create the tables of an MLflow database.

The constructor of `MLFlowLogger` opens the store, which creates the tables of a new database without a lock. Under
`ckptless run` all ranks construct their loggers at the same time, long before `fit`. Therefore our workers open the
store under a lock per node.

Apart from the code for loggers, because it is used before torch and Lightning are imported.
"""

from __future__ import annotations

import fcntl
import functools
import os
import sys
from pathlib import Path
from typing import Any

from lightning_ckptless import environment

STORE = "mlflow.store.tracking.sqlalchemy_store"
"""The module that creates the tables."""


def serialize_opening() -> None:
    """Make the ranks of this node open a database one after the other, if MLflow's store is imported. Idempotent."""
    store: Any = getattr(sys.modules.get(STORE), "SqlAlchemyStore", None)
    folder = os.environ.get(environment.AGENT_DIR)
    if store is None or folder is None or hasattr(store.__init__, "__wrapped__"):
        return
    original = store.__init__

    @functools.wraps(original)
    def under_lock(self: Any, *args: Any, **kwargs: Any) -> None:
        with Path(folder, "mlflow-tables.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            original(self, *args, **kwargs)

    store.__init__ = under_lock
