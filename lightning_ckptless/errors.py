"""The exceptions that lightning_ckptless raises.

    CkptlessError
    ├── OptionsError          (also ValueError)  an invalid setting; raised before training starts
    ├── VersionError          (also ImportError)  Python, torch or Lightning is too old, or lacks a name that is used
    ├── LaunchError           the workers cannot be started or relaunched
    │   └── TimeLimitError    the run exceeded its time limit
    ├── ArenaError            shared memory cannot be created, attached, grown or read
    ├── DurableError          a durable state cannot be written, read or exported
    ├── TransportError        a peer did not answer, or sent an unexpected reply
    ├── ProtocolError         an event that the state table does not allow: a bug in lightning_ckptless
    ├── StateMissingError     no complete version of the state exists, and no other way to recover is left
    ├── LayoutMismatchError   the relaunched script built a different model or optimizer
    ├── WorldSizeError        training cannot continue with this number of ranks
    ├── RewindError           all ranks were to go back to an earlier step, and cannot
    ├── DivergenceError       replicas that should be equal differ, and the run must end
    ├── UnevenStepsError      one rank has finished training while another has started a further step
    ├── UnfitNodeError        this node failed its health check and was excluded
    └── WorkerError           cause of an exception raised in a notebook: the worker's own traceback

A message names the rank, the step, the expected and the found value, and the fix.
"""

from __future__ import annotations

import signal
import traceback

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
"""Exit code of a process that ends because of SIGTERM, as in a shell."""


class CkptlessError(Exception):
    """Base of every exception raised by lightning_ckptless."""


class OptionsError(CkptlessError, ValueError):
    """An invalid setting. Raised before training starts."""


class VersionError(CkptlessError, ImportError):
    """Python, torch or Lightning is too old, or lacks a name that is used. Raised at import or before training."""


class LaunchError(CkptlessError, RuntimeError):
    """The workers cannot be started or relaunched."""


class TimeLimitError(LaunchError):
    """The run exceeded its time limit and was stopped."""


class ArenaError(CkptlessError, OSError):
    """Shared memory cannot be created, attached, grown or read."""


class DurableError(CkptlessError, OSError):
    """A durable state cannot be written, read or exported."""


class TransportError(CkptlessError, RuntimeError):
    """A peer did not answer, or sent an unexpected reply."""


class ProtocolError(CkptlessError, RuntimeError):
    """An event that the state table does not allow: a bug in lightning_ckptless, not in the training script."""


class StateMissingError(CkptlessError, RuntimeError):
    """No complete version of the state exists, and no other way to recover is left."""


class LayoutMismatchError(CkptlessError, RuntimeError):
    """The relaunched script built a model or optimizer that differs from the mirrored one."""


class WorldSizeError(CkptlessError, RuntimeError):
    """Training cannot continue from the mirrored state with this number of ranks."""


class RewindError(CkptlessError, RuntimeError):
    """All ranks were to go back to an earlier step, and cannot: it is not in the history, or it does not help."""


class DivergenceError(CkptlessError, RuntimeError):
    """Replicas or gradients that should be equal bit for bit differ, and the run cannot continue."""


class UnevenStepsError(CkptlessError, RuntimeError):
    """One rank has finished training while another has started a further step: their numbers of batches differ."""


class UnfitNodeError(CkptlessError, RuntimeError):
    """This node failed its health check and was excluded from the run."""


class WorkerError(CkptlessError):
    """Cause of an exception that is re-raised in a notebook; its text is the worker's own traceback."""

    def __str__(self) -> str:
        return "\n" + super().__str__()


def let_go(error: BaseException | None) -> None:
    """Clear the frames of an error and of its causes, which would otherwise keep process groups alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
