"""Reports this rank's position in its step to the agent, which identifies hung ranks by it.

Apart from `membership/worker/progress.py`, which writes the bytes, because a position depends on the loops.
"""

from __future__ import annotations

import os
from pathlib import Path

from lightning_ckptless import environment
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.membership.worker.progress import ProgressWriter, stacks_path
from lightning_ckptless.membership.worker.watcher import Watcher
from lightning_ckptless.protocol.hang_detection import Point
from lightning_ckptless.trainer.session.arenas import local_rank
from lightning_ckptless.trainer.session.session import Session


class StepProgress:
    """The progress of one rank; without a watcher it has no reader, and nothing is written.

    Args:
        session: session of this rank.
        loops: loops of the trainer.
        watcher: listens to our agent; None under an external agent, or with a single rank.
    """

    def __init__(self, session: Session, loops: FitLoops, watcher: Watcher | None) -> None:
        self._session = session
        self._loops = loops
        self._watcher = watcher
        self._writer = ProgressWriter.from_environment() if watcher is not None else None
        if self._writer is not None:
            self._writer.dump_stacks_into(stacks_path(Path(os.environ[environment.AGENT_DIR]), local_rank()))

    def beat(self, point: Point) -> None:
        """Report a point of the step; raises if the agent has aborted it.

        Raises:
            TransportError: the generation has ended.
        """
        writer, session, loops = self._writer, self._session, self._loops
        if writer is None or self._watcher is None or not session.is_member:
            return
        if point is Point.VALIDATION and session.trainer.sanity_checking:
            return
        self._watcher.heed()
        if point is Point.BACKWARD or point is Point.OPTIMIZER:
            writer.advance(loops.step + 1, point)
            return
        done = point is not Point.BATCH
        out_of_data = done and loops.is_out_of_data
        epoch, rank = session.trainer.current_epoch, session.members.rank
        writer.beat(loops.step + (not done), point, epoch, out_of_data=out_of_data, rank=rank)

    def interrupt(self) -> None:
        """Report that a fault has ended the step and a recovery begins."""
        if self._writer is not None:
            self._writer.interrupt()

    def restore(self) -> None:
        """Report progress in restoring a version together with the others."""
        if self._writer is not None:
            self._writer.restore()

    def leave_loop(self) -> None:
        """Report that the fit loop has ended; from here on ranks are no longer in step."""
        if self._writer is not None:
            self._writer.outside()

    def close(self) -> None:
        """Stop reporting."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
