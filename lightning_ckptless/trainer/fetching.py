"""A version is brought from the arenas to the ranks that go on with it, be they as many as have written it or not."""

from __future__ import annotations

from typing import Any

from lightning_ckptless.options import ElasticBatch
from lightning_ckptless.protocol.versions import Complete
from lightning_ckptless.replica.restore import fetch, shared_layout
from lightning_ckptless.trainer.begun import step_in_flight
from lightning_ckptless.trainer.checkpoint_files import CheckpointFiles
from lightning_ckptless.trainer.cohort import Cohort
from lightning_ckptless.trainer.report import Moved, RunReport
from lightning_ckptless.trainer.restoration import Restoration, sum_over_ranks
from lightning_ckptless.trainer.streams import Streams, obstacle_to_carrying
from lightning_ckptless.trainer.succession import take_over
from lightning_ckptless.trainer.trust import small_state_of


def fetch_version(
    trainer: Any,
    found: Complete,
    cohort: Cohort,
    streams: Streams,
    batch: ElasticBatch,
    report: RunReport,
    files: CheckpointFiles,
) -> Restoration:
    """Bring a version here, and have the checkpoint files as they were at it. All ranks call it together.

    Args:
        trainer: that will take it.
        found: the version.
        cohort: all ranks.
        streams: those that this rank carries.
        batch: what a step of another number of ranks is made of.
        report: is told where it came from.
        files: checkpoint files, which return to the version with the run.

    Raises:
        WorldSizeError: it is of another number of ranks, which these cannot go on for.
    """
    arena, transport = cohort.arena, cohort.transport
    layout = shared_layout(arena, transport, found.snapshot.layout)
    if found.snapshot.world_size == cohort.world_size:
        fetched = fetch(found, arena, transport, cohort.nodes, need=layout.need)
        moved = sum_over_ranks(fetched, cohort)
        restoration = Restoration(found, layout, fetched.bulks, small_state_of(cohort.rank, fetched, cohort))
    else:
        obstacle = obstacle_to_carrying(trainer)
        restoration, moved = take_over(found, layout, cohort, streams.width, batch, obstacle), Moved(0, {})
    # Its dataloaders are set up before its state is put in.
    streams.count = restoration.small["streams"]["count"]
    report.fetched(found, moved, step_in_flight(arena.path, transport))
    if trainer.is_global_zero:
        files.go_back(found.snapshot.version, generation=cohort.generation)
    else:
        files.forget()
    return restoration
