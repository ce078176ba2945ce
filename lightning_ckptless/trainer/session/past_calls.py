"""Records of trainer calls, which a process that starts later replays instead of computing them again.

A new process runs the script from its beginning. The calls of `fit`, `validate`, `test` and `predict` on its way have
already been computed; the record of each contains what it left behind. Records are stored in a folder of the agent,
which outlives the workers, as one file per call and rank. A call counts as recorded once all ranks of the node have
recorded it. A worker that cannot record a call stores the reason instead.
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
from lightning_ckptless.trainer.session.identity import calls_before, fits_before

Record = dict[str, Any]

_REPLAYING = "replaying-"
"""Prefix of the file, named after a process id, that marks a process as replaying calls."""


class PastCalls:
    """Records of one rank's calls.

    Args:
        folder: folder of the agent; None under an external agent.
        rank: this rank, in a run on a single node.
        world_size: number of ranks.
    """

    def __init__(self, folder: Path | None, rank: int, world_size: int) -> None:
        self._folder = folder
        self._rank = rank
        self._world_size = world_size

    @classmethod
    def of(cls, strategy: Any) -> PastCalls:
        """Records of this process.

        Args:
            strategy: strategy with this process's rank.
        """
        folder = os.environ.get(environment.AGENT_DIR)
        return cls(
            Path(folder, "calls") if folder and strategy.num_nodes == 1 and strategy.replicates else None,
            strategy.cluster_environment.global_rank(),
            strategy.cluster_environment.world_size(),
        )

    @property
    def number(self) -> int:
        """Number of calls that this process has made or replayed."""
        return calls_before() + fits_before()

    @property
    def are_kept(self) -> bool:
        """Whether calls are recorded."""
        return self._folder is not None

    # ------------------------------------------------------------------ reading

    def find(self, number: int) -> Record | None:
        """The record of a call; None if not all ranks have recorded it, or if replaying has failed before.

        Args:
            number: number of the call, from 0.
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
        """Whether no script has failed while replaying its calls: it would fail there again."""
        assert self._folder is not None
        marks = (int(path.name.removeprefix(_REPLAYING)) for path in self._folder.glob(f"{_REPLAYING}*"))
        failures = (failure_of(self._folder.parent, pid) for pid in marks)
        return not any(failure is not None and not failure.is_of_lost_peer for failure in failures)

    def is_over(self, number: int) -> bool:
        """Whether any rank has completed a call, recorded or not: no process can join it any more.

        Args:
            number: number of the call.
        """
        return self._folder is not None and any(self._folder.glob(f"*-{number}-of-rank-*"))

    def obstacle(self, number: int) -> str | None:
        """Why a new process could not replay the calls before a given one; None if it could.

        Args:
            number: number of the current call.
        """
        if not number:
            return None
        if self._folder is None:
            return (
                f"the script is in call {number + 1} of its trainers, and earlier calls are recorded for new processes "
                "only on a single node, for models that are not sharded, under a ckptless agent"
            )
        if not self._are_usable:
            return "a new process failed between two calls of the script's trainers"
        for earlier in range(number):
            reason = self._reason_path(earlier)
            if reason.exists():
                return reason.read_text()
            if not self._path(earlier, self._rank).exists():
                return f"call {earlier + 1} of the script's trainers is not recorded"
        return None

    # ------------------------------------------------------------------ writing

    def write(self, number: int, record: Record) -> None:
        """Record a call.

        Args:
            number: number of the call.
            record: what the call left behind.
        """
        try:
            self._replace(self._path(number, self._rank), lambda file: SmallTensorPickler(file, 5).dump(record))
        except (pickle.PicklingError, TypeError, AttributeError, OSError) as error:
            self.refuse(number, f"call {number + 1} of the script's trainers could not be recorded: {error}")
        else:
            self._reason_path(number).unlink(missing_ok=True)

    def forget(self, number: int) -> None:
        """Remove this rank's record of a call that is made again."""
        if self._folder is not None:
            self._path(number, self._rank).unlink(missing_ok=True)

    def refuse(self, number: int, reason: str) -> None:
        """Store why a call is not recorded.

        Args:
            number: number of the call.
            reason: the reason, as a sentence.
        """
        if self._folder is not None:
            self._replace(self._reason_path(number), lambda file: file.write(reason.encode()))

    def note(self, number: int, facts: str) -> None:
        """Store what a process that makes a call again needs to know.

        Args:
            number: number of the call.
            facts: facts about the call, as text.
        """
        if self._folder is not None:
            self._replace(self._folder / f"begun-{number}", lambda file: file.write(facts.encode()))

    def noted(self, number: int) -> str | None:
        """What `note` stored; None if no process has begun the call."""
        path = None if self._folder is None else self._folder / f"begun-{number}"
        return path.read_text() if path is not None and path.exists() else None

    def is_refused(self, number: int) -> bool:
        """Whether a call was made but could not be recorded."""
        return self._folder is not None and self._reason_path(number).exists()

    def begin_replay(self) -> None:
        """Mark this process as replaying calls."""
        assert self._folder is not None
        self._mark.touch()

    def fail_replay(self, error: BaseException) -> None:
        """Report that this process failed to replay a call."""
        report_failure(error)

    def end_replay(self) -> None:
        """Remove the mark: this process has reached a call that it takes part in."""
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
        return self._folder / f"{_REPLAYING}{os.getpid()}"


def _read(path: Path) -> Record:
    # Safe to unpickle: written by a worker of the same agent, into a folder that only this user can write to.
    record: Record = pickle.loads(path.read_bytes())
    return record
