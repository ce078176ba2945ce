"""The step as a transaction: the two moments of an optimizer step at which a version of the state exists.

Lightning's epoch loop runs `advance` (fetch, forward, backward, optimizer step, schedulers, `on_train_batch_end`) and
then `on_advance_end` (validation, plateau schedulers). A version is captured

* after `on_advance_end`: no work of the step is pending;
* after `advance`, if validation follows: so that a fault during a long validation costs no step.

Hooks follow the second one, and the last version of an epoch. They may write to the weights in ways that torch does
not count (through `.data`), as those do that swap in averaged weights for validation. So the copy of the version must
be complete before they run.

There is no other moment: inside `on_train_batch_end` Lightning's counters disagree by one step, and inside the
optimizer step only part of the parameters is updated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.override import Override, remove_overrides
from lightning_ckptless.protocol.versions import Version

Commit = Callable[[Version], None]


class StepBoundaries:
    """Calls `commit` at each moment at which a version exists.

    Wraps the two methods of the epoch loop on the instance, not on the class; `remove` unwraps them.

    Args:
        loops: loops of the trainer.
        commit: captures the version that now exists.
        every_n_steps: returns the number of optimizer steps between versions.
        since: version that the run starts from; None for a fresh run, which begins by capturing its initial state.
        before_batch: called with the fetcher before each batch.
        ends_here: called whenever a version may be captured; if it returns true, one is captured and the run ends.
        before_hooks: called before the hooks of validation and of the end of an epoch; returns once they may change the
            weights.
        after_batch: called when everything that follows a batch is done; may end the run by raising.
        training: called with true before and with false after a batch is trained on.
    """

    def __init__(
        self,
        loops: FitLoops,
        commit: Commit,
        *,
        every_n_steps: Callable[[], int],
        since: Version | None,
        before_batch: Callable[[Any], None] = lambda _: None,
        ends_here: Callable[[], bool] = lambda: False,
        before_hooks: Callable[[], None] = lambda: None,
        after_batch: Callable[[], None] = lambda: None,
        training: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.loops = loops
        self.commit = commit
        self.before_batch = before_batch
        self.ends_here = ends_here
        self.every_n_steps = every_n_steps
        self.last = since
        self._before_hooks = before_hooks
        self._after_batch = after_batch
        self._training = training
        self._advance = Override(loops.epoch, "advance", self.advance).original
        self._on_advance_end = Override(loops.epoch, "on_advance_end", self.on_advance_end).original

    def remove(self) -> None:
        """Restore the epoch loop's own methods."""
        remove_overrides(self.loops.epoch, "advance", "on_advance_end")

    def advance(self, fetcher: Any) -> None:
        """Run one batch; captures a version after it if validation follows."""
        self.before_batch(fetcher)
        if self.last is None and not self.loops.epoch.restarting:
            self._take(validation_done=True)
        self._training(True)
        self._advance(fetcher)
        self._training(False)
        if not self.loops.validation_may_follow(fetcher):
            return
        is_new = self.loops.step_done() and self._step_is_new()
        if is_new and self.loops.ranks_agree_on_validation and self._is_due(pending=1):
            self._take(validation_done=False)
        self._before_hooks()

    def on_advance_end(self, fetcher: Any) -> None:
        """Run what follows the batch, then capture a version."""
        step_done = self.loops.step_done()
        self._on_advance_end(fetcher)
        if step_done and self._step_is_new() and self._is_due(pending=0):
            self._take(validation_done=True)
        if self.loops.epoch_ends:
            self._before_hooks()
        self._after_batch()

    def closes_validation(self, version: Version) -> bool:
        """Whether a version, not yet recorded as the last one, completes a validation phase."""
        last = self.last
        return version.validation_done and last is not None and last == Version(version.optimizer_step, False)

    def _step_is_new(self) -> bool:
        last = self.last
        return last is None or not last.validation_done or self.loops.step > last.optimizer_step

    def _is_due(self, *, pending: int) -> bool:
        return self.ends_here() or (self.loops.batches_that_stepped + pending) % self.every_n_steps() == 0

    def _take(self, *, validation_done: bool) -> None:
        version = Version(self.loops.step, validation_done)
        self.commit(version)
        self.last = version
