"""Coordinated stop on SIGTERM: controls when Lightning sees its flag and raises its exception.

Lightning ends the run when it finds `trainer.received_sigterm` set: after a batch, after an epoch, and in validation.
It notifies the other ranks with collectives in the signal handler, which hang if a rank is lost. Here the handler only
sets a flag. The script can see it while it trains on a batch. Where Lightning would end this rank, the flag is hidden
until all ranks have agreed on the last step.
"""

from __future__ import annotations

from typing import Any

from lightning_ckptless.errors import SIGTERM_EXIT_CODE
from lightning_ckptless.internals.lightning.distribution import distribution_of, is_a, module
from lightning_ckptless.internals.lightning.override import Override, remove_overrides
from lightning_ckptless.internals.lightning.versions import shares_sigterm


class SigtermFlag:
    """The SIGTERM flag of one trainer.

    Args:
        trainer: trainer in `fit`, before its signal handlers are registered.

    Attributes:
        asked: whether this process received SIGTERM.
        agreed: whether all ranks have agreed to end with this step.
    """

    def __init__(self, trainer: Any) -> None:
        self.asked = self.agreed = False
        self._connector = trainer._signal_connector
        self._epoch = trainer.fit_loop.epoch_loop
        self._trains = False
        Override(self._connector, "_sigterm_notifier_fn", self._note)
        if shares_sigterm(self._epoch):
            Override(self._epoch, "_broadcast_sigterm_tensor", lambda: None)

    def _note(self, *_: Any) -> None:
        self.asked = True
        self.show(self._trains)

    def show(self, trains: bool) -> None:
        """Show the flag to the script and Lightning, or hide it until the ranks have agreed.

        Args:
            trains: whether a batch is being trained on, during which Lightning does not check the flag.
        """
        self._trains = trains
        self._connector.received_sigterm = self.agreed or (self.asked and trains)

    def agree(self) -> None:
        """Show the flag to Lightning from now on, as all ranks have agreed to end with this step."""
        self.agreed = True
        self.show(self._trains)

    @property
    def is_training_done(self) -> bool:
        """Whether the epoch or the run ends with this batch anyway, so that Lightning runs the epoch's hooks first."""
        return bool(self._epoch._is_training_done)

    def remove(self) -> None:
        """Restore Lightning's own handlers. A received signal stays visible."""
        remove_overrides(self._connector, "_sigterm_notifier_fn")
        remove_overrides(self._epoch, "_broadcast_sigterm_tensor")
        self.show(trains=True)


def sigterm_exception(trainer: Any) -> BaseException:
    """Return the exception that Lightning raises on SIGTERM."""
    error: BaseException = module(distribution_of(trainer), "utilities.exceptions").SIGTERMException()
    return error


def give_exit_code(error: BaseException) -> None:
    """Set the exit code for a process that Lightning ends on SIGTERM; Lightning's own is 0."""
    if is_a(error, "utilities.exceptions", "SIGTERMException") and getattr(error, "code", None) is None:
        error.code = SIGTERM_EXIT_CODE  # type: ignore[attr-defined]
