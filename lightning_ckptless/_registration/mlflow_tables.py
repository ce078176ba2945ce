"""The tables of an MLflow database, made by one rank at a time.

The constructor of `MLFlowLogger` opens the store, which makes the tables of a new database without a lock. Under
`ckptless run` all ranks construct their loggers at the same moment, long before `fit`. So in a worker of ours the store
is opened under a lock of its node. It is a file of its own because it is reached from `registration`, before torch and
Lightning are there.
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
"""The module that makes the tables."""


def open_one_at_a_time() -> None:
    """Have the ranks of this node open a database one after the other, if MLflow's store is imported. Idempotent."""
    store: Any = getattr(sys.modules.get(STORE), "SqlAlchemyStore", None)
    folder = os.environ.get(environment.AGENT_DIR)
    if store is None or folder is None or hasattr(store.__init__, "__wrapped__"):
        return
    own = store.__init__

    @functools.wraps(own)
    def under_lock(self: Any, *args: Any, **kwargs: Any) -> None:
        with Path(folder, "mlflow-tables.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            own(self, *args, **kwargs)

    store.__init__ = under_lock
