"""How often this run mirrors: at the user's interval, or at one chosen from the measured cost of a version.

With `auto` every other step is mirrored at first. A version is copied during the step that follows it, so the steps
that follow a version are compared with those that do not. Each rank's choice travels with its vote in the next round,
and the agreed interval applies on all ranks from the version after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.mirror_interval import (
    PROBE_INTERVAL,
    PROBE_STEPS,
    Costs,
    IntervalPlan,
    failure_rate,
    plan_interval,
    word,
)
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.reporting.report import RunReport

_COLD_STEPS = 4
"""Steps after a start or a recovery that are not measured: their times are not representative."""
_USUAL_RECOVERY_S = 1.0
"""Assumed duration of a recovery before one has been measured."""


class MirrorInterval:
    """The interval between two versions, in optimizer steps.

    Args:
        options: the user's settings.
        report: provides the failures so far, and reports the choice.
        clock: returns seconds.

    Attributes:
        interval: the current interval.
    """

    def __init__(
        self, options: CkptlessOptions, report: RunReport, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._options = options
        self._report = report
        self._clock = clock
        self._plan: IntervalPlan | None = None
        self.begin()

    def begin(self, chosen: int | None = None) -> None:
        """Begin to measure, or continue with a chosen interval.

        Args:
            chosen: interval at which a restored version was mirrored; None if it was still being measured then, even
                if this rank has chosen since.
        """
        every = self._options.mirror_every_n_steps if chosen is None else chosen
        self.interval = PROBE_INTERVAL if every == "auto" else every
        self._measures = every == "auto"
        self._cold = _COLD_STEPS
        self._step: int | None = None
        self._began_at = 0.0
        self._taken: int | None = None
        self._handed_over_s = self._handed_over_before_s = 0.0
        self._plan = None
        self._after_version: list[float] = []
        self._alone: list[float] = []

    @property
    def chosen(self) -> int | None:
        """The interval as stored with a version; None while it is being measured."""
        return None if self._measures else self.interval

    # ------------------------------------------------------------------ training thread

    def begin_step(self, done: int) -> None:
        """Begin a batch.

        Args:
            done: number of completed optimizer steps.
        """
        if not self._measures or done == self._step:
            return
        now = self._clock()
        if self._step is not None and done == self._step + 1:
            # Handing a version over at the end of a step is a cost of the version, like its copying in the next step.
            own_s = now - self._began_at - self._handed_over_s + self._handed_over_before_s
            self._note(own_s, after_version=self._taken == self._step)
        self._step, self._began_at = done, now
        self._handed_over_before_s, self._handed_over_s = self._handed_over_s, 0.0

    def _note(self, step_s: float, *, after_version: bool) -> None:
        if self._cold:
            self._cold -= 1
            return
        (self._after_version if after_version else self._alone).append(step_s)
        if self._plan is None and len(self._after_version) + len(self._alone) >= PROBE_STEPS:
            self._plan = self._choose()

    def _choose(self) -> IntervalPlan:
        report, alone_s = self._report, median(self._alone)
        phases, account = report.last_phases, report.account
        rate = failure_rate(self._options.failures_per_day, report.counts.recoveries, report.clock() - account.began_at)
        costs = Costs(
            step_s=alone_s,
            version_s=max(0.0, median(self._after_version) - alone_s),
            failures_per_s=rate,
            recovery_s=_USUAL_RECOVERY_S if phases is None else phases.total_s,
        )
        return plan_interval(costs, self._options.mirror_budget)

    def took(self, version: Version, spent_s: float) -> None:
        """Add the time for which handing a version to the mirror occupied the training thread."""
        self._taken = version.optimizer_step
        self._handed_over_s += spent_s

    def settle(self, interval: int) -> None:
        """Adopt the interval that all ranks have agreed on."""
        if self._measures:
            assert self._plan is not None, "every rank has chosen before all ranks agree"
            self._measures, self.interval = False, interval
            self._report.mirror_interval(interval, self._plan)

    # ------------------------------------------------------------------ mirror thread

    def word(self) -> int | None:
        """This rank's vote on the interval; None while it has none."""
        plan = self._plan
        return word(plan.interval) if plan is not None and self._measures else None
