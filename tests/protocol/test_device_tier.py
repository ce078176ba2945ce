"""The device tier under every interleaving of small worlds, and under random ones of larger worlds.

A rank ends step k on its device, delivers its host state to the holder of its shard, votes twice, saves, and makes step
k+1. Any ranks may be lost at any point, and the others go on until they notice. Then they choose a version,
and each restores it on its own, while further ranks may be lost. The device may be behind the process: a reduction
whose peer is gone ends with a wrong sum.
The same explorer must refute weaker rules, which shows that it detects violations.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from enum import Enum, auto
from typing import Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ckptless.protocol.device_tier import (
    DeviceState,
    Source,
    kept_on_devices,
    needed_with,
    place_on_devices,
    restorable,
    slot_bytes,
)
from lightning_ckptless.protocol.placement import place
from lightning_ckptless.protocol.versions import Complete, Replica, Snapshot, Tier, Version, newest_complete


class Rule(Enum):
    """When a slot may be overwritten, and what is offered: our rule and weaker ones."""

    OURS = auto()
    AFTER_STEP = auto()
    WITHOUT_VOTE = auto()
    QUEUED_IS_ENDED = auto()
    ONE_VOTE = auto()
    UNKNOWN_IS_OFFERED = auto()
    FILL_FIRST = auto()


class Content(Enum):
    """What tensors that are called version k really contain."""

    RIGHT = auto()
    QUEUED = auto()
    WRONG = auto()


class Slot(NamedTuple):
    """A version with its contents and the shards whose host state is there."""

    version: Snapshot
    content: Content
    parts: frozenset[int]


Votes = Literal[0, 1, 2, 3]
"""Progress in the two votes: none cast, the first cast, its outcome known, the second cast."""


class Rank(NamedTuple):
    """A process. `restoring` is the version to restore, `stage` its progress in that; `live` is None while it fills."""

    saved: Slot | None
    live: Slot | None
    votes: Votes = 0
    knows: bool = False
    restoring: Snapshot | None = None
    stage: int = 0


class World(NamedTuple):
    ranks: tuple[Rank, ...]
    lost: frozenset[int]
    generation: int
    losses_left: int


class Game(NamedTuple):
    """The bounds of an exploration: each rank's shard is kept by the next one, and version 0 is in the arenas."""

    size: int
    steps: int
    losses: int = 1
    rule: Rule = Rule.OURS

    def snapshot(self, step: int, generation: int) -> Snapshot:
        return Snapshot(Version(step, True), generation, self.size, "layout")

    def shards(self, rank: int) -> frozenset[int]:
        return frozenset({rank, (rank - 1) % self.size})

    def start(self) -> World:
        first = self.snapshot(0, 1)
        rank = [Rank(Slot(first, Content.RIGHT, self.shards(r)), None) for r in range(self.size)]
        return World(
            tuple(stepped(self, r, me, 1, Content.RIGHT) for r, me in enumerate(rank)), frozenset(), 1, self.losses
        )


def stepped(game: Game, rank: int, me: Rank, generation: int, content: Content) -> Rank:
    """The next version is in the live tensors, as far as the process knows."""
    before = me.live if me.live is not None else me.saved
    assert before is not None
    version = game.snapshot(before.version.version.optimizer_step + 1, generation)
    return me._replace(live=Slot(version, content, frozenset()), votes=0, knows=False)


def moves(game: Game, world: World) -> Iterator[World]:
    """Every world reachable by one step of one rank, by a loss, or by a regrouping."""
    for rank, me in enumerate(world.ranks):
        if rank not in world.lost:
            for changed in moves_of(game, world, rank, me):
                yield with_rank(world, rank, changed)
    if world.losses_left:
        for rank in set(range(game.size)) - world.lost:
            if len(world.lost) + 1 < game.size:
                yield world._replace(lost=world.lost | {rank}, losses_left=world.losses_left - 1)
    if world.lost:
        yield regrouped(game, world)


