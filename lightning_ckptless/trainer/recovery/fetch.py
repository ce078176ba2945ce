"""A version is brought from the arenas to the ranks that go on with it, be they as many as have written it or not."""

from __future__ import annotations

from typing import Any

from lightning_ckptless.options import ElasticBatch
from lightning_ckptless.protocol.versions import Complete
from lightning_ckptless.replica.restore import fetch, shared_layout
from lightning_ckptless.trainer.commit.begun_step import step_in_flight
from lightning_ckptless.trainer.data.virtual_ranks import VirtualRanks, obstacle_to_carrying
from lightning_ckptless.trainer.elastic.world_change import take_over
from lightning_ckptless.trainer.recovery.restoration import Restoration, sum_over_ranks
from lightning_ckptless.trainer.reporting.checkpoint_files import CheckpointFiles
from lightning_ckptless.trainer.reporting.report import Moved, RunReport
from lightning_ckptless.trainer.session.member_set import MemberSet
from lightning_ckptless.trainer.state.trust import host_state_of


def fetch_version(
    trainer: Any,
    found: Complete,
    members: MemberSet,
    streams: VirtualRanks,
    batch: ElasticBatch,
    report: RunReport,
    files: CheckpointFiles,
) -> Restoration:
    """Bring a version here, and have the checkpoint files as they were at it. All ranks call it together.

    Args:
        trainer: that will take it.
        found: the version.
        members: all ranks.
        streams: those that this rank carries.
        batch: what a step of another number of ranks is made of.
        report: is told where it came from.
        files: checkpoint files, which return to the version with the run.

    Raises:
        WorldSizeError: it is of another number of ranks, which these cannot go on for.
    """
    arena, transport = members.arena, members.transport
    layout = shared_layout(arena, transport, found.snapshot.layout)
    if found.snapshot.world_size == members.world_size:
        fetched = fetch(found, arena, transport, members.nodes, need=layout.need)
        moved = sum_over_ranks(fetched, members)
        restoration = Restoration(found, layout, fetched.bulks, host_state_of(members.rank, fetched, members))
    else:
        obstacle = obstacle_to_carrying(trainer)
        restoration, moved = take_over(found, layout, members, streams.width, batch, obstacle), Moved(0, {})
    # Its dataloaders are set up before its state is put in.
    streams.count = restoration.host_state["streams"]["count"]
    report.fetched(found, moved, step_in_flight(arena.path, transport))
    if trainer.is_global_zero:
        files.go_back(found.snapshot.version, generation=members.generation)
    else:
        files.forget()
    return restoration
