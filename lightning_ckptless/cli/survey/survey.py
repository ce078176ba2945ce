"""The status of a run: everything that `ckptless status` and `ckptless watch` show, as a pure function of a reading.

Its fields are the JSON that both commands print.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_ckptless.cli.survey.alarms import Alarm, Fault, alarms_of, faults_of
from lightning_ckptless.cli.survey.history import History
from lightning_ckptless.cli.survey.members import Member, members_of
from lightning_ckptless.cli.survey.protection import Protected, protected_now, protection_in
from lightning_ckptless.cli.survey.reading import ArenaReading, Reading
from lightning_ckptless.cli.time_spent import RankTime, RunTime
from lightning_ckptless.protocol.placement_table import PlacementTable
from lightning_ckptless.protocol.time_account import Bucket
from lightning_ckptless.protocol.versions import READABLE, Complete, Replica, SlotState, newest_complete

FORMAT = 1
STATES = ("starting", "running", "silent", "ended", "stopped")
SILENT_S = 60.0
"""Without an event in the ledger, after which a run on other hosts counts as silent."""


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
        slot: index of the slot in its ring.
        version: version of the state.
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
class Tier:
    """A tier, and how far it lags behind training.

    Args:
        name: `memory` (the arenas) or `storage` (durable states).
        step: optimizer step of its newest version; None without one.
        lag_steps: optimizer steps from there to the newest finished step; None if either is unknown.
        age_s: seconds since this version was written; None without one.
        place: where it is.
    """

    name: str
    step: int | None
    lag_steps: int | None
    age_s: float | None
    place: str


@dataclass(frozen=True, slots=True)
class Pace:
    """How far training has come.

    Args:
        step: newest committed optimizer step; None before the first.
        of: number of steps in all; None if it is unknown.
        steps_per_s: committed steps per second over the last minutes, recoveries included; None before two are known.
        eta_s: seconds until the last step at this pace; None if it is unknown.
    """

    step: int | None
    of: int | None
    steps_per_s: float | None
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Standbys:
    """Processes that wait for a rank, on the node that reported last.

    Args:
        ready: number of those that have reached `fit`.
        wanted: number of those that are wanted.
    """

    ready: int
    wanted: int

    def __str__(self) -> str:
        return f"{self.ready} of {self.wanted} ready"


@dataclass(frozen=True, slots=True)
class Survey:
    """A run at one moment.

    Args:
        format: number of this schema.
        at: when it was read, in seconds since the epoch.
        run_id: id of the run.
        folder: folder of its ledger.
        state: `starting` (no worker has reported yet), `running`, `silent` (its agents are on other hosts, and the
            ledger has recorded nothing for a minute), `ended`, or `stopped` (its agent has exited before the run
            ended).
        generation: number of the generation; None before the first.
        world_size: number of ranks.
        protected: which losses the run survives now.
        alarms: what is wrong now, the most urgent first.
        members: the ranks, in order.
        pace: how far training has come.
        tiers: the tiers, and how far each lags behind.
        standbys: the standbys; None if none are requested, or the run is over.
        draining: the ranks and nodes that are being drained, and how, in sentences.
        placement: where replicas are held, in a sentence.
        plan: the placement as tables; None without copies.
        protection: how many shards have all planned copies, in a sentence; empty if unknown.
        committed: newest committed version.
        restorable: what a relaunch would restore, in a sentence.
        commit_lag_steps: optimizer steps from the newest committed version to the newest one being mirrored.
        commit_age_s: seconds since the last write to a slot.
        arenas: arenas on this host.
        slots: slots in these arenas.
        durable: newest durable state, as text; empty without one.
        faults: the last faults, the newest last.
        recoveries: details of the last recoveries, the newest last.
        recovery_count: number of all recoveries.
        wall_s: seconds from the beginning of the run to the last event that accounts for time.
        time_s: seconds by bucket, which sum to `wall_s`.
        goodput: productive time / wall time of the run so far; None before its first report.
        goodput_1h: the same in the last hour.
        steps_replayed: optimizer steps that faults have undone.
        failures: failures so far.
        mtbf_s: mean time between failures in seconds; None without a failure.
        mtbf_low_s: lower end of its 95 % confidence interval.
        mtbf_high_s: upper end; None without a failure.
        ranks: what each rank has kept the others waiting for: its data, and its own work; longest first.
    """

    format: int
    at: float
    run_id: str
    folder: str
    state: str
    generation: int | None
    world_size: int | None
    protected: Protected
    alarms: tuple[Alarm, ...]
    members: tuple[Member, ...]
    pace: Pace
    tiers: tuple[Tier, ...]
    standbys: Standbys | None
    draining: tuple[str, ...]
    placement: str
    plan: PlacementTable | None
    protection: str
    committed: str | None
    restorable: str
    commit_lag_steps: int | None
    commit_age_s: float | None
    arenas: tuple[ArenaLine, ...]
    slots: tuple[SlotLine, ...]
    durable: str
    faults: tuple[Fault, ...]
    recoveries: tuple[dict[str, Any], ...]
    recovery_count: int
    wall_s: float
    time_s: Mapping[str, float]
    goodput: float | None
    goodput_1h: float | None
    steps_replayed: int
    failures: int
    mtbf_s: float | None
    mtbf_low_s: float
    mtbf_high_s: float | None
    ranks: tuple[RankTime, ...]


def as_json(found: Survey) -> str:
    """Return a survey as JSON, with its fields as keys."""
    return json.dumps(asdict(found), indent=1, default=str)


def survey_of(reading: Reading, *, last: int = 5) -> Survey:
    """Return the status of a run.

    Args:
        reading: what was read of it.
        last: number of faults and recoveries to include.
    """
    history, replicas = reading.history, reading.replicas
    state, members, newest = _state(reading), members_of(reading), newest_complete(replicas)
    protected, faults, pace = protected_now(reading), faults_of(history, last), _pace(reading)
    facts = history.newest["run_started"].fields if "run_started" in history.newest else {}
    nodes_here = {arena.info.node for arena in reading.current_arenas}
    return Survey(
        format=FORMAT,
        at=reading.at,
        run_id=reading.run_id,
        folder=str(reading.folder),
        state=state,
        generation=history.generation,
        world_size=facts.get("world_size"),
        protected=protected,
        alarms=alarms_of(reading, members, faults, protected, state),
        members=members,
        pace=pace,
        tiers=_tiers(reading, members, pace),
        standbys=_standbys(history) if state in {"starting", "running"} else None,
        draining=tuple(history.draining.values()),
        placement=facts.get("placement") or "",
        plan=history.plan,
        protection=protection_in(history, replicas, nodes_here) if nodes_here else "",
        committed=_committed(replicas),
        restorable=newest.reason,
        commit_lag_steps=_lag(replicas, newest),
        commit_age_s=max(0.0, reading.at - max(replicas.values())) if replicas else None,
        arenas=tuple(_arena_line(arena) for arena in reading.arenas),
        slots=tuple(_slot_line(replica) for replica in sorted(replicas, key=_order)),
        durable=_durable(history),
        faults=faults,
        recoveries=tuple(dict(event.fields) | {"at": event.at} for event in list(history.recoveries)[-last:]),
        recovery_count=history.counts["recovery"],
        **_time(history.time),
    )


def _time(found: RunTime | None) -> dict[str, Any]:
    """Return the fields of a survey that say where the time went."""
    fields: dict[str, Any] = {"wall_s": 0.0, "time_s": {}, "goodput": None, "goodput_1h": None, "steps_replayed": 0}
    fields |= {"failures": 0, "mtbf_s": None, "mtbf_low_s": 0.0, "mtbf_high_s": None, "ranks": ()}
    if found is None:
        return fields
    account, mtbf = found.account, found.mtbf
    fields |= {
        "wall_s": account.wall_s,
        "time_s": {str(bucket): account.seconds.get(bucket, 0.0) for bucket in Bucket},
        "steps_replayed": found.steps_replayed,
        "failures": mtbf.failures,
        "mtbf_low_s": mtbf.low_s,
        "ranks": found.ranks,
    }
    if found.is_known:
        fields |= {"goodput": account.goodput, "goodput_1h": found.recent_goodput}
    if mtbf.failures:
        fields |= {"mtbf_s": mtbf.mean_s, "mtbf_high_s": mtbf.high_s}
    return fields


def _state(reading: Reading) -> str:
    history = reading.history
    alive = any(arena.info.owner_alive for arena in reading.arenas)
    if alive or any(node.agent_alive for node in reading.nodes.values()):
        return "running" if alive or "run_started" in history.newest else "starting"
    if history.is_newest("run_ended", "run_started"):
        return "ended"
    if history.nodes and not (reading.nodes or reading.arenas) and history.last_at is not None:
        return "running" if reading.at - history.last_at < SILENT_S else "silent"
    return "stopped" if history.newest else "starting"


def _standbys(history: History) -> Standbys | None:
    event = history.newest.get("standbys")
    return Standbys(event.fields["ready"], event.fields["wanted"]) if event is not None else None


def _durable(history: History) -> str:
    """Describe the newest durable state, its folder, and a later failure to write one."""
    written = history.newest.get("durable_written")
    newest = f"step {written.fields['step']}, in {Path(written.fields['path']).parent}" if written is not None else ""
    if history.is_newest("durable_failed", "durable_written"):
        failure = f"writing step {history.newest['durable_failed'].fields['step']} failed"
        return f"{newest}; {failure}" if newest else failure
    return newest


# ---------------------------------------------------------------------- how far training has come


def _pace(reading: Reading) -> Pace:
    committed = reading.history.newest.get("committed")
    known = [replica.version.optimizer_step for replica in reading.replicas if replica.state is SlotState.COMMITTED]
    if committed is not None:
        known.append(committed.fields["step"])
    step, of = max(known, default=None), None if committed is None else committed.fields.get("of")
    rate = _steps_per_s(reading.history.steps)
    eta_s = max(0, of - step) / rate if of is not None and step is not None and rate else None
    return Pace(step, of, rate, eta_s)


def _steps_per_s(steps: Sequence[tuple[float, int]]) -> float | None:
    if len(steps) < 2:
        return None
    (began_at, first), (ended_at, last) = steps[0], steps[-1]
    return (last - first) / (ended_at - began_at) if ended_at > began_at and last >= first else None


def _tiers(reading: Reading, members: Sequence[Member], pace: Pace) -> tuple[Tier, ...]:
    """Return the tiers; a step that a rank has begun follows the newest finished one."""
    history, begun = reading.history, [member.step - 1 for member in members if member.step is not None]
    finished = max([*begun, *([] if pace.step is None else [pace.step])], default=None)

    def tier(name: str, step: int | None, age_s: float | None, place: str) -> Tier:
        lag = None if step is None or finished is None else max(0, finished - step)
        return Tier(name, step, lag, age_s, place)

    committed = {r: at for r, at in reading.replicas.items() if r.state is SlotState.COMMITTED}
    tiers = []
    if committed:
        version = max(replica.version for replica in committed)
        at = max(at for replica, at in committed.items() if replica.version == version)
        folder = str(reading.arenas[0].info.path.parent)
        tiers.append(tier("memory", version.optimizer_step, max(0.0, reading.at - at), folder))
    elif "committed" in history.newest:
        event = history.newest["committed"]
        tiers.append(tier("memory", event.fields["step"], max(0.0, reading.at - event.at), "on other hosts"))
    if "durable_written" in history.newest:
        event = history.newest["durable_written"]
        place = str(Path(event.fields["path"]).parent)
        tiers.append(tier("storage", event.fields["step"], max(0.0, reading.at - event.at), place))
    return tuple(tiers)


# ---------------------------------------------------------------------- arenas


def _committed(replicas: Mapping[Replica, float]) -> str | None:
    versions = [replica.version for replica in replicas if replica.state is SlotState.COMMITTED]
    return str(max(versions)) if versions else None


def _lag(replicas: Mapping[Replica, float], newest: object) -> int | None:
    if not isinstance(newest, Complete):
        return None
    started = [r.version.optimizer_step for r in replicas if r.state in {*READABLE, SlotState.WRITING}]
    committed = [r.version.optimizer_step for r in replicas if r.state is SlotState.COMMITTED]
    return max(started) - max(committed) if committed else None


def _arena_line(arena: ArenaReading) -> ArenaLine:
    info = arena.info
    return ArenaLine(str(info.path), info.node, info.owner_alive, info.bytes, arena.torn_headers)


def _order(replica: Replica) -> tuple[int, int, str, int]:
    return replica.shard, replica.holder, replica.node, replica.slot


def _slot_line(replica: Replica) -> SlotLine:
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
