"""Fetching a version from the arenas to the current ranks, also if another number of ranks wrote it.

Apart from `restoration`, because `elastic.world_change` makes restorations too and is used here.
"""

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
    virtual_ranks: VirtualRanks,
    batch: ElasticBatch,
    report: RunReport,
    files: CheckpointFiles,
) -> Restoration:
    """Fetch a version and roll the checkpoint files back to it. All ranks call it together.

    Args:
        trainer: trainer that will adopt the version.
        found: the version.
        members: the member set.
        virtual_ranks: the virtual ranks that this rank runs.
        batch: how a step's batch is composed after a world change.
        report: receives where the state came from.
        files: checkpoint files, which are rolled back along with the run.

    Raises:
        WorldSizeError: another number of ranks wrote the version, and these ranks cannot continue from it.
    """
    arena, transport = members.arena, members.transport
    layout = shared_layout(arena, transport, found.snapshot.layout)
    if found.snapshot.world_size == members.world_size:
        fetched = fetch(found, arena, transport, members.nodes, need=layout.need)
        moved = sum_over_ranks(fetched, members)
        restoration = Restoration(found, layout, fetched.bulks, host_state_of(members.rank, fetched, members))
    else:
        obstacle = obstacle_to_carrying(trainer)
        restoration, moved = take_over(found, layout, members, virtual_ranks.width, batch, obstacle), Moved(0, {})
    # Set before the state is restored: the dataloaders are set up first, and depend on it.
    virtual_ranks.count = restoration.host_state["virtual_ranks"]["count"]
    report.fetched(found, moved, step_in_flight(arena.path, transport))
    if trainer.is_global_zero:
        files.roll_back(found.snapshot.version, generation=members.generation)
    else:
        files.forget()
    return restoration
