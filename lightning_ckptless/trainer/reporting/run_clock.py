"""The clock of a run: what the training thread spends its time on, noted in the ledger."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

from lightning_ckptless import environment
from lightning_ckptless.protocol.time_account import Bucket, Outage, TimeAccount
from lightning_ckptless.trainer.reporting.rank_ledger import RankLedger

_NOTE_EVERY_S = 1.0
_NOTE_EVERY_SHARE = 1e-3
"""Share of the wall time between two notes in the ledger: their number grows with its logarithm."""


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
        self._noted_at = 0.0

    # ------------------------------------------------------------------ what time is spent on

    def enter(self, bucket: Bucket) -> None:
        """Count the time from now on in a bucket, until `leave`; before the first batch, all of it is `start`."""
        self.touch()
        self._buckets.append(bucket if self._buckets[0] is not Bucket.START else Bucket.START)

    def leave(self) -> None:
        """Count the time in the bucket that was left for the last one."""
        self.touch()
        if len(self._buckets) > 1:
            self._buckets.pop()

    @contextmanager
    def spending(self, bucket: Bucket) -> Iterator[None]:
        """Context whose time is counted in a bucket."""
        self.enter(bucket)
        try:
            yield
        finally:
            self.leave()

    def touch(self) -> None:
        """Account for the time until now."""
        self.account.advance(self._clock(), self._buckets[-1])

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
            saved: the account.
            outage: what is known of the time since then.
        """
        self.account = TimeAccount.from_dict(saved)
        self.account.advance_through(outage.marks(self._clock()))
        self._buckets = [Bucket.TRAINING]

    def state(self) -> dict[str, Any]:
        """The account until now, to be mirrored with a version."""
        self.touch()
        return self.account.to_dict()

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


def agent_started_at(agent_pid: int, *, own_agent: bool, env: Mapping[str, str] = os.environ) -> float:
    """When the agent of this process was started, in seconds since the epoch.

    Args:
        agent_pid: process id of the agent.
        own_agent: whether it is ours, and says when; of another launcher's, the process is asked.
        env: environment variables of this process.
    """
    if own_agent:
        return float(env.get(environment.AGENT_STARTED_AT) or time.time())
    try:
        return float(psutil.Process(agent_pid).create_time())
    except psutil.Error:
        return time.time()
