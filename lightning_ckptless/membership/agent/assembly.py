"""The parts of a real agent: processes of a fork server, files in a folder, the kernel's reports.

Apart from the agent, because the recovery simulation assembles a different one.
"""

from __future__ import annotations

from pathlib import Path

from lightning_ckptless.membership.agent.agent import AgentParts
from lightning_ckptless.membership.agent.draining import Draining
from lightning_ckptless.membership.agent.fault_log import FaultLog
from lightning_ckptless.membership.agent.hang_watch import HangWatch, LateExits
from lightning_ckptless.membership.agent.held_memory import HeldMemory
from lightning_ckptless.membership.agent.in_place import InPlaceRecovery
from lightning_ckptless.membership.agent.logs import LogFiles
from lightning_ckptless.membership.agent.node_liveness import Heartbeat
from lightning_ckptless.membership.agent.notices import Notices
from lightning_ckptless.membership.agent.partition_guard import PartitionGuard
from lightning_ckptless.membership.agent.recovery import Recovery
from lightning_ckptless.membership.agent.rewind_requests import RewindRequests
from lightning_ckptless.membership.agent.run_requests import RunRequests
from lightning_ckptless.membership.agent.settings import NodeRun, NodeSettings
from lightning_ckptless.membership.agent.starting import WorkerStarter
from lightning_ckptless.membership.agent.straggler_watch import StragglerWatch
from lightning_ckptless.membership.channel.worker_reports import ReportsInFolder
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.events import Report
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.forkserver.sidecar import SidecarLauncher, Sidecars
from lightning_ckptless.membership.rendezvous.node_membership import NodeMembership
from lightning_ckptless.membership.requests import Requests
from lightning_ckptless.protocol.node_liveness import Bound
from lightning_ckptless.system.control_groups import OomKills


def assemble(
    settings: NodeSettings,
    run: NodeRun,
    parent: ForkServer,
    folder: Path,
    logs: LogFiles,
    memory: HeldMemory,
    bound: Bound,
    membership: NodeMembership,
    notices: Notices,
    report: Report,
    clock: Clock,
) -> AgentParts:
    """Return the parts of an agent.

    Args:
        settings: the node's settings.
        run: the run on this node.
        parent: fork server of the workers; stays open.
        folder: the agent's folder, in which workers leave their reports.
        logs: destination of the workers' output.
        memory: memory held for the workers; stays held.
        bound: how much silence between nodes is tolerated.
        membership: this node's membership of the rendezvous.
        notices: notices that this node is about to be taken away.
        report: receives events.
        clock: this node's clock.
    """
    in_place = InPlaceRecovery(
        in_place=settings.in_place,
        standbys=settings.standbys,
        preload_imports=settings.preload_imports,
        folder=folder,
        outputs=settings.replacement_outputs or folder,
        report=report,
        clock=clock,
    )
    starter = WorkerStarter(settings, run, parent, folder, logs, lambda: in_place.learns_imports, report, clock)
    faults = FaultLog(settings.name, run.faults, report, logs.why_full, clock)
    stragglers = StragglerWatch(folder, report, clock)
    draining = Draining(
        settings.name, settings.least_nodes, settings.endpoints, membership, stragglers, in_place, report, clock
    )
    rewinds = RewindRequests()
    reports, oom_kills = ReportsInFolder(folder), OomKills()
    launcher = SidecarLauncher(
        lambda: starter.parent, settings.env, settings.cwd, settings.program.flags, settings.fresh
    )
    return AgentParts(
        folder=folder,
        starter=starter,
        in_place=in_place,
        draining=draining,
        faults=faults,
        recovery=Recovery(settings, run, in_place, draining, faults, reports, oom_kills.news, report, clock),
        guard=PartitionGuard(
            settings.name, Heartbeat(bound, membership.address, clock.monotonic), membership, faults, report, clock
        ),
        hangs=HangWatch(folder, report, clock),
        late_exits=LateExits(folder, settings.exit_grace_s, clock),
        memory=memory,
        notices=notices,
        sidecars=Sidecars(launcher, report),
        rewinds=rewinds,
        requests=RunRequests(Requests(settings.run_folder), draining, rewinds, clock),
    )
