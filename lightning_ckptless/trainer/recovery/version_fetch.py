"""Fetching a version from the arenas to the current ranks, also if another number of ranks wrote it.

Apart from `restoration`, because `elastic.world_change` makes restorations too and is used here.
"""

from __future__ import annotations

from lightning_ckptless.protocol.device_tier import kept_on_devices, needed_with
from lightning_ckptless.protocol.versions import Complete
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.restore import Fetched, fetch, shared_layout
from lightning_ckptless.trainer.commit.step_stamps import step_in_flight
from lightning_ckptless.trainer.data.virtual_ranks import VirtualRanks, obstacle_to_carrying
from lightning_ckptless.trainer.elastic.world_change import take_over
from lightning_ckptless.trainer.recovery.restoration import Restoration, sum_over_ranks
from lightning_ckptless.trainer.recovery.retries import count_recovery
from lightning_ckptless.trainer.reporting.report import Moved
from lightning_ckptless.trainer.session.session import Session
from lightning_ckptless.trainer.state.trust import host_state_of


def fetch_version(
    session: Session,
    virtual_ranks: VirtualRanks,
    found: Complete,
    host: Complete | None,
    *,
    goes_back: bool = False,
    abandons_files: bool = False,
) -> Restoration:
    """Fetch a version and roll the checkpoint files back to it. All ranks call it together.

    Warns of log and checkpoint files that were lost since, so it has to be called before log files are truncated.

    Args:
        session: session of this rank.
        virtual_ranks: the virtual ranks that this rank runs; their number becomes that of the version.
        found: the version.
        host: the newest version in the arenas, the same unless `found` comes from the device tier.
        goes_back: whether all ranks rewind to it, rather than recover.
        abandons_files: whether checkpoint files written since stay.

    Raises:
        LaunchError: under an external agent: the limit on recoveries has been reached.
        WorldSizeError: another number of ranks wrote the version, and these ranks cannot continue from it.
    """
    members, version = session.members, found.snapshot.version
    if not session.identity.own_agent and not goes_back:
        count_recovery(members, version, session.options)
    arena, transport = members.arena, members.transport
    layout = shared_layout(arena, transport, found.snapshot.layout)
    if found.snapshot.world_size == members.world_size:
        fetched = _fetch_to_same_ranks(session, found, layout)
        moved = sum_over_ranks(fetched, members)
        restoration = Restoration(found, layout, fetched.bulks, host_state_of(members.rank, fetched, members), host)
    else:
        if session.device_tier is not None:
            session.device_tier.drop()
        obstacle, batch = obstacle_to_carrying(session.trainer), session.options.elastic_batch
        restoration, moved = take_over(found, layout, members, virtual_ranks.width, batch, obstacle), Moved(0, {})
    # Set before the state is restored: the dataloaders are set up first, and depend on it.
    virtual_ranks.count = restoration.host_state["virtual_ranks"]["count"]
    session.report.fetched(found, host, moved, step_in_flight(arena.path, transport))
    if session.trainer.is_global_zero and abandons_files:
        session.files.abandon(version)
    elif session.trainer.is_global_zero:
        session.files.roll_back(version)
    else:
        session.files.forget()
    session.warn_of_lost_files(version, None if restoration.logs is None else restoration.logs["files"])
    return restoration


def _fetch_to_same_ranks(session: Session, found: Complete, layout: Layout) -> Fetched:
    """Fetch a version that as many ranks wrote. Those of the device tier keep it there from now on."""
    members, device = session.members, session.device_tier
    arena, transport, nodes = members.arena, members.transport, members.nodes
    if device is None:
        return fetch(found, arena, transport, nodes, need=layout.need)
    kept = kept_on_devices(session.device_placement)
    device.settle(found.snapshot)
    need = needed_with(layout.need, kept)
    fetched = fetch(found, arena, transport, nodes, need=need, blobs=kept, device=device)
    bulks = {shard: fetched.bulks[shard] for shard in kept[members.rank]}
    device.hold(found.snapshot, members.rank, bulks, fetched.blobs)
    return fetched
