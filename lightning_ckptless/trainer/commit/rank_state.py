"""The state of one rank besides its tensors, as one dictionary per version.

| Entry | Contains | Restored by |
|---|---|---|
| `state` | the host state of the trainer | `HostState.apply`; data position and generators last |
| `virtual_ranks` | which virtual ranks this rank runs, and their positions | `VirtualRanks.open`, `move_to` |
| `data_hooks` | the calls that created the current dataloaders | `DataHooks.make_as` |
| `report` | the accounts of the run | `RunReport.resume` |
| `interval` | the mirror interval | `MirrorInterval.begin` |
| `rewinds` | what the script has asked for, and past rewinds | `Rewinding.restore` |
| `logs` | positions of the log files, and rows held back | `RunLoggers.restore` |

`recovery/restore_procedure.py` has the order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.data.batch_log import BatchLog
from lightning_ckptless.trainer.data.training_data import TrainingData
from lightning_ckptless.trainer.rewind.rewinding import Rewinding
from lightning_ckptless.trainer.session.session import Session
from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.surroundings import Surroundings
from lightning_ckptless.trainer.strategy.compatibility import warn_of_loaders

log = logging.getLogger(__name__)

OBJECT_NOT_CAPTURED = (
    "%s was changed in training, but it is an object, or too large to be captured with every step: after a fault a "
    "replacement starts with its initial value. Keep values that change in a number, a list or an array of their own, "
    "or in `state_dict()` of a callback"
)
UNREADABLE = (
    "%s: the state of a generator, an iterator or an open file cannot be read, so no version contains it. "
    "After a fault a replacement has what the script creates, and the other ranks continue with what they have. Keep "
    "the position or the results in numbers, lists or arrays of their own"
)


class RankState:
    """Captures the state of one rank.

    Args:
        session: session of this rank.
        data: data of the trainer, which is set up for `fit`.
        batches: the batches in flight.
        rewinding: the rewinds that this rank asks for.
    """

    def __init__(self, session: Session, data: TrainingData, batches: BatchLog, rewinding: Rewinding) -> None:
        self._session = session
        self._trainer = session.trainer
        self._data = data
        self._batches = batches
        self._rewinding = rewinding
        self._host_state: HostState | None = None
        self._surroundings = Surroundings(self._trainer, self._warn_of_loss)
        data.loops.after_setup_of_validation_data(self._surroundings.on_validation_data)

    @property
    def host_state(self) -> HostState:
        """The host state of the trainer; created on first use, when the script has made its callbacks."""
        if self._host_state is None:
            self._host_state = HostState(self._trainer, self._session.options, self._surroundings)
        return self._host_state

    def before_backward(self) -> None:
        """Observe which gradients the backward pass is about to add to."""
        if self._host_state is not None:
            self._host_state.before_backward()

    def capture(self, version: Version, tensors: Mapping[str, Tensor], interval: int | None) -> dict[str, Any]:
        """Return the current state. It refers to live objects: pack it before training continues.

        Args:
            version: version that it is part of.
            tensors: the version's tensors, by name.
            interval: the mirror interval; None while it is being measured.
        """
        return {
            "state": self.host_state.capture(partial(self._batches.position_at, version), tensors),
            "virtual_ranks": self._data.virtual_ranks.capture(),
            "data_hooks": dict(self._data.hooks.made),
            "report": self._session.report.state(version),
            "interval": interval,
            "rewinds": self._rewinding.capture(),
            "logs": self._session.loggers.capture(version, self._session.outgoing.may_leave),
        }

    def forget_before(self, committed: Version | None) -> None:
        """Forget what no recovery can need: it never rolls back past a committed version."""
        self._batches.forget_before(committed)

    def release(self) -> None:
        """Release the trainer's objects."""
        self._host_state = None

    # ------------------------------------------------------------------ what is not captured

    def watch_objects(self) -> None:
        """Start watching the user's objects for changes; called when the hooks of a starting fit have run."""
        self._surroundings.watch_objects()

    def warn_of_gaps(self) -> None:
        """Warn of state of the script that versions do not contain; called before the first version of a run."""
        if self._host_state is None and self._trainer.is_global_zero:
            warn_of_loaders(self._data.loops.combined_loader.flattened)
            self.host_state.hooks.warn_of_uncovered()
            for name in self._surroundings.unreadable():
                log.warning("ckptless: %s", UNREADABLE % name)

    def _warn_of_loss(self, name: str) -> None:
        if self._trainer.is_global_zero:
            log.warning("ckptless: %s", OBJECT_NOT_CAPTURED % name)
