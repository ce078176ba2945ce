"""Records of the calls of trainers that a program has made: a process that comes later is brought past them by these.

A new process runs the program from its head. What it finds there of `fit`, `validate`, `test` and `predict` has been
computed already; the record of each call holds what it has left behind. Records lie in a folder of the agent, which
outlives the workers, one file per call and rank. A call counts as recorded when all ranks of the machine have recorded
it. A worker that could not record a call has left the reason instead.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_ckptless import environment
from lightning_ckptless.formats.packing import SmallTensorPickler
from lightning_ckptless.membership.channel.program_failure import failure_of, report_failure
from lightning_ckptless.trainer.session.identity import calls_before, chapters_before

Record = dict[str, Any]

_PASSING = "passing-"
"""With a process id, the mark of a process that is between calls which it is brought past."""


class PastCalls:
    """Those of one rank.

    Args:
        folder: of the agent; None where no agent of ours is there.
        rank: this rank, on a run of one machine.
        world_size: number of ranks.
    """

    def __init__(self, folder: Path | None, rank: int, world_size: int) -> None:
        self._folder = folder
        self._rank = rank
        self._world_size = world_size

    @classmethod
    def of(cls, strategy: Any) -> PastCalls:
        """Those of this process.

        Args:
            strategy: that has its rank.
        """
        folder = os.environ.get(environment.AGENT_DIR)
        return cls(
            Path(folder, "calls") if folder and strategy.num_nodes == 1 and strategy.replicates else None,
            strategy.cluster_environment.global_rank(),
            strategy.cluster_environment.world_size(),
        )

    @property
    def number(self) -> int:
        """How many calls this process has made, or was brought past."""
        return calls_before() + chapters_before()

    @property
    def are_kept(self) -> bool:
        """Whether calls are recorded."""
        return self._folder is not None

    # ------------------------------------------------------------------ reading

    def find(self, number: int) -> Record | None:
        """The record of a call; None where not all ranks have recorded it, or an earlier attempt to use it has failed.

        Args:
            number: of the call, from 0.
        """
        if self._folder is None or not self._are_usable:
            return None
        paths = [self._path(number, rank) for rank in range(self._world_size)]
        if not all(path.exists() for path in paths):
            return None
        record = _read(paths[self._rank])
        of_rank_zero = _read(paths[0]) if self._rank else record
        record["tensors"] = of_rank_zero["shared"] | record["tensors"]
        return record

    @property
    def _are_usable(self) -> bool:
        """Whether no program has failed while it was brought past its calls: it would fail there again."""
        assert self._folder is not None
        marks = (int(path.name.removeprefix(_PASSING)) for path in self._folder.glob(f"{_PASSING}*"))
        failures = (failure_of(self._folder.parent, pid) for pid in marks)
        return not any(failure is not None and not failure.is_of_lost_peer for failure in failures)

    def is_over(self, number: int) -> bool:
        """Whether some rank has ended a call, recorded or not: no process can join it.

        Args:
            number: of the call.
        """
        return self._folder is not None and any(self._folder.glob(f"*-{number}-of-rank-*"))

    def obstacle(self, number: int) -> str | None:
        """Why a new process could not be brought past the calls before one; None where it could.

        Args:
            number: of the call that is under way.
        """
        if not number:
            return None
        if self._folder is None:
            return (
                f"the program is in call {number + 1} of its trainers, and what the earlier ones have left is kept for "
                "a new process only on one machine, for models that are not sharded, under an agent of this package"
            )
        if not self._are_usable:
            return "a new process has failed between two calls of the program's trainers"
        for earlier in range(number):
            reason = self._reason_path(earlier)
            if reason.exists():
                return reason.read_text()
            if not self._path(earlier, self._rank).exists():
                return f"call {earlier + 1} of the program's trainers is not recorded"
        return None

    # ------------------------------------------------------------------ writing

    def write(self, number: int, record: Record) -> None:
        """Record a call.

        Args:
            number: of the call.
            record: what it has left behind.
        """
        try:
            self._replace(self._path(number, self._rank), lambda file: SmallTensorPickler(file, 5).dump(record))
        except (pickle.PicklingError, TypeError, AttributeError, OSError) as error:
            self.refuse(number, f"what call {number + 1} of its trainers has left could not be recorded: {error}")
        else:
            self._reason_path(number).unlink(missing_ok=True)

    def forget(self, number: int) -> None:
        """Drop this rank's record of a call that is made again."""
        if self._folder is not None:
            self._path(number, self._rank).unlink(missing_ok=True)

    def refuse(self, number: int, reason: str) -> None:
        """Note that a call is not recorded.

        Args:
            number: of the call.
            reason: why not, in a sentence.
        """
        if self._folder is not None:
            self._replace(self._reason_path(number), lambda file: file.write(reason.encode()))

    def note(self, number: int, facts: str) -> None:
        """Keep what a process that makes a call again has to know.

        Args:
            number: of the call.
            facts: about it, as text.
        """
        if self._folder is not None:
            self._replace(self._folder / f"begun-{number}", lambda file: file.write(facts.encode()))

    def noted(self, number: int) -> str | None:
        """What `note` has kept; None where no process has begun the call."""
        path = None if self._folder is None else self._folder / f"begun-{number}"
        return path.read_text() if path is not None and path.exists() else None

    def is_refused(self, number: int) -> bool:
        """Whether a call was made, and could not be recorded."""
        return self._folder is not None and self._reason_path(number).exists()

    def begin_passing(self) -> None:
        """This process is about to be brought past a call."""
        assert self._folder is not None
        self._mark.touch()

    def fail_to_pass(self, error: BaseException) -> None:
        """This process could not be brought past a call, and ends."""
        report_failure(error)

    def end_passing(self) -> None:
        """This process has come to a call that it takes part in."""
        if self._folder is not None:
            self._mark.unlink(missing_ok=True)

    def _replace(self, path: Path, fill: Callable[[Any], Any]) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        draft = path.with_suffix(".part")
        try:
            with draft.open("wb") as file:
                fill(file)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def _path(self, number: int, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / f"call-{number}-of-rank-{rank}"

    def _reason_path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"why-not-{number}-of-rank-{self._rank}"

    @property
    def _mark(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{_PASSING}{os.getpid()}"


def _read(path: Path) -> Record:
    # Written by a worker of the same agent, into a folder that is this user's alone.
    record: Record = pickle.loads(path.read_bytes())
    return record
