"""The session: this rank's part in one call of `fit`.

A session owns what a rank has over all generations, and the member set of the current one:

| Known | Attributes |
|---|---|
| from the start | trainer, options, identity, ledger, report, loggers, checkpoint files, folders, durable states |
| once it has its arena: `open` or `open_alone` | `arena` |
| once the ranks are connected: `begin_generation`, again in each recovery | `members`, `outgoing` |

`generation` is derived from the member set. No other object of the trainer stores it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_ckptless.configuration.variables import with_variables
from lightning_ckptless.ledger import LEDGER_NAME, Ledger
from lightning_ckptless.membership.channel.agent_channel import AgentChannel
from lightning_ckptless.membership.worker.process_groups import World
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.device_tier import place_on_devices
from lightning_ckptless.protocol.messages import StartSidecar
from lightning_ckptless.protocol.placement import Placement
from lightning_ckptless.protocol.run_counts import RunCounts
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_notes import ArenaNotes, RankFolders
from lightning_ckptless.replica.device_tier.device_tier import DeviceTier
from lightning_ckptless.replica.node_transport import share_memory
from lightning_ckptless.replica.transport import GlooTransport, SoloTransport, Transport, gather_json
from lightning_ckptless.system.reaper import MARKER
from lightning_ckptless.trainer.commit.durable import DurableRung
from lightning_ckptless.trainer.outputs.checkpoint_files import CheckpointFiles
from lightning_ckptless.trainer.outputs.loggers import Positions, RunLoggers
from lightning_ckptless.trainer.outputs.lost_files import lost_logs, warning_of
from lightning_ckptless.trainer.reporting.rank_ledger import RankLedger
from lightning_ckptless.trainer.reporting.report import RunReport
from lightning_ckptless.trainer.session.arenas import (
    discard_if_empty,
    find_or_make_arena,
    has_versions,
    is_first_of_node,
    local_rank,
    open_arena,
    register_with_reaper,
    use_agent_memory,
)
from lightning_ckptless.trainer.session.failure_domains import keeps_within_a_node
from lightning_ckptless.trainer.session.health_watch import MODULE, HealthWatchSettings
from lightning_ckptless.trainer.session.identity import Identity, identify
from lightning_ckptless.trainer.session.member_set import GenerationFile, MemberSet, form_member_set
from lightning_ckptless.trainer.session.run_folders import RunFolders
from lightning_ckptless.trainer.state.trust import OutgoingCheck

COMMIT_TIMEOUT_S = 1800.0


class Session:
    """This rank's part in one call of `fit`.

    Args:
        strategy: strategy of the trainer; owns the process groups.
        trainer: trainer in `fit`, before anything of it is set up.
        fit_index: number of earlier calls of `fit` in this process.
        channel: channel to one of our agents; None under an external agent.

    Attributes:
        world: the process groups.
        probes: called with the moment and the version of each step of mirroring and recovery.
    """

    def __init__(self, strategy: Any, trainer: Any, fit_index: int, channel: AgentChannel | None = None) -> None:
        self.trainer = trainer
        self.fit_index = fit_index
        self.options: CkptlessOptions = with_variables(strategy.options)
        self.world: World = strategy.world
        self.probes: list[Callable[[str, Version], None]] = strategy.probes
        self.identity: Identity = identify(trainer)
        self.durable = DurableRung(self.identity, fit_index, self.options)
        self.loggers = RunLoggers(trainer, self.run_folder, fit_index)
        self.folders = RunFolders(trainer)
        self.ledger = Ledger(self.run_folder / LEDGER_NAME)
        own_events = RankLedger(self.ledger, lambda: self.rank, lambda: self.generation)
        self.report = RunReport(trainer, own_events, self.identity, fit_index)
        self.files = CheckpointFiles(own_events, fit_index, self.report.report_files)
        self._mesh_sizes: Callable[[], tuple[int, int] | None] = strategy.mesh_sizes
        self._channel = channel
        has_peers = trainer.world_size > 1 and channel is not None
        self._device_tier = DeviceTier() if self.options.device_tier == "on" and has_peers else None
        self._arena: Arena | None = None
        self._members: MemberSet | None = None
        self._outgoing: OutgoingCheck | None = None

    # ------------------------------------------------------------------ known from the start

    @property
    def run_folder(self) -> Path:
        """Folder of the run."""
        return self.identity.run_folder

    @property
    def rank(self) -> int:
        """This rank; a recovery may change it."""
        return int(self.trainer.global_rank)

    @property
    def is_first_of_node(self) -> bool:
        """Whether this is the first worker of its node, which acts for it. Known before there is a member set."""
        return is_first_of_node(local_rank())

    def connect(self) -> tuple[Transport, tuple[str, ...]]:
        """Connect the ranks of the generation. All ranks call it together.

        Returns:
            The transport, and the node names of all ranks.
        """
        node, world = self.identity.node, self.world
        if self.trainer.world_size == 1:
            return SoloTransport(), (node,)
        messages = GlooTransport(world.host_group(COMMIT_TIMEOUT_S, may_be_of_training=self._sends_little))
        nodes = (node,) * messages.world_size if world.is_on_one_node else tuple(gather_json(messages, node))
        transport = share_memory(
            messages,
            nodes,
            self.arena.path,
            spread_name=lambda name: world.share(f"memory/{node}", name),
            timeout_s=COMMIT_TIMEOUT_S,
            when_open=world.abort_with_groups,
        )
        return transport, nodes

    @property
    def _sends_little(self) -> bool:
        """Whether messages between ranks are few, because none keeps replicas for another."""
        if not self.world.is_on_one_node or self._device_tier is not None:
            return False
        return not keeps_within_a_node(self.options, self.trainer.world_size, self._mesh_sizes())

    @property
    def device_tier(self) -> DeviceTier | None:
        """The device tier of this rank; None if there is none, or if no rank could be replaced in place."""
        return self._device_tier

    @property
    def device_placement(self) -> Placement:
        """Which rank holds which replicas in device memory."""
        return place_on_devices(self.members.placement, self.options.copies)

    def probe(self, moment: str, version: Version) -> None:
        """Notify the probes of a moment."""
        for probe in list(self.probes):
            probe(moment, version)

    # ------------------------------------------------------------------ the arena

    @property
    def arena(self) -> Arena:
        """The arena of this rank's node."""
        assert self._arena is not None, "the session has no arena yet"
        return self._arena

    @property
    def arena_if_open(self) -> Arena | None:
        """The arena of this rank's node; None if `fit` has failed before it was opened."""
        return self._arena

    def open(self, origin: str | None) -> None:
        """Open the arena together with the other ranks of this node.

        Args:
            origin: checkpoint path that the script passed to `fit`.
        """
        opens = self.is_first_of_node
        share = self.world.share if self.trainer.world_size > 1 else lambda _, text: text
        self._arena = open_arena(self.identity, self.fit_index, self.options, share, opens=opens, origin=origin)
        use_agent_memory(self._arena, self._channel)
        if opens and not self.identity.own_agent:
            register_with_reaper(self._arena, self.identity)

    def has_versions_of_next_fit(self) -> bool:
        """Whether this node has versions of the next call of `fit`, which earlier processes have made."""
        return has_versions(self.identity, self.fit_index + 1, self.options)

    def open_alone(self) -> None:
        """Open the arena in a process that has not joined the other ranks."""
        self._arena = find_or_make_arena(self.identity, self.fit_index, self.options)
        use_agent_memory(self._arena, self._channel)

    def request_writer(self) -> None:
        """Request a writer of durable states for this node, if it writes any."""
        if self.is_first_of_node:
            self.durable.request_writer(self.arena, self._channel)

    def request_health_watch(self) -> None:
        """Request a sidecar that checks the health of this node, if the options ask for it."""
        every_s = self.options.health_check_every_s
        if every_s is not None and self.is_first_of_node and self._channel is not None:
            self._channel.send(
                StartSidecar(MODULE, HealthWatchSettings.of(self.options.health_check, every_s).to_text())
            )

    # ------------------------------------------------------------------ the generation

    @property
    def generation(self) -> int:
        """Number of the generation that this rank joined last."""
        return self._members.generation if self._members is not None else self.world.generation

    @property
    def is_member(self) -> bool:
        """Whether this rank is in a member set; a replacement is not until it joins the others in the fit loop."""
        return self._members is not None

    @property
    def members(self) -> MemberSet:
        """The ranks of the current generation."""
        assert self._members is not None, "this rank is in no member set yet"
        return self._members

    @property
    def outgoing(self) -> OutgoingCheck:
        """Checks what leaves this node's memory in the current generation."""
        assert self._outgoing is not None, "this rank is in no member set yet"
        return self._outgoing

    def begin_generation(self, transport: Transport, nodes: tuple[str, ...], *, after: int = 0) -> MemberSet:
        """Form the member set of a generation. All ranks call it together.

        Args:
            transport: connects all ranks; that of the generation before is closed, unless it is the same.
            nodes: node name of each rank.
            after: generation that wrote the newest state stored outside the arenas.

        Raises:
            OptionsError: replicas cannot be placed, or the failure domain of a node is unknown.
        """
        members = form_member_set(
            transport,
            self.arena,
            nodes,
            self.options,
            self.world.generation,
            count=GenerationFile(self.run_folder / f"generation-of-fit-{self.fit_index}"),
            after=after,
            mesh=self._mesh_sizes(),
        )
        if self._members is not None and self._members.transport is not transport:
            self._members.transport.close()
        self._members, self._outgoing = members, OutgoingCheck(self.options, members)
        return members

    def note_folders(self) -> None:
        """Record the folders of all ranks once the first processes of this fit have determined theirs."""
        if self.is_member and self.members.noted.folders is None:
            folders = tuple(map(RankFolders.from_value, self.members.gather(asdict(self.folders.own()))))
            if self.is_first_of_node:
                self.arena.write_notes(ArenaNotes(folders=folders))

    def warn_of_lost_files(self, version: Version, logs: Positions | None) -> None:
        """Warn of files that changed since a version; called before log files are truncated to it.

        Args:
            version: the version.
            logs: positions of the log files at the version; None for a rank that has logged nothing.
        """
        if lost := [*lost_logs(self.trainer, logs), *self.files.lost]:
            self.report.report_files(warning_of(lost, version))

    # ------------------------------------------------------------------ the end

    def leave_loop(self) -> None:
        """Close the accounts of training: no further step follows. A relaunch starts from the last version."""
        self.report.out_of_steps()
        if self.is_first_of_node and self.report.counts != RunCounts():
            self.arena.write_notes(ArenaNotes(counts=self.report.counts))

    def finish(self) -> None:
        """Report that `fit` has returned, also to later processes."""
        if self.is_first_of_node and self._arena is not None:
            self._arena.write_notes(ArenaNotes(finished=True))
            (self._arena.path / MARKER).touch()
        self.report.finished()

    def discard_empty_arena(self) -> None:
        """Remove the arena after a start that failed before anything was mirrored: there is nothing to resume from."""
        if self._arena is not None and self.is_first_of_node:
            discard_if_empty(self._arena)

    def close(self) -> None:
        """Release connections and mappings; the arena stays for a relaunch and is removed by the agent."""
        self.files.close()
        if self._members is not None:
            self._members.transport.close()
        if self._arena is not None:
            self._arena.close()
        if self._device_tier is not None:
            self._device_tier.drop()
