"""What protects a run now: its placement as the ledger has it, and the copies that its arenas contain."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lightning_ckptless.cli.survey.history import History
from lightning_ckptless.cli.survey.reading import Reading
from lightning_ckptless.ledger import Event
from lightning_ckptless.protocol.redundancy import Cover, cover_of, protection_of
from lightning_ckptless.protocol.versions import Replica, SlotState, newest_complete
from lightning_ckptless.protocol.wording import counted

_MOST_FATAL = 4


@dataclass(frozen=True, slots=True)
class Protected:
    """What may be lost now without losing a committed step.

    Args:
        losses: number of failure domains of which any may be lost at once; None if that is unknown.
        domain: noun for a failure domain, e.g. `node`; empty before the placement is known.
        step: optimizer step of the version that survives them; None without one.
        age_s: seconds since it was committed; None if that is unknown.
        text: all of this as one sentence.
    """

    losses: int | None
    domain: str
    step: int | None
    age_s: float | None
    text: str


def protection_in(history: History, replicas: Collection[Replica], nodes_here: Collection[str]) -> str:
    """Describe how many shards have all their copies, in a sentence; empty if no placement is known.

    Args:
        history: events of the run.
        replicas: replicas in the arenas on this host.
        nodes_here: nodes whose arenas are on this host.
    """
    if (placed := history.newest.get("placement")) is None:
        return ""
    facts = placed.fields
    elsewhere = sorted(set(facts["nodes"]) - set(nodes_here))
    if not elsewhere:
        return protection_of(replicas, facts["holders"], facts["nodes"], since=_since(history)).reason
    committed = history.newest.get("committed")
    if committed is None or committed.at < placed.at:
        return f"unknown: {_arenas_of(len(elsewhere))} on other hosts"
    step, shards = committed.fields["step"], len(facts["holders"])
    return (
        f"{shards} of {shards} shards had all copies of step {step}, according to the ledger; "
        f"{_arenas_of(len(elsewhere))} on other hosts"
    )


def _arenas_of(nodes: int) -> str:
    return "the arena of 1 node is" if nodes == 1 else f"the arenas of {nodes} nodes are"


def _since(history: History) -> str:
    """Return the version since which all copies have been complete: the last restored one, or the first."""
    if (restored := history.newest.get("restored")) is not None:
        return str(restored.fields["version"])
    first = history.first.get("committed")
    return f"step {first.fields['step']}" if first is not None else ""


# ---------------------------------------------------------------------- which losses are survived


def protected_now(reading: Reading) -> Protected:
    """Decide which losses the run survives at this moment: from the copies in its arenas, not from its options."""
    placed = reading.history.newest.get("placement")
    if placed is None:
        return Protected(None, "", None, None, "nothing is protected yet: no version has been mirrored")
    facts = placed.fields
    arenas = reading.current_arenas
    if set(facts["nodes"]) - {arena.info.node for arena in arenas}:
        return _by_the_ledger(reading.history, placed, reading.at)
    # The copies of a node without an agent are kept for a restart. They cannot be read while the other nodes train.
    alive = {arena.info.node for arena in arenas if arena.info.owner_alive}
    written_at = {r: at for r, at in reading.replicas.items() if r.node in alive or not alive}
    cover = cover_of(written_at, facts["domains"], facts["nodes"])
    if cover is None:
        reason = newest_complete(written_at).reason
        return Protected(None, facts["kind"], None, None, f"nothing is protected in memory: {reason}")
    committed = [at for r, at in written_at.items() if r.snapshot == cover.snapshot and r.state is SlotState.COMMITTED]
    age_s = max(0.0, reading.at - max(committed, default=reading.at))
    version = cover.snapshot.version
    newest = f"newest version {_step(version.optimizer_step)}, {age_s:.1f} s old"
    text = f"{_survived(cover, facts['kind'], len(set(facts['domains'])))}; {newest}"
    return Protected(cover.losses, facts["kind"], version.optimizer_step, age_s, text)


def _survived(cover: Cover, kind: str, domains: int) -> str:
    if cover.losses:
        return f"any {counted(cover.losses, kind)} may be lost"
    if domains == 1:
        return f"any worker may be lost, the only {kind} may not"
    shown = " or ".join(" + ".join(names) for names in cover.fatal[:_MOST_FATAL])
    more = f" or one of {len(cover.fatal) - _MOST_FATAL} more" if len(cover.fatal) > _MOST_FATAL else ""
    return f"not every {kind} may be lost: {shown}{more} holds the only copy of a shard"


def _by_the_ledger(history: History, placed: Event, now: float) -> Protected:
    """A committed version has all its copies, so the ledger shows what was protected when it was written."""
    kind, committed = placed.fields["kind"], history.newest.get("committed")
    if committed is None or not history.is_newest("committed", "placement", "node_lost"):
        return Protected(None, kind, None, None, "unknown: copies are on other hosts, and no version is committed yet")
    losses, step = placed.fields["copies"], committed.fields["step"]
    age_s = max(0.0, now - committed.at)
    may = f"any {counted(losses, kind)} may be lost" if losses else f"no {kind} may be lost"
    text = f"{may}, according to the ledger; committed {_step(step)}, {age_s:.1f} s ago"
    return Protected(losses, kind, step, age_s, text)


def _step(number: int) -> str:
    return f"step {number:,}"
