"""Collects the status of a run from its ledger and from the slot headers in its arenas."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ckptless.cli.plan import plan_of, protection_in
from lightning_ckptless.cli.run_time import RankTime, run_time
from lightning_ckptless.cli.runs import Run
from lightning_ckptless.errors import ArenaError
from lightning_ckptless.protocol.draining import DrainAction
from lightning_ckptless.protocol.placement_table import PlacementTable
from lightning_ckptless.protocol.time_account import Bucket
from lightning_ckptless.protocol.versions import READABLE, Complete, Replica, SlotState, newest_complete
from lightning_ckptless.replica.arena import Arena, ArenaInfo, default_arena_dir, find_arenas
from lightning_ckptless.system.memory_files import stat_file


@dataclass(frozen=True, slots=True)
class ArenaLine:
    """One arena.

    Args:
        path: folder of the arena.
        node: node that owns it.
        alive: whether the agent that owns it is alive.
        bytes: memory in use.
        torn_headers: slots that are being written, or whose writer died.
    """

    path: str
    node: str
    alive: bool
    bytes: int
    torn_headers: int


@dataclass(frozen=True, slots=True)
class SlotLine:
    """One slot.

    Args:
        shard: index of the shard.
        holder: rank that holds this replica.
        node: node whose arena holds it.
        slot: 0 or 1.
        version: of the state.
        generation: generation that wrote it.
        state: empty, writing, staged or committed.
        bytes: size of tensor state and host state.
    """

    shard: int
    holder: int
    node: str
    slot: int
    version: str
    generation: int
    state: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Survey:
    """A run at one moment.

    Args:
        run_id: id of the run.
        folder: folder of its ledger.
        state: `starting` (no worker has reported yet), `running`, `ended`, or `stopped` (its agent has exited before
            the run ended).
        generation: number of the generation; None before the first.
        world_size: number of ranks.
        placement: where replicas are held, in a sentence.
        plan: the placement as tables; None without copies.
        protection: how many shards have all planned copies, in a sentence; empty if unknown.
        committed: newest committed version.
        restorable: what a relaunch would restore, in a sentence.
        commit_lag_steps: optimizer steps from the newest committed version to the newest one being mirrored.
        commit_age_s: seconds since the last write to a slot.
        arenas: arenas on this host.
        slots: slots in these arenas.
        members: rank and process id of each rank's newest worker.
        standbys: number of standbys that are ready, as text; empty if none are requested.
        draining: the ranks and nodes that are being drained, and how, in sentences.
        durable: newest durable state, as text; empty without one.
        recoveries: details of the last recoveries.
        recovery_count: number of all recoveries.
        goodput: productive time / wall time of the run so far; None before its first report.
        goodput_1h: the same in the last hour.
        wall_s: seconds from the beginning of the run to its last event.
        time_s: seconds by bucket, which sum to `wall_s`.
        steps_replayed: optimizer steps that faults have undone.
        failures: failures so far.
        mtbf_s: mean time between failures in seconds; None without a failure.
        mtbf_low_s: lower end of its 95 % confidence interval.
        mtbf_high_s: upper end; None without a failure.
        ranks: what each rank has kept the others waiting for: its data, and its own work; longest first.
    """

    run_id: str
    folder: str
    state: str
    generation: int | None
    world_size: int | None
    placement: str
    plan: PlacementTable | None
    protection: str
    committed: str | None
    restorable: str
    commit_lag_steps: int | None
    commit_age_s: float | None
    arenas: tuple[ArenaLine, ...]
    slots: tuple[SlotLine, ...]
    members: tuple[tuple[int, int], ...]
    standbys: str
    draining: tuple[str, ...]
    durable: str
    recoveries: tuple[dict[str, Any], ...]
    recovery_count: int
    goodput: float | None
    goodput_1h: float | None
    wall_s: float
    time_s: dict[str, float]
    steps_replayed: int
    failures: int
    mtbf_s: float | None
    mtbf_low_s: float
    mtbf_high_s: float | None
    ranks: tuple[RankTime, ...]


def survey(run: Run, arena_dir: Path | None, *, now: float, last: int = 5) -> Survey:
    """Collect the status of a run.

    Args:
        run: the run and its ledger.
        arena_dir: folder of the arenas; None for the one in the ledger.
        now: seconds since the epoch.
        last: number of recoveries to include.
    """
    infos = arenas_of(run, arena_dir)
    arenas, replicas = _read(infos)
    started, ended, recoveries = run.of("run_started"), run.of("run_ended"), run.of("recovery")
    newest = newest_complete(replicas)
    facts = started[-1].fields if started else {}
    return Survey(
        run_id=run.run_id,
        folder=str(run.folder),
        state=_state(alive=any(info.owner_alive for info in infos), started=bool(started), ended=bool(ended)),
        generation=max((e.generation or 0 for e in (*started, *recoveries)), default=None),
        members=_members(run),
        standbys=_standbys(run),
        draining=_draining(run),
        durable=_durable(run),
        world_size=facts.get("world_size"),
        placement=facts.get("placement", ""),
        plan=plan_of(run),
        protection=protection_in(run, replicas, {info.node for info in infos}) if infos else "",
        committed=_committed(replicas),
        restorable=newest.reason,
        commit_lag_steps=_lag(replicas, newest),
        commit_age_s=_age(infos, now),
        arenas=arenas,
        slots=tuple(_line(replica) for replica in sorted(replicas, key=_order)),
        recoveries=tuple(dict(event.fields) | {"at": event.at} for event in recoveries[-last:]),
        recovery_count=len(recoveries),
        **_time(run),
    )


def _time(run: Run) -> dict[str, Any]:
    if not run.events:
        nothing = dict.fromkeys(("goodput", "goodput_1h", "mtbf_s", "mtbf_high_s"))
        return {
            **nothing,
            "wall_s": 0.0,
            "time_s": {},
            "steps_replayed": 0,
            "failures": 0,
            "mtbf_low_s": 0.0,
            "ranks": (),
        }
    found = run_time(run.events)
    account, mtbf = found.account, found.mtbf
    return {
        "goodput": account.goodput if found.is_known else None,
        "goodput_1h": found.recent_goodput if found.is_known else None,
        "wall_s": account.wall_s,
        "time_s": {str(bucket): account.seconds.get(bucket, 0.0) for bucket in Bucket},
        "steps_replayed": found.steps_replayed,
        "failures": mtbf.failures,
        "mtbf_s": mtbf.mean_s if mtbf.failures else None,
        "mtbf_low_s": mtbf.low_s,
        "mtbf_high_s": mtbf.high_s if mtbf.failures else None,
        "ranks": found.ranks,
    }


def _members(run: Run) -> tuple[tuple[int, int], ...]:
    """Return the process id of each rank's newest worker."""
    pids: dict[int, int] = {}
    for event in run.events:
        if event.event == "workers_spawned":
            pids.update({int(rank): pid for rank, pid in event.fields["pids"].items()})
        elif event.event == "in_place":
            pids.update({int(rank): pid for rank, (pid, _) in event.fields["new"].items()})
    return tuple(sorted(pids.items()))