def moves_of(game: Game, world: World, rank: int, me: Rank) -> Iterator[Rank]:
    if me.restoring is not None:
        yield from restores(game, world, rank, me)
        return
    live = me.live
    assert live is not None
    step = live.version.version.optimizer_step
    if live.content is Content.QUEUED:
        yield ended(me, Content.WRONG if world.lost else Content.RIGHT)
    if rank not in live.parts:
        yield me._replace(live=live._replace(parts=live.parts | {rank}))
    source = (rank - 1) % game.size
    if source not in live.parts and source not in world.lost and has_sealed(world.ranks[source], live.version, source):
        yield me._replace(live=live._replace(parts=live.parts | {source}))
    yield from votes(game, world, rank, me, live)
    may_save = me.knows
    if game.rule is Rule.AFTER_STEP:
        may_save = True
    elif game.rule is Rule.WITHOUT_VOTE:
        may_save = all(reached(other, live.version) for other in world.ranks)
    if may_save and (me.saved is None or me.saved.version != live.version):
        yield me._replace(saved=live)
    have_contributed = world.lost or all(reached(other, live.version) for other in world.ranks)
    has_saved = me.saved is not None and me.saved.version == live.version
    if step < game.steps and has_saved and have_contributed and live.content is not Content.QUEUED:
        yield stepped(game, rank, me, world.generation, Content.QUEUED)


def votes(game: Game, world: World, rank: int, me: Rank, live: Slot) -> Iterator[Rank]:
    """One step in the two votes. A rank may learn an outcome from ranks that are lost by now."""
    is_ended = live.content is not Content.QUEUED or game.rule is Rule.QUEUED_IS_ENDED
    if me.votes == 0 and is_ended:
        yield me._replace(votes=1)
    elif me.votes == 1 and (game.rule is Rule.ONE_VOTE or all(voted(r, live.version, 1) for r in world.ranks)):
        yield me._replace(votes=2)
    elif me.votes == 2 and live.parts == game.shards(rank):
        yield me._replace(votes=3)
    elif me.votes == 3 and not me.knows and all(voted(r, live.version, 3) for r in world.ranks):
        yield me._replace(knows=True)


def ended(me: Rank, content: Content) -> Rank:
    """The device has ended the step, and what was copied from its result is the same."""
    assert me.live is not None
    saved = me.saved
    if saved is not None and saved.version == me.live.version:
        saved = saved._replace(content=content)
    return me._replace(live=me.live._replace(content=content), saved=saved)


def restores(game: Game, world: World, rank: int, me: Rank) -> Iterator[Rank]:
    """One step of a restore: save the live tensors, keep what was fetched, fill the live tensors, continue."""
    found = me.restoring
    assert found is not None
    if me.stage == 0:
        live = me.live
        if (
            live is not None
            and DeviceState(live=live.version).must_save_for(found)
            and game.rule is not Rule.FILL_FIRST
        ):
            yield me._replace(saved=live, live=None, stage=1)
        else:
            yield me._replace(live=None, stage=1)
    elif (
        me.stage == 1 and not world.lost and all(other.restoring != found or other.stage >= 1 for other in world.ranks)
    ):
        # Every other rank has sent what this one lacks: host states too.
        yield me._replace(saved=Slot(found, fetched(world, found), game.shards(rank)), stage=2)
    elif me.stage == 2:
        kept = me._replace(restoring=None, stage=0)
        yield stepped(game, rank, kept, world.generation, Content.QUEUED)


def fetched(world: World, found: Snapshot) -> Content:
    offered = [me.saved.content for me in world.ranks if me.saved is not None and me.saved.version == found]
    return Content.WRONG if Content.WRONG in offered else Content.RIGHT


def regrouped(game: Game, world: World) -> World:
    """Survivors and replacements regroup, and all choose the same version from the same inventory."""
    found = chosen(game, world)
    version = found.snapshot if isinstance(found, Complete) else game.snapshot(0, 1)
    ranks = tuple(
        (Rank(None, None) if rank in world.lost else me)._replace(restoring=version, stage=0, votes=0)
        for rank, me in enumerate(world.ranks)
    )
    return World(ranks, frozenset(), world.generation + 1, world.losses_left)


