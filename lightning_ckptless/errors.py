"""The exceptions that lightning_ckptless raises.

    CkptlessError
    ├── OptionsError          (also ValueError)  a setting that cannot work; raised before training starts
    ├── VersionError          (also ImportError)  Python, torch or Lightning is too old, or has moved what is used
    ├── LaunchError           the workers cannot be started or relaunched
    │   └── TimeLimitError    the run took longer than it was allowed to
    ├── ArenaError            shared memory cannot be created, attached, grown or read
    ├── DurableError          a durable state cannot be written, read or exported
    ├── TransportError        a peer did not answer, or answered with something else
    ├── ProtocolError         an event that the state table does not allow: a bug of ours
    ├── StateMissingError     no version of the state is complete, and no rung of the ladder is left
    ├── LayoutMismatchError   the relaunched script built another model or optimizer
    ├── WorldSizeError        this number of ranks cannot go on with the state
    ├── UnevenStepsError      one rank has ended training, another one has begun a further step
    ├── UnfitNodeError        this node failed its health check, and stays out
    └── WorkerError           cause of an exception in a notebook: where its worker raised it

A message names the rank, the step, what was expected, what was found, and the fix.
"""

from __future__ import annotations

import traceback


class CkptlessError(Exception):
    """Base of every exception raised by lightning_ckptless."""


class OptionsError(CkptlessError, ValueError):
    """A setting that cannot work. Raised before training starts."""


class VersionError(CkptlessError, ImportError):
    """Python, torch or Lightning is too old, or has moved what is used. Raised at import, before training starts."""


class LaunchError(CkptlessError, RuntimeError):
    """The workers cannot be started or relaunched."""


class TimeLimitError(LaunchError):
    """The run took longer than it was allowed to, and was ended."""


class ArenaError(CkptlessError, OSError):
    """Shared memory cannot be created, attached, grown or read."""


class DurableError(CkptlessError, OSError):
    """A durable state cannot be written, read or exported."""


class TransportError(CkptlessError, RuntimeError):
    """A peer did not answer, or answered with something else."""


class ProtocolError(CkptlessError, RuntimeError):
    """An event that the state table does not allow: a bug of ours, never the user's."""


class StateMissingError(CkptlessError, RuntimeError):
    """No version of the state is complete, and no rung of the ladder is left."""


class LayoutMismatchError(CkptlessError, RuntimeError):
    """The relaunched script built another model or optimizer than the one that was mirrored."""


class WorldSizeError(CkptlessError, RuntimeError):
    """This number of ranks cannot go on with the mirrored state."""


class UnevenStepsError(CkptlessError, RuntimeError):
    """One rank has ended training, another one has begun a further step: they have unequal numbers of batches."""


class UnfitNodeError(CkptlessError, RuntimeError):
    """This node failed its health check, and stays out of the run."""


class WorkerError(CkptlessError):
    """Where a worker raised an exception that is raised again in the notebook: the cause of that one."""

    def __str__(self) -> str:
        return "\n" + super().__str__()


def let_go(error: BaseException | None) -> None:
    """Have an error, and what it came of, hold on to nothing: their frames would keep process groups alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
