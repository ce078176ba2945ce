"""The two-slot commit under every interleaving: small worlds, all orders of events, a crash at any point.

Every rank writes its shard (begin, two halves, seal), sends it to its holder (the same four steps in the holder's
slot), votes, and learns that all have voted. After a crash all ranks are relaunched, possibly without one of the
arenas, fill in the copies that the restored version lacks, and continue.
The same explorer must refute weaker rules, which shows that it detects violations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache, cached_property
from typing import Any, NamedTuple

import pytest

from lightning_ckptless.errors import ProtocolError
from lightning_ckptless.protocol.slots import (
    SlotEvent,
    SlotView,
    absent_copies,
    advance,
    newest_committed,
    settle,
    target_slot,
)
from lightning_ckptless.protocol.versions import (
    READABLE,
    Missing,
    Replica,
    SlotState,
    Snapshot,
    Version,
    newest_complete,
)


class Rule(Enum):
    """When a slot may be overwritten: our rule and weaker ones."""

    OURS = auto()
    SEALED_LOCALLY = auto()
    HOLDER_CHOOSES = auto()
    RESTORED_IS_COMMITTED = auto()
    UNMARKED = auto()


class Slot(NamedTuple):
    """A slot: its header, and for each part of its contents the snapshot from which it was copied."""

    view: SlotView = SlotView()
    parts: tuple[Snapshot | None, ...] = ()


class Rank(NamedTuple):
    """A worker: what it knows to be committed, what it mirrors, and its progress in that."""

    committed: Snapshot | None
    making: Snapshot
    settled: bool = False
    written: int = 0
    sent: int = 0
    voted: bool = False


Copy = tuple[int, int]
Slots = tuple[tuple[Slot, Slot], ...]


class World(NamedTuple):
    """A state: the ranks, the slots of each copy, and `promised`, the newest version that any rank has learned of."""

    ranks: tuple[Rank, ...]
    slots: Slots
    generation: int
    crashes_left: int
    losses_left: int
    promised: Version | None


@dataclass(frozen=True)
class Game:
    """The bounds of an exploration.

    Args:
        size: number of ranks; each is its own failure domain and its shard is kept by the next one.
        steps: number of versions to mirror.
        parts: number of pieces in which a shard is copied.
        crashes: number of times all workers may die; one arena may be lost in one of them.
        rule: the rule under test.
    """

    size: int
    steps: int
    parts: int = 2
    crashes: int = 1
    rule: Rule = Rule.OURS

    @cached_property
    def copies(self) -> tuple[Copy, ...]:
        return tuple((shard, (shard + ahead) % self.size) for shard in range(self.size) for ahead in (0, 1))

    @property
    def sealed(self) -> int:
        """Progress value of a sealed copy."""
        return self.parts + 2

    def snapshot(self, step: int, generation: int) -> Snapshot:
        return Snapshot(Version(step, True), generation, self.size, "layout")

    def start(self) -> World:
        ranks = (Rank(committed=None, making=self.snapshot(1, 1)),) * self.size
        return World(ranks, (self.empty_pair(),) * len(self.copies), 1, self.crashes, 1, None)

    def empty_pair(self) -> tuple[Slot, Slot]:
        return (Slot(parts=(None,) * self.parts),) * 2


def explore(game: Game) -> tuple[set[str], set[World]]:
    """Visit every reachable world; return all violations, which are not explored further, and the worlds."""
    start = game.start()
    seen, pending, violations = {start}, [start], set()
    while pending:
        world = pending.pop()
        if (violation := broken(game, world.slots, world.promised, world.losses_left > 0)) is not None:
            violations.add(violation)
            continue
        try:
            following = set(moves(game, world)) - seen
        except ProtocolError as error:
            violations.add(str(error))
            continue
        seen |= following
        pending.extend(following)
    return violations, seen


@cache
def broken(game: Game, slots: Slots, promised: Version | None, may_lose: bool) -> str | None:
    """Why the arenas cannot be restored correctly; None if they can."""
    for view, parts in (slot for pair in slots for slot in pair):
        if view.state in READABLE and set(parts) != {view.snapshot}:
            return f"a slot is marked as {view.snapshot} but contains {parts}"
    for lost in (None, *range(game.size)) if may_lose else (None,):
        found = newest_complete(inventory(game, slots, lost))
        if promised is not None and (isinstance(found, Missing) or found.snapshot.version < promised):
            return f"{promised} was committed; without the arena of rank {lost}: {found.reason}"
    return None


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Release the visited worlds, which would slow down garbage collection in later tests."""
    yield
    broken.cache_clear()


