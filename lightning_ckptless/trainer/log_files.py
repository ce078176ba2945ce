"""The log files of a run, over all processes that write into them: one folder, and no row missing or twice."""

from __future__ import annotations

from typing import Any

from lightning_ckptless.trainer.cohort import Cohort
from lightning_ckptless.trainer.host import loggers as host_loggers

Names = list[dict[str, Any]]
Positions = list[dict[str, Any] | None]


class LogFiles:
    """Those of one trainer's loggers.

    Args:
        trainer: in `fit`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @property
    def names(self) -> Names:
        """Which folders they are in, for a process that comes later."""
        return host_loggers.name_versions(self._trainer.loggers)

    def name(self, saved: Names | None) -> None:
        """Write into the folders of the run; asking for their paths must not choose new ones.

        Args:
            saved: `names` of an earlier process; None where this one is the first.
        """
        if saved is not None:
            host_loggers.set_versions(self._trainer.loggers, saved)
            host_loggers.note_saved_config(self._trainer.callbacks, saved=True)

    def name_as_noted(self, cohort: Cohort) -> None:
        """Know them as rank 0's node does, and note that: any node may become that of rank 0."""
        if (names := cohort.noted("logger_versions")) is not None:
            self.name(names)
            if cohort.speaks_for_node:
                cohort.arena.note("logger_versions", names)

    def name_anew(self) -> None:
        """Choose new folders, as on any resume from a file: the rows of the old ones stay as they are."""
        host_loggers.forget_versions(self._trainer.loggers)
        host_loggers.note_saved_config(self._trainer.callbacks, saved=False)

    def cut(self, positions: Positions) -> None:
        """Cut them back to where they were at a version, before they are opened; on rank 0, which writes them."""
        if self._trainer.is_global_zero:
            host_loggers.cut_logs(self._trainer, positions)

    def empty(self) -> None:
        """Cut all that is in them, before they are opened; on rank 0."""
        self.cut(host_loggers.empty_positions(self._trainer.loggers))

    def keep(self) -> None:
        """Go on with them as they are, from before they are opened; on rank 0."""
        if self._trainer.is_global_zero:
            host_loggers.keep_logs(self._trainer)

    def watch(self) -> None:
        """Have every row that is written counted; on rank 0."""
        if self._trainer.is_global_zero:
            host_loggers.watch_logs(self._trainer.loggers)