def chosen(game: Game, world: World) -> Complete | None:
    inventory = tuple(
        replica for rank, me in enumerate(world.ranks) if rank not in world.lost for replica in offered(rank, me)
    )
    found = newest_complete(inventory if game.rule is Rule.UNKNOWN_IS_OFFERED else restorable(inventory))
    return found if isinstance(found, Complete) else None


def offered(rank: int, me: Rank) -> Iterator[Replica]:
    state = DeviceState(
        None if me.saved is None else me.saved.version, None if me.live is None else me.live.version, me.knows
    )
    for source, s, slot_state in state.offers():
        slot = me.saved if source is Source.SLOT else me.live
        assert slot is not None
        for shard in slot.parts:
            number = [Source.SLOT, Source.LIVE].index(source)
            yield Replica(
                shard, rank, "n", number, s.version, s.generation, s.world_size, s.layout, slot_state, 8, 4, "",
                Tier.DEVICE,
            )  # fmt: skip


def has_sealed(me: Rank, version: Snapshot, shard: int) -> bool:
    return me.live is not None and me.live.version == version and shard in me.live.parts


def voted(me: Rank, version: Snapshot, count: Votes) -> bool:
    """Whether a rank has come so far in the votes for a version: it may have gone on since."""
    return reached(me, version) and (me.votes >= count or (me.live is not None and me.live.version != version))


def reached(me: Rank, version: Snapshot) -> bool:
    return me.restoring is None and me.live is not None and me.live.version >= version


def with_rank(world: World, rank: int, changed: Rank) -> World:
    return world._replace(ranks=(*world.ranks[:rank], changed, *world.ranks[rank + 1 :]))


def broken(game: Game, world: World) -> str | None:
    """Why the ranks that are left cannot restore what they should; None if they can."""
    if not world.lost:
        return None
    left = [(rank, me) for rank, me in enumerate(world.ranks) if rank not in world.lost]
    found = chosen(game, world)
    if found is not None:
        used = {(r.holder, r.slot) for replicas in found.replicas for r in replicas}
        slots = [
            me.saved if number == 0 else me.live for rank, me in left for number in (0, 1) if (rank, number) in used
        ]
        if any(slot is None or slot.content is Content.WRONG for slot in slots):
            return f"{found.snapshot.version} is restored from a wrong sum"
    # A new process has nothing before it has restored.
    members = [(rank, me) for rank, me in left if me.saved is not None or me.live is not None]
    if frozenset().union(*(game.shards(rank) for rank, _ in members)) != frozenset(range(game.size)):
        return None
    known = [me.saved.version for _, me in members if me.saved is not None]
    known += [me.live.version for _, me in members if me.live is not None and me.knows]
    known += [me.restoring for _, me in members if me.restoring is not None]
    if found is None or found.snapshot < max(known):
        return f"{max(known).version} is known, and cannot be restored: {found and found.reason}"
    furthest = max((me.live.version for me in world.ranks if me.live is not None), default=found.snapshot)
    if found.snapshot.version.optimizer_step < furthest.version.optimizer_step - 2:
        return f"{found.snapshot.version} is more than two steps behind {furthest.version}"
    return None


def explore(game: Game) -> tuple[str | None, int]:
    """Visit every reachable world up to the first violation; return it and the number of worlds."""
    start = game.start()
    seen, pending = {start}, [start]
    while pending:
        world = pending.pop()
        if (violation := broken(game, world)) is not None:
            return violation, len(seen)
        # Not as a set, whose order differs from process to process.
        following = [each for each in dict.fromkeys(moves(game, world)) if each not in seen]
        seen.update(following)
        pending += following
    return None, len(seen)


@pytest.mark.parametrize(
    "game",
    [Game(2, 2), pytest.param(Game(2, 3, 2), marks=pytest.mark.long), pytest.param(Game(3, 2), marks=pytest.mark.long)],
    ids=str,
)
def test_what_is_known_survives_every_interleaving(game: Game) -> None:
    violation, worlds = explore(game)
    assert violation is None
    assert worlds > 1000