def inventory(game: Game, slots: Slots, lost: int | None) -> tuple[Replica, ...]:
    """Contents of the remaining arenas."""
    return tuple(
        Replica(
            shard, holder, f"n{holder}", number, s.version, s.generation, s.world_size, s.layout, view.state, 2, 0, ""
        )
        for (shard, holder), pair in zip(game.copies, slots, strict=True)
        for number, (view, _) in enumerate(pair)
        if holder != lost and (s := view.snapshot) is not None
    )


def moves(game: Game, world: World) -> Iterator[World]:
    """Every world reachable by one step of one rank or by one crash."""
    for rank, me in enumerate(world.ranks):
        if me.making.version.optimizer_step <= game.steps:
            yield from moves_of(game, world, rank, me)
    if world.crashes_left:
        yield crashed(game, world, None)
        if world.losses_left:
            yield from (crashed(game, world, lost) for lost in range(game.size))


def moves_of(game: Game, world: World, rank: int, me: Rank) -> Iterator[World]:
    holder, source = (rank + 1) % game.size, (rank - 1) % game.size
    if not me.settled:
        yield settled(game, world, rank)
        return
    if me.written < game.sealed:
        yield with_rank(copied(game, world, (rank, rank), me.written), rank, written=me.written + 1)
    elif me.sent < game.sealed and world.ranks[holder].settled:
        yield with_rank(copied(game, world, (rank, holder), me.sent), rank, sent=me.sent + 1)
    if not me.voted and holds(game, world, (rank, rank), me.making) and holds(game, world, (source, rank), me.making):
        yield with_rank(world, rank, voted=True)
    if me.voted and all(r.making > me.making or (r.making == me.making and r.voted) for r in world.ranks):
        yield learned(game, world, rank)
    elif game.rule is Rule.SEALED_LOCALLY and me.sent == game.sealed:
        yield moved_on(game, world, rank)


def copied(game: Game, world: World, copy: Copy, progress: int) -> World:
    """One step of filling the slot of a copy: begin, each part, seal."""
    writer, holder = copy
    snapshot = world.ranks[writer].making
    index = game.copies.index(copy)
    pair = world.slots[index]
    if progress == 0:
        chooser = holder if game.rule is Rule.HOLDER_CHOOSES else writer
        number = target_slot((pair[0].view, pair[1].view), world.ranks[chooser].committed)
        return with_slot(world, index, number, changed(pair[number], SlotEvent.BEGIN, copy, snapshot))
    number = next(n for n, slot in enumerate(pair) if slot.view.state is SlotState.WRITING)
    if progress == game.parts + 1:
        return with_slot(world, index, number, changed(pair[number], SlotEvent.SEAL, copy, snapshot))
    part = progress - 1
    source = snapshot if writer == holder else own_part(game, world, writer, part)
    parts = (*pair[number].parts[:part], source, *pair[number].parts[part + 1 :])
    return with_slot(world, index, number, pair[number]._replace(parts=parts))


def own_part(game: Game, world: World, writer: int, part: int) -> Snapshot | None:
    """What the sender reads: the current contents of the writer's own slot for the version."""
    pair = world.slots[game.copies.index((writer, writer))]
    return next(slot.parts[part] for slot in pair if slot.view.snapshot == world.ranks[writer].making)


def settled(game: Game, world: World, rank: int) -> World:
    """A rank of a new generation settles the slots of its arena."""
    me = world.ranks[rank]
    for index, copy in enumerate(game.copies):
        for number, slot in enumerate(world.slots[index]):
            if copy[1] == rank and (event := settle(slot.view, me.making)) is not None:
                world = with_slot(world, index, number, changed(slot, event, copy, None))
    written, sent = (
        game.sealed * holds(game, world, copy, me.making) for copy in ((rank, rank), (rank, (rank + 1) % game.size))
    )
    return with_rank(world, rank, settled=True, written=written, sent=sent)


def learned(game: Game, world: World, rank: int) -> World:
    """A rank learns that its version is committed and marks it so in the headers of its arena."""
    snapshot = world.ranks[rank].making
    for index, copy in enumerate(game.copies):
        for number, slot in enumerate(world.slots[index]):
            silent = game.rule is Rule.UNMARKED and snapshot.generation < world.generation
            if copy[1] == rank and slot.view == SlotView(SlotState.STAGED, snapshot) and not silent:
                world = with_slot(world, index, number, changed(slot, SlotEvent.COMMIT, copy, snapshot))
    promised = max(world.promised or snapshot.version, snapshot.version)
    return moved_on(game, world, rank)._replace(promised=promised)


