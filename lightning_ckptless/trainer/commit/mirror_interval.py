"""How often this run mirrors: the user's interval, or one that is chosen when the run has seen what a version costs.

With `auto` every other step is mirrored at first. A version is copied beside the step that follows it; so the steps
that follow one are compared with those that do not. What a rank concludes travels with the vote of the next round, and
holds on all ranks from the version behind it on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.mirror_interval import (
    PROBE_INTERVAL,
    PROBE_STEPS,
    CadencePlan,
    Costs,
    failure_rate,
    plan_cadence,
    word,
)
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.reporting.report import RunReport

_COLD_STEPS = 4
"""After a start or a recovery, whose times say nothing."""
_USUAL_RECOVERY_S = 1.0
"""Taken for the time of a recovery while none was seen."""


class Cadence:
    """The interval between two versions, in optimizer steps.

    Args:
        options: the user's.
        report: knows the failures so far, and is told of the choice.
        clock: seconds.

    Attributes:
        interval: the one in force.
    """

    def __init__(
        self, options: CkptlessOptions, report: RunReport, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._options = options
        self._report = report
        self._clock = clock
        self._plan: CadencePlan | None = None
        self.begin()

    def begin(self, chosen: int | None = None) -> None:
        """Begin to measure, or go on with what was chosen.

        Args:
            chosen: the interval that a restored version was mirrored at; None while it was measured, though this rank
                may have come further since.
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
        self._beside_a_version: list[float] = []
        self._alone: list[float] = []

    @property
    def chosen(self) -> int | None:
        """What travels with a version: the interval, or None while it is measured."""
        return None if self._measures else self.interval

    # ------------------------------------------------------------------ training thread

    def begin_step(self, done: int) -> None:
        """A batch begins.

        Args:
            done: optimizer steps so far.
        """
        if not self._measures or done == self._step:
            return
        now = self._clock()
        if self._step is not None and done == self._step + 1:
            # A version is handed over at the end of a step; that time is the version's, as the copy beside the next.
            own_s = now - self._began_at - self._handed_over_s + self._handed_over_before_s
            self._note(own_s, beside_a_version=self._taken == self._step)
        self._step, self._began_at = done, now
        self._handed_over_before_s, self._handed_over_s = self._handed_over_s, 0.0

    def _note(self, step_s: float, *, beside_a_version: bool) -> None:
        if self._cold:
            self._cold -= 1
            return
        (self._beside_a_version if beside_a_version else self._alone).append(step_s)
        if self._plan is None and len(self._beside_a_version) + len(self._alone) >= PROBE_STEPS:
            self._plan = self._choose()

    def _choose(self) -> CadencePlan:
        report, alone_s = self._report, median(self._alone)
        phases, account = report.last_phases, report.account
        rate = failure_rate(self._options.failures_per_day, report.recoveries, report.clock() - account.began_at)
        costs = Costs(
            step_s=alone_s,
            version_s=max(0.0, median(self._beside_a_version) - alone_s),
            failures_per_s=rate,
            recovery_s=_USUAL_RECOVERY_S if phases is None else phases.total_s,
        )
        return plan_cadence(costs, self._options.mirror_budget)

    def took(self, version: Version, spent_s: float) -> None:
        """A version was handed to the mirror, which took the training thread some time."""
        self._taken = version.optimizer_step
        self._handed_over_s += spent_s

    def settle(self, interval: int) -> None:
        """All ranks have agreed on an interval."""
        if self._measures:
            assert self._plan is not None, "every rank has chosen before all agree"
            self._measures, self.interval = False, interval
            self._report.cadence(interval, self._plan)

    # ------------------------------------------------------------------ mirror thread

    def word(self) -> int | None:
        """What this rank says of the interval; None while it has nothing to say."""
        plan = self._plan
        return word(plan.interval) if plan is not None and self._measures else None
