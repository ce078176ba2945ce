"""The cells of the fault matrix: a training configuration and the faults that are injected.

The matrix is not the full product. Every value of every axis occurs in a cell, and so does every pair that can
interact: data with the moment at which its position is captured, schedulers with validation, accumulation with the
middle of a step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from tests.lab.parts import Options


def is_version(found: str, expected: str) -> bool:
    """Whether a run resumed from a version or from the one before: a step is copied while the next one runs."""
    steps = [int(re.findall(r"\d+", version)[0]) for version in (found, expected)]
    return found == expected or steps[0] == steps[1] - 1


BASE = Options(samples=48, epochs=2)
"""Two ranks, six steps per epoch, twelve in total; validation after steps 6 and 12."""

FOUR = replace(BASE, devices=4, samples=96, epochs=1)


@dataclass(frozen=True)
class Cell:
    """One drill.

    Args:
        faults: a fault script.
        options: the training configuration.
        recoveries: expected number of recoveries.
        restored: expected versions that they resume from, in order.
    """

    faults: str
    options: Options = BASE
    recoveries: int = 1
    restored: tuple[str, ...] = ()


MOMENTS = {
    "rank=1-during=training_step": Cell("kill:rank=1:step=4", restored=("step 3",)),
    "rank=0-during=backward": Cell("kill:rank=0:step=5:at=backward", restored=("step 4",)),
    "rank=1-during=optimizer_step": Cell("kill:rank=1:step=4:at=optimizer_step", restored=("step 3",)),
    "rank=0-during=commit": Cell("kill:rank=0:step=8:at=commit", restored=("step 7",)),
    "rank=1-during=mirror": Cell("kill:rank=1:step=5:at=mirror", restored=("step 4",)),
    "rank=0-during=accumulation": Cell(
        "kill:rank=0:step=3:at=accumulation", replace(BASE, accumulate=2), restored=("step 2",)
    ),
    "rank=1-during=validation": Cell(
        "kill:rank=1:step=3:at=validation", replace(BASE, val_interval=3), restored=("step 3 (before validation)",)
    ),
    "rank=0-during=epoch_end": Cell("kill:rank=0:step=6:at=epoch_end"),
    "rank=0-at=first_step": Cell("kill:rank=0:step=1", restored=("step 0",)),
    # While the ranks agree on a new layout, because the optimizers have state now.
    "rank=1-at=first_commit": Cell("kill:rank=1:step=1:at=commit", restored=("step 0",)),
    "rank=1-at=last_step": Cell("kill:rank=1:step=12", restored=("step 11",)),
}
RANKS = {
    "rank=all-at_once": Cell("kill:rank=all:step=5", restored=("step 4",)),
    "rank=1-twice": Cell("kill:rank=1:step=3,kill:rank=1:step=9:at=backward", recoveries=2),
    "rank=0-then=1": Cell("kill:rank=0:step=2:at=optimizer_step,kill:rank=1:step=7", recoveries=2),
    "rank=1-exits": Cell("exit:rank=1:step=5"),
    "rank=0-raises": Cell("raise:rank=0:step=5"),
    # With three or more ranks, the rounding of sums depends on the gradient buckets.
    "rank=2-of_four": Cell("kill:rank=2:step=2,kill:rank=2:step=4", FOUR, recoveries=2, restored=("step 1", "step 3")),
}
DATA = {
    "data=sampler": Cell("kill:rank=1:step=9", replace(BASE, data="sampler")),
    "data=workers": Cell("kill:rank=0:step=4", replace(BASE, workers=2)),
    "data=persistent_workers": Cell("kill:rank=1:step=9:at=backward", replace(BASE, workers=2, persistent=True)),
    "data=iterable": Cell("kill:rank=1:step=3:at=optimizer_step", replace(BASE, data="iterable")),
    "data=iterable_with_workers": Cell("kill:rank=0:step=8", replace(BASE, data="sized_iterable", workers=2)),
    "data=stateful": Cell("kill:rank=1:step=4:at=commit", replace(BASE, data="stateful")),
    "data=own_sampler": Cell("kill:rank=1:step=4", replace(BASE, data="own_sampler")),
    "data=reloaded": Cell("kill:rank=1:step=9", replace(BASE, reload_every=1)),
    "data=reloaded_every_other_epoch": Cell(
        "kill:rank=0:step=10:at=validation", replace(BASE, samples=24, epochs=4, reload_every=2, val_interval=1)
    ),
    "data=combined": Cell("kill:rank=0:step=9:at=mirror", replace(BASE, data="combined")),
}
OPTIMIZATION = {
    "manual": Cell("kill:rank=1:step=4", replace(BASE, optimization="manual")),
    "two_optimizers": Cell("kill:rank=0:step=7:at=optimizer_step", replace(BASE, optimization="two")),
    "accumulate-epoch_scheduler": Cell("kill:rank=1:step=4", replace(BASE, accumulate=2, scheduler="epoch")),
    "plateau-early_stopping": Cell("kill:rank=0:step=8", replace(BASE, scheduler="plateau", early_stopping=True)),
    "clip-bf16": Cell("kill:rank=1:step=5:at=backward", replace(BASE, clip=0.5, precision="bf16-mixed")),
    "ema-checkpoints": Cell("kill:rank=0:step=9:at=commit", replace(BASE, ema=True, checkpoint_every=3)),
    # The averaged weights are swapped in for validation while the copy is in flight.
    "ema-copied_slowly": Cell(
        "kill:rank=0:step=8:at=validation",
        replace(BASE, ema=True, val_interval=2, slow_mirror_s=0.2, slow_mirror_at="stage", validate_after_commit=True),
        restored=("step 8 (before validation)",),
    ),
    # Once while the interval is being measured, and once after it has been chosen.
    "mirror_every=auto": Cell(
        "kill:rank=1:step=20,kill:rank=0:step=95",
        replace(BASE, samples=800, epochs=1, strategy_options="{'mirror_every_n_steps': 'auto'}"),
        recoveries=2,
    ),
    "mirror_every=3": Cell("kill:rank=1:step=8", replace(BASE, strategy_options="{'mirror_every_n_steps': 3}")),
    "staging=blocking": Cell("kill:rank=0:step=4", replace(BASE, strategy_options="{'staging': 'blocking'}")),
    # The copy into the arenas takes longer than the steps that follow: the mirror thread waits at its beginning.
    "staging=device": Cell(
        "kill:rank=0:step=8",
        replace(
            BASE,
            slow_mirror_s=0.2,
            slow_mirror_at="stage",
            strategy_options="{'staging': 'device', 'failure_domain': 'rank', 'mirror_every_n_steps': 3}",
        ),
    ),
}
VALIDATION = {
    "mid_epoch-plateau": Cell(
        "kill:rank=0:step=8:at=validation", replace(BASE, val_interval=2, scheduler="plateau", logger="both")
    ),
    "limited": Cell("kill:rank=1:step=5", replace(BASE, limit_train=4, val_interval=2, logger="tensorboard")),
    "max_steps": Cell("kill:rank=0:step=9", replace(BASE, max_steps=9)),
    "replica_per_rank": Cell(
        "kill:rank=1:step=4", replace(BASE, strategy_options="{'failure_domain': 'rank'}"), restored=("step 3",)
    ),
    "replica_per_rank-sent": Cell(
        "kill:rank=1:step=4",
        replace(BASE, strategy_options="{'failure_domain': 'rank', 'replicas': 'send'}"),
        restored=("step 3",),
    ),
}
CELLS = {**MOMENTS, **RANKS, **DATA, **OPTIMIZATION, **VALIDATION}
RELAUNCHED = (
    "rank=1-during=training_step",
    "rank=1-during=optimizer_step",
    "rank=0-during=accumulation",
    "rank=1-during=validation",
    "rank=0-during=epoch_end",
    "rank=0-at=first_step",
    "rank=1-twice",
    "rank=2-of_four",
    "data=persistent_workers",
    "data=iterable_with_workers",
    "data=stateful",
    "data=reloaded",
    "two_optimizers",
    "ema-checkpoints",
    "mirror_every=3",
    "mid_epoch-plateau",
    "replica_per_rank",
)
"""Cells that also run with a relaunch of all workers: those that depend on how a new process resumes."""