def moved_on(game: Game, world: World, rank: int) -> World:
    done = world.ranks[rank].making
    following = game.snapshot(done.version.optimizer_step + 1, world.generation)
    return with_rank(world, rank, committed=done, making=following, written=0, sent=0, voted=False)


def crashed(game: Game, world: World, lost: int | None) -> World:
    """All workers die, and possibly an arena is lost; the next generation reads what is left."""
    left = inventory(game, world.slots, lost)
    found = newest_complete(left)
    generation = world.generation + 1
    if isinstance(found, Missing):
        rank = Rank(committed=None, making=game.snapshot(1, generation))
    elif game.rule is Rule.RESTORED_IS_COMMITTED:
        step = found.snapshot.version.optimizer_step
        rank = Rank(committed=found.snapshot, making=game.snapshot(step + 1, generation))
    else:
        # If no copy is absent, the inventory replaces the vote.
        holders = [((shard + 1) % game.size,) for shard in range(game.size)]
        whole = not absent_copies(found, holders, [f"n{rank}" for rank in range(game.size)])
        rank = Rank(committed=newest_committed(left), making=found.snapshot, voted=whole)
    slots = tuple(
        game.empty_pair() if holder == lost else pair
        for (_, holder), pair in zip(game.copies, world.slots, strict=True)
    )
    losses_left = world.losses_left - (lost is not None)
    return World((rank,) * game.size, slots, generation, world.crashes_left - 1, losses_left, world.promised)


def holds(game: Game, world: World, copy: Copy, snapshot: Snapshot) -> bool:
    return any(s.view.snapshot == snapshot and s.view.state in READABLE for s in world.slots[game.copies.index(copy)])


def changed(slot: Slot, event: SlotEvent, copy: Copy, snapshot: Snapshot | None) -> Slot:
    version = None if snapshot is None else snapshot.version
    state = advance(slot.view.state, event, shard=copy[0], rank=copy[1], version=version)
    return slot._replace(view=SlotView(state, snapshot))


def with_rank(world: World, rank: int, **changes: Any) -> World:
    ranks = list(world.ranks)
    ranks[rank] = ranks[rank]._replace(**changes)
    return world._replace(ranks=tuple(ranks))


def with_slot(world: World, index: int, number: int, slot: Slot) -> World:
    first, second = world.slots[index]
    pair = (slot, second) if number == 0 else (first, slot)
    return world._replace(slots=(*world.slots[:index], pair, *world.slots[index + 1 :]))


@pytest.mark.parametrize(
    "game",
    [
        Game(size=2, steps=3),
        Game(size=2, steps=2, parts=1, crashes=2),
        pytest.param(Game(size=3, steps=2, parts=1), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_committed_version_survives_every_interleaving(game: Game) -> None:
    violations, worlds = explore(game)
    assert violations == set()
    ended = [w for w in worlds if all(rank.making.version.optimizer_step > game.steps for rank in w.ranks)]
    assert {w.crashes_left for w in ended} == set(range(game.crashes + 1))
    assert {w.promised for w in ended} == {Version(game.steps, True)}


@pytest.mark.parametrize(
    ("game", "expected"),
    [
        (
            Game(size=2, steps=3, parts=1, crashes=0, rule=Rule.SEALED_LOCALLY),
            "step 1 was committed; without the arena of rank 1: no version is complete",
        ),
        (
            Game(size=2, steps=3, parts=1, crashes=0, rule=Rule.HOLDER_CHOOSES),
            "rank 1, shard 0, step 2: event begin in a slot in state staged",
        ),
        (
            Game(size=2, steps=3, parts=1, crashes=1, rule=Rule.RESTORED_IS_COMMITTED),
            "step 1 was committed; without the arena of rank 0: the arenas are empty",
        ),
        (
            Game(size=2, steps=2, parts=1, crashes=2, rule=Rule.UNMARKED),
            "step 1 was committed; without the arena of rank 1: no version is complete",
        ),
    ],
    ids=lambda value: str(value.rule) if isinstance(value, Game) else "",
)
def test_a_weaker_rule_is_refuted(game: Game, expected: str) -> None:
    violations, _ = explore(game)
    assert any(violation.startswith(expected) for violation in violations), violations
