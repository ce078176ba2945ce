"""The clock of a run: what the training thread spends its time on, as recorded in the ledger."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import psutil

from lightning_ckptless import environment
from lightning_ckptless.protocol.time_account import Bucket, Outage, TimeAccount
from lightning_ckptless.trainer.reporting.rank_ledger import RankLedger

_NOTE_EVERY_S = 1.0
_NOTE_EVERY_SHARE = 1e-3
"""Share of the wall time between two notes in the ledger: their number grows with its logarithm."""
_NOTE_RANK_EVERY_S = 60.0
_NOTE_RANK_EVERY_SHARE = 0.1
"""The same for the notes of all ranks."""


class _Spending(AbstractContextManager[None]):
    """The context of one bucket. There are several in each step, so they are made once."""

    def __init__(self, clock: RunClock, bucket: Bucket) -> None:
        self._clock = clock
        self._bucket = bucket

    def __enter__(self) -> None:
        self._clock.enter(self._bucket)

    def __exit__(self, *_: object) -> None:
        self._clock.leave()


class RunClock:
    """Accounts for the time of one rank. Used by the training thread only.

    Args:
        ledger: ledger of this rank.
        began_at: when the time of this `fit` began.
        clock: returns seconds since the epoch.

    Attributes:
        account: the time so far; replaced by that of a restored version.
    """

    def __init__(self, ledger: RankLedger, began_at: float, clock: Callable[[], float] = time.time) -> None:
        self.account = TimeAccount(began_at)
        self._ledger = ledger
        self._clock = clock
        self._buckets = [Bucket.START]
        self._contexts = {bucket: _Spending(self, bucket) for bucket in Bucket}
        self._noted_at = 0.0
        self._noted_rank_at = began_at
        self._own_s = 0.0
        self._batches = 0
        self._batch_began_at: float | None = None

    # ------------------------------------------------------------------ what time is spent on

    def enter(self, bucket: Bucket) -> None:
        """Count the time from now on in a bucket, until `leave`; before the first batch, all of it is `start`."""
        self.touch()
        self._buckets.append(bucket if self._buckets[0] is not Bucket.START else Bucket.START)

    def leave(self) -> None:
        """Count the time from now on in the previous bucket again."""
        self.touch()
        if len(self._buckets) > 1:
            self._buckets.pop()

    def spending(self, bucket: Bucket) -> AbstractContextManager[None]:
        """Context whose time is counted in a bucket."""
        return self._contexts[bucket]

    def touch(self) -> None:
        """Account for the time until now."""
        self.account.advance(self._clock(), self._buckets[-1])

    def begin_batch(self) -> None:
        """Begin to measure this rank's own work on a batch."""
        self._batch_began_at = self._clock()

    def end_own_work(self) -> None:
        """End it: this rank is about to enter a collective. Further calls in the same batch do nothing."""
        if self._batch_began_at is not None:
            self._own_s += max(0.0, self._clock() - self._batch_began_at)
            self._batches += 1
            self._batch_began_at = None

    # ------------------------------------------------------------------ from start to end

    def begin_training(self, outage: Outage | None = None) -> None:
        """Count the time as training from now on, unless a restored version has been doing that.

        Args:
            outage: a fault before this beginning, if no version was left to restore.
        """
        if self._buckets[0] is Bucket.START:
            if outage is not None:
                self.account.advance_through(outage.marks(self._clock()))
            self.touch()
            self._buckets = [Bucket.TRAINING]

    def end_training(self) -> None:
        """Count the time as idle from now on: no further step follows."""
        self.touch()
        self._buckets = [Bucket.IDLE]

    def resume(self, saved: Mapping[str, Any], outage: Outage) -> None:
        """Continue the account of a restored version; training is about to resume.

        Args:
            saved: what `state` returned.
            outage: what is known of the time since then.
        """
        self.account = TimeAccount.from_dict(saved["account"])
        self.account.advance_through(outage.marks(self._clock()))
        self._own_s, self._batches, self._batch_began_at = saved["own_s"], saved["batches"], None
        self._buckets = [Bucket.TRAINING]

    def begin_rewind(self) -> None:
        """Count the time from now on as rewind, until `end_rewind`."""
        self.touch()
        self._buckets = [Bucket.REWIND]

    def end_rewind(self, saved: Mapping[str, Any]) -> None:
        """Count the time as training from now on, and the steps since a version as lost.

        Args:
            saved: what `state` returned at the version.
        """
        self.touch()
        self.account.rewind_to(TimeAccount.from_dict(saved["account"]).productive_s)
        self._buckets, self._batch_began_at = [Bucket.TRAINING], None

    def state(self) -> dict[str, Any]:
        """The time until now, to be mirrored with a version."""
        self.touch()
        return {"account": self.account.to_dict(), "own_s": self._own_s, "batches": self._batches}

    # ------------------------------------------------------------------ the ledger

    @property
    def is_note_due(self) -> bool:
        """Whether the last note in the ledger is older than a second and a thousandth of the run."""
        account = self.account
        return account.until - self._noted_at >= max(_NOTE_EVERY_S, _NOTE_EVERY_SHARE * account.wall_s)

    def note(self, *, is_over: bool, **counts: int) -> None:
        """Write the account to the ledger.

        Args:
            is_over: whether this `fit` has returned.
            counts: what else has been counted until now.
        """
        self.touch()
        account = self.account
        self._noted_at = account.until
        self._ledger.record(
            "time_spent",
            began_at=account.began_at,
            until=account.until,
            seconds={str(bucket): round(spent_s, 6) for bucket, spent_s in account.seconds.items()},
            is_over=is_over,
            **counts,
        )

    @property
    def is_note_of_rank_due(self) -> bool:
        """Whether the last note of this rank is older than a minute and a tenth of the run."""
        account = self.account
        every_s = max(_NOTE_RANK_EVERY_S, _NOTE_RANK_EVERY_SHARE * account.wall_s)
        return account.until - self._noted_rank_at >= every_s

    def note_rank(self) -> None:
        """Write to the ledger how long this rank has waited for its data, and how long its own work took.

        Does nothing if there is no ledger: rank 0 reports once for all why it cannot be written.
        """
        self._noted_rank_at = self.account.until
        if not self._ledger.path.exists():
            return
        data_wait_s = self.account.seconds.get(Bucket.DATA_WAIT, 0.0)
        self._ledger.record("rank_time", data_wait_s=data_wait_s, own_s=self._own_s, batches=self._batches)


def agent_started_at(agent_pid: int, *, own_agent: bool, env: Mapping[str, str] = os.environ) -> float:
    """When the agent of this process was started, in seconds since the epoch.

    Args:
        agent_pid: process id of the agent.
        own_agent: whether it is ours, which reports its start; otherwise the start time of the process is used.
        env: environment variables of this process.
    """
    if own_agent:
        return float(env.get(environment.AGENT_STARTED_AT) or time.time())
    try:
        return float(psutil.Process(agent_pid).create_time())
    except psutil.Error:
        return time.time()
