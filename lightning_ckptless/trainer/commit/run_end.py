"""The end of a run, or of one rank's process, on request: after a step that all ranks have agreed on.

A signal or the agent asks single ranks. The ranks vote with each version, and agree on the step. A run ends there, at
the point where Lightning ends it. A rank that is handed over exits there; the others regroup with its successor.
"""

from __future__ import annotations

from typing import Any

from lightning_ckptless.errors import TransportError
from lightning_ckptless.internals.lightning.sigterm import SigtermFlag, sigterm_exception
from lightning_ckptless.membership.worker.watcher import Watcher
from lightning_ckptless.protocol.messages import HandedOver
from lightning_ckptless.replica.mirror.coordinated_stop import StopPurpose
from lightning_ckptless.replica.mirror.mirror import Mirror
from lightning_ckptless.trainer.recovery.own_process import leave_process


class RunEnd:
    """The requests of one rank to end the run, and the ranks' agreement on them.

    Args:
        trainer: trainer in `fit`, whose handling of SIGTERM is replaced until `remove`.
        watcher: listens to our agent; None under an external agent, or with a single rank.
    """

    def __init__(self, trainer: Any, watcher: Watcher | None) -> None:
        self._trainer = trainer
        self._watcher = watcher
        self._sigterm = SigtermFlag(trainer)

    @property
    def was_signalled(self) -> bool:
        """Whether this process received SIGTERM."""
        return self._sigterm.asked

    def is_asked(self) -> bool:
        """Whether a signal or the agent has asked this rank to end the run after the current step."""
        return self._sigterm.asked or (self._watcher is not None and self._watcher.finish_asked)

    @property
    def purpose(self) -> StopPurpose | None:
        """Why the ranks are to stop, as far as this rank was asked to; None if they may continue."""
        if self.is_asked():
            return StopPurpose.END
        is_handed_over = self._watcher is not None and self._watcher.hand_over is not None
        return StopPurpose.HAND_OVER if is_handed_over else None

    def is_with(self, mirror: Mirror | None) -> bool:
        """Whether the run ends with the version that may be captured now.

        Args:
            mirror: mirror of the generation; None before its first version, with which no run ends.
        """
        if mirror is None:
            return False
        return self.is_asked() if self._trainer.world_size == 1 else mirror.stop.passes()

    def agree(self) -> None:
        """End the run with the current step: all ranks have agreed to."""
        self._sigterm.agree()

    def hand_over(self, step: int) -> None:
        """Exit if this rank was asked to hand over, or else leave the training loop to regroup with its successor.

        Args:
            step: at which all ranks have stopped; all of them know that it is committed.

        Raises:
            TransportError: another rank hands over.
        """
        request = None if self._watcher is None else self._watcher.hand_over
        if self._watcher is not None and request is not None:
            self._watcher.send(HandedOver(step, request.reason))
            leave_process(0)
        raise TransportError(f"a rank is handed over after step {step}; the others regroup with the new process")

    @property
    def is_over(self) -> bool:
        """Whether the run has ended on request, and its last hooks are running."""
        return self._sigterm.agreed and bool(self._trainer.interrupted)

    def end_if_agreed(self) -> None:
        """End the run after a batch if all ranks have agreed to.

        Raises:
            SIGTERMException: Lightning's own exception, at the point where Lightning raises it.
        """
        if self._sigterm.agreed and not self._sigterm.is_training_done:
            raise sigterm_exception(self._trainer)

    def show_signal(self, trains: bool) -> None:
        """Show a received signal to the script and Lightning, or hide it until the ranks have agreed.

        Args:
            trains: whether a batch is being trained on.
        """
        self._sigterm.show(trains)

    def remove(self) -> None:
        """Restore Lightning's own handling of SIGTERM."""
        self._sigterm.remove()
