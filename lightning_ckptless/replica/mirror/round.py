"""A round of the mirror: what passes from the training thread to the mirror thread, and back when it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.mirror.moment import Moment
from lightning_ckptless.replica.mirror.rotation import NO_TURN, Audited, Turn
from lightning_ckptless.replica.mirror.shard_copies import ShardCopy

Blob = bytes | Callable[[], bytes]
"""A rank's host state, or a function that returns it in the mirror thread, where waiting for a device is harmless."""


@dataclass
class Round:
    """The round of a version. Without copies, this rank takes part without data.

    Args:
        version: the version.
        began_at: when it was submitted, on the performance counter.
        copies: the copies of this rank's tensors, that of its own shard first.
        compared: those to be compared with the live tensors before they change.
        turn: what is compared with ranks that do not keep it.
        audited: what this rank compares for another one.
        blob: host state of the rank.
        staged: done when the copy is complete.
        ended: done when the round is over.
    """

    version: Version
    began_at: float
    copies: tuple[ShardCopy, ...] = ()
    compared: tuple[ShardCopy, ...] = ()
    turn: Turn = NO_TURN
    audited: Audited = field(default_factory=lambda: Audited((), ()))
    blob: Blob = b""
    staged: Moment = field(default_factory=Moment)
    ended: Moment = field(default_factory=Moment)

    def pack(self) -> bytes:
        """The host state, serialized at the first call."""
        if not isinstance(self.blob, bytes):
            self.blob = self.blob()
        return self.blob

    def fail(self, error: BaseException) -> None:
        """Raise an error in threads that wait for the round."""
        for moment in (self.staged, self.ended):
            if not moment.is_reached:
                moment.reach(error)
