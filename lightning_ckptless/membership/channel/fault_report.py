"""Why a generation ended: what the agent passes to the workers of the next one."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FaultReport:
    """What one agent saw of a fault.

    Args:
        rank: global rank of the worker that failed first; None when none of this agent's workers failed and they were
            relaunched because the membership changed.
        pid: its process id.
        exit_code: its exit code; None when a signal ended it.
        signal_name: the signal that ended it, e.g. `SIGKILL`.
        died_at: wall clock of its death, or of the last progress of a worker that hung, in seconds since the epoch.
        detected_at: wall clock at which the agent noticed it.
        stopped_at: wall clock at which the last of the agent's workers had exited.
        restart: how many faults this agent has seen, this one included.
        world_size: number of ranks in the generation that ended.
        hung: why it counted as hung and was killed; empty if it did not.
        earlier: earlier faults whose recovery this one interrupted: the wall clock of each, and a sentence.
        out_of_memory: how many processes the kernel has killed for lack of memory, in words; empty if it has killed
            none since the previous fault.
        drained: why the rank was handed over, which is no fault; empty if it was not.
    """

    rank: int | None
    pid: int | None
    exit_code: int | None
    signal_name: str | None
    died_at: float
    detected_at: float
    stopped_at: float
    restart: int
    world_size: int
    hung: str = ""
    earlier: tuple[tuple[float, str], ...] = ()
    out_of_memory: str = ""
    drained: str = ""

    def __post_init__(self) -> None:
        # Tuples, so that a report that was sent as JSON equals the original.
        object.__setattr__(self, "earlier", tuple((at, text) for at, text in self.earlier))

    @property
    def as_earlier(self) -> tuple[float, str]:
        """This fault as one of those that a later one names."""
        return self.died_at, str(self)

    @property
    def recovering_since(self) -> float | None:
        """Wall clock of the first of the earlier faults; None if there are none."""
        return self.earlier[0][0] if self.earlier else None

    @property
    def failed_tries_s(self) -> float:
        """Time in seconds from the first fault of the recovery to this one."""
        return 0.0 if self.recovering_since is None else max(0.0, self.died_at - self.recovering_since)

    @property
    def kind(self) -> str:
        """`killed` by a signal, `exited` by itself, `hung`, `lost` together with its node, or `drained`."""
        if self.drained:
            return "drained"
        if self.hung:
            return "hung"
        if self.rank is None:
            return "lost"
        return "exited" if self.exit_code is not None else "killed"

    @property
    def cause(self) -> str:
        """What happened to the culprit, or to the run if there is none."""
        if self.rank is None:
            return "the members of the run changed"
        if self.drained:
            return "handed over"
        if self.hung:
            return "hung"
        if self.exit_code is not None:
            return f"exited with code {self.exit_code}"
        death = f"died by {self.signal_name}" if self.signal_name else "died"
        return f"{death} for lack of memory" if self.out_of_memory else death

    def __str__(self) -> str:
        if self.rank is None:
            return self.cause
        details = "; ".join(filter(None, [self.drained, self.hung, self.out_of_memory]))
        return f"rank {self.rank} (pid {self.pid}) {self.cause}" + (f": {details}" if details else "")

    def fields(self) -> dict[str, Any]:
        """The report as a flat dictionary of plain values."""
        return {**asdict(self), "kind": self.kind}

    def to_json(self) -> str:
        """The report as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> FaultReport:
        """Read a report that `to_json` wrote."""
        return cls(**json.loads(text))


def split_exit(exit_code: int) -> tuple[int | None, str | None]:
    """Split an exit code of `subprocess`: (code, None) after an exit, (None, signal name) after a signal."""
    if exit_code >= 0:
        return exit_code, None
    try:
        return None, signal.Signals(-exit_code).name
    except ValueError:
        return None, f"signal {-exit_code}"


def shell_code(exit_code: int) -> int:
    """Convert an exit code of `subprocess` to that of a shell: 128 + number for a signal."""
    return exit_code if exit_code >= 0 else 128 - exit_code
