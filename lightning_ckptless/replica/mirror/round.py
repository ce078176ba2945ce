"""One round of the mirror: a version on its way from the training thread to all its holders."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.mirror.staging import Load
from lightning_ckptless.replica.slot import Slot

Blob = bytes | Callable[[], bytes]
"""A rank's host state, or what gives it in the mirror's thread, where waiting for a device holds up nobody."""


@dataclass
class Round:
    """One version on its way. Without a load, this rank has nothing to give."""

    version: Version
    began_at: float
    slot: Slot | None = None
    load: Load | None = None
    blob: Blob = b""
    staged: Future[None] = field(default_factory=Future)
    ended: Future[None] = field(default_factory=Future)

    def pack(self) -> bytes:
        """The host state; packed when it is asked for first."""
        if not isinstance(self.blob, bytes):
            self.blob = self.blob()
        return self.blob

    def fail(self, error: BaseException) -> None:
        """Hand an error to whoever waits for the round."""
        for future in (self.staged, self.ended):
            if not future.done():
                future.set_exception(error)