@pytest.mark.parametrize(
    ("game", "expected"),
    [
        (Game(2, 2, rule=Rule.AFTER_STEP), "step 1 is known, and cannot be restored"),
        (Game(2, 2, rule=Rule.WITHOUT_VOTE), "step 1 is known, and cannot be restored"),
        (Game(2, 2, rule=Rule.QUEUED_IS_ENDED), "step 2 is restored from a wrong sum"),
        (Game(2, 2, rule=Rule.ONE_VOTE), "step 2 is restored from a wrong sum"),
        (Game(2, 2, rule=Rule.UNKNOWN_IS_OFFERED), "step 2 is restored from a wrong sum"),
        (Game(2, 2, losses=2, rule=Rule.FILL_FIRST), "step 1 is known, and cannot be restored"),
    ],
    ids=lambda value: str(value.rule) if isinstance(value, Game) else "",
)
def test_a_weaker_rule_is_refuted(game: Game, expected: str) -> None:
    violation, _ = explore(game)
    assert violation is not None and violation.startswith(expected)


@settings(max_examples=30)
@given(size=st.integers(2, 6), losses=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_what_is_known_survives_in_larger_worlds(size: int, losses: int, seed: int) -> None:
    game, choose = Game(size, 4, losses), random.Random(seed)
    world = game.start()
    for _ in range(60 * size):
        following = list(moves(game, world))
        if not following:
            break
        # A rank that is lost or found missing is one move of many: otherwise no walk would come far.
        going_on = [w for w in following if w.lost == world.lost and w.generation == world.generation]
        world = choose.choice(going_on if going_on and choose.random() < 0.95 else following)
        assert broken(game, world) is None


def test_device_memory_needs_copies_in_other_processes() -> None:
    in_one_node = place_on_devices(place(["n"] * 4, 1), 1)
    assert in_one_node.holders == ((1,), (0,), (3,), (2,))
    over_nodes = place(["a", "a", "b", "b"], 1)
    assert place_on_devices(over_nodes, 1) is over_nodes
    assert place_on_devices(place(["n", "n"], 3), 3).holders == ((1,), (0,))
    assert place_on_devices(place(["n"], 1), 1).holders == ((),)


@given(ranks=st.integers(2, 16), copies=st.integers(1, 3))
def test_slots_need_a_share_of_the_state(ranks: int, copies: int) -> None:
    placement = place_on_devices(place(["n"] * ranks, copies), copies)
    kept = kept_on_devices(placement)
    assert sum(slot_bytes(placement, rank, [8] * ranks) for rank in range(ranks)) == 8 * ranks * (1 + placement.copies)
    assert all(kept[rank][0] == rank and len(kept[rank]) == len(set(kept[rank])) for rank in kept)


def test_a_rank_fetches_what_it_needs_and_what_it_keeps() -> None:
    common = (0, 1, 2)
    found = needed_with({0: common, 1: common, 2: (0, 2)}, {0: (0, 1), 1: (1, 3), 2: (2, 0)})
    assert found[0] is common and set(found[1]) == {0, 1, 2, 3} and set(found[2]) == {0, 2}


def test_only_what_a_survivor_knows_is_restored_from_device_memory() -> None:
    old, new = Game(2, 2).snapshot(1, 1), Game(2, 2).snapshot(2, 1)
    ranks = [DeviceState(saved=old, live=new), DeviceState(saved=old, live=new)]
    assert versions_of(restorable(inventory(ranks))) == {1}
    ranks[1] = DeviceState(saved=old, live=new, is_known=True)
    assert versions_of(restorable(inventory(ranks))) == {1, 2}
    assert (ranks[0].may_save, ranks[1].may_save) == (False, True)


def inventory(states: list[DeviceState]) -> list[Replica]:
    return [
        Replica(0, rank, "n", 0, s.version, 1, 2, s.layout, state, 8, 4, "", Tier.DEVICE)
        for rank, each in enumerate(states)
        for _, s, state in each.offers()
    ]


def versions_of(replicas: tuple[Replica, ...]) -> set[int]:
    return {replica.version.optimizer_step for replica in replicas}