def _standbys(run: Run) -> str:
    """Describe how many standbys are ready; empty if none are requested."""
    events = run.of("standbys")
    return f"{events[-1].fields['ready']} of {events[-1].fields['wanted']} ready" if events else ""


def _draining(run: Run) -> tuple[str, ...]:
    """Return what is being drained, in the words of the agents."""
    pending: dict[tuple[str, Any], str] = {}
    for event in run.events:
        fields = event.fields
        match event.event:
            case "drain" | "node_leaves" if fields["action"] != DrainAction.REFUSE:
                pending[fields["node"], fields.get("drained_rank")] = fields["reason"]
            case "drained" | "drain_given_up" | "node_drained":
                pending.pop((fields["node"], fields.get("drained_rank")), None)
            case "run_ended":
                pending.clear()
    return tuple(pending.values())


def _durable(run: Run) -> str:
    """Describe the newest durable state, its folder, and a later failure to write one."""
    written, failed = run.of("durable_written"), run.of("durable_failed")
    newest = f"step {written[-1].fields['step']}, in {Path(written[-1].fields['path']).parent}" if written else ""
    if failed and (not written or failed[-1].at > written[-1].at):
        failure = f"writing step {failed[-1].fields['step']} failed"
        return f"{newest}; {failure}" if newest else failure
    return newest


def _state(*, alive: bool, started: bool, ended: bool) -> str:
    if alive:
        return "running"
    if ended:
        return "ended"
    return "stopped" if started else "starting"


def arenas_of(run: Run, arena_dir: Path | None) -> list[ArenaInfo]:
    """Return the arenas of a run on this host; every `fit` of a script has its own arena."""
    folder = arena_dir or run.arena_dir or default_arena_dir()
    return [i for i in find_arenas(folder) if i.run_id == run.run_id or i.run_id.startswith(f"{run.run_id}.")]


def _read(infos: list[ArenaInfo]) -> tuple[tuple[ArenaLine, ...], list[Replica]]:
    lines, replicas = [], list[Replica]()
    for info in infos:
        torn = 0
        try:
            arena = Arena.attach(info.path)
            replicas += arena.inventory()
            torn = arena.torn_headers
        except (ArenaError, FileNotFoundError):
            # Removed in the meantime: the run has just ended.
            continue
        lines.append(ArenaLine(str(info.path), info.node, info.owner_alive, info.bytes, torn))
    return tuple(lines), replicas


def _committed(replicas: list[Replica]) -> str | None:
    versions = [replica.version for replica in replicas if replica.state is SlotState.COMMITTED]
    return str(max(versions)) if versions else None


def _lag(replicas: list[Replica], newest: object) -> int | None:
    if not isinstance(newest, Complete):
        return None
    started = [r.version.optimizer_step for r in replicas if r.state in {*READABLE, SlotState.WRITING}]
    committed = [r.version.optimizer_step for r in replicas if r.state is SlotState.COMMITTED]
    return max(started) - max(committed) if committed else None


def _age(infos: list[ArenaInfo], now: float) -> float | None:
    times = []
    for info in infos:
        try:
            times += [stat_file(path).st_mtime for path in info.path.glob("shard-*")]
        except FileNotFoundError:
            continue
    return max(0.0, now - max(times)) if times else None


def _order(replica: Replica) -> tuple[int, int, str, int]:
    return replica.shard, replica.holder, replica.node, replica.slot


def _line(replica: Replica) -> SlotLine:
    return SlotLine(
        shard=replica.shard,
        holder=replica.holder,
        node=replica.node,
        slot=replica.slot,
        version=str(replica.version),
        generation=replica.generation,
        state=str(replica.state),
        bytes=replica.bulk_bytes + replica.blob_bytes,
    )
