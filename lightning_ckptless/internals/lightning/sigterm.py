"""A request to end, by SIGTERM: Lightning's flag, its exception, and when the two may meet.

Lightning ends the run where it finds `trainer.received_sigterm` set: after a batch, an epoch, and in a validation.
It tells the other ranks by collectives inside the signal handler, which have no partner when a rank is lost. Here the
handler only takes note. The flag is visible to the program while it trains on a batch; at the points where Lightning
would end this rank it is hidden until all ranks have agreed on the step with which the run ends.
"""

from __future__ import annotations

import signal
from typing import Any

from lightning_ckptless.internals.lightning.distribution import distribution_of, is_a, module
from lightning_ckptless.internals.lightning.override import Override, remove_overrides
from lightning_ckptless.internals.lightning.versions import shares_sigterm

EXIT_CODE = 128 + signal.SIGTERM


class SigtermFlag:
    """The flag of one trainer.

    Args:
        trainer: in `fit`, before its signal handlers are registered.

    Attributes:
        asked: whether this process received SIGTERM.
        agreed: whether all ranks end with this step.
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
        """Let the program and Lightning see the flag, or hide it while the ranks have not agreed.

        Args:
            trains: whether a batch is being trained on: Lightning does not look at the flag then.
        """
        self._trains = trains
        self._connector.received_sigterm = self.agreed or (self.asked and trains)

    def agree(self) -> None:
        """All ranks end with this step: Lightning may find the flag where it looks for it next."""
        self.agreed = True
        self.show(self._trains)

    @property
    def is_training_done(self) -> bool:
        """Whether the epoch or the run ends with this batch anyway: then Lightning ends it after the epoch's hooks."""
        return bool(self._epoch._is_training_done)

    def remove(self) -> None:
        """Give Lightning its own handlers back. What was received stays known."""
        remove_overrides(self._connector, "_sigterm_notifier_fn")
        remove_overrides(self._epoch, "_broadcast_sigterm_tensor")
        self.show(trains=True)


def sigterm_exception(trainer: Any) -> BaseException:
    """What Lightning raises when it was asked to end."""
    error: BaseException = module(distribution_of(trainer), "utilities.exceptions").SIGTERMException()
    return error


def give_exit_code(error: BaseException) -> None:
    """Have a process that Lightning ends upon SIGTERM say so by its exit code; Lightning's own is 0."""
    if is_a(error, "utilities.exceptions", "SIGTERMException") and getattr(error, "code", None) is None:
        error.code = EXIT_CODE  # type: ignore[attr-defined]
