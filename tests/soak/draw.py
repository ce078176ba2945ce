"""Draw a scenario from a seed: a pure function, so that the seed alone repeats a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from lightning_ckptless.protocol.fault_script import ALL, Fault, FaultKind, Moment
from tests.soak.scenario import (
    SILENT,
    STEPS,
    Configuration,
    Loss,
    OutsideFault,
    OutsideKind,
    Phase,
    Scenario,
)

NODES_SHARE = 0.12
"""Share of scenarios with several agents, or with the loss of the only one: they take ten times as long per fault."""
PAIR_S = 1.0
"""Longest time between the two faults of a pair, in seconds."""
PHASE_S = 0.25
"""Longest time from the beginning of a phase to a fault in it, in seconds; phases are usually shorter."""
FIRST_STEP, LAST_STEP = 2, STEPS - 2
GAP = (3, 6)
"""Minimum and maximum steps between two episodes: usually enough for the first to be over."""

SHAPES = (("", 2), ("", 2), ("", 3), ("", 4), ("2x1", 2), ("4x1", 4), ("2x2", 4))
KINDS = {
    FaultKind.KILL: 8,
    FaultKind.RAISE: 3,
    FaultKind.EXIT: 2,
    FaultKind.LEAVE: 1,
    FaultKind.CRASH: 2,
    FaultKind.HANG: 1,
    FaultKind.STOP: 1,
}
MOMENTS = (
    Moment.TRAINING_STEP,
    Moment.BACKWARD,
    Moment.OPTIMIZER_STEP,
    Moment.COMMIT,
    Moment.MIRROR,
    Moment.ACCUMULATION,
    Moment.VALIDATION,
    Moment.EPOCH_END,
)
PHASES = tuple(Phase)
LATE = frozenset({Moment.VALIDATION, Moment.EPOCH_END})
"""Moments that may occur after the fault's step, so that several faults may share one."""
EXACT = MOMENTS[:5]
"""Moments that every step has."""


def scenario(seed: int) -> Scenario:
    """Return the scenario of a seed.

    Args:
        seed: any integer.
    """
    chance = Random(f"soak {seed}")
    if chance.random() < NODES_SHARE:
        return _of_nodes(seed, chance)
    configuration = _one_node(chance)
    episodes = _Episodes(chance, configuration)
    step = FIRST_STEP
    while step < LAST_STEP:
        episodes.draw(step)
        step += chance.randint(*GAP)
    return Scenario(seed, configuration, tuple(episodes.injected), tuple(episodes.outside), chance.random() < 0.5)


def _one_node(chance: Random) -> Configuration:
    mesh, ranks = chance.choice(SHAPES)
    return Configuration(
        ranks=ranks,
        mesh=mesh,
        workers=_workers(mesh, chance.choice((0, 0, 2))),
        accumulate=chance.choice((1, 1, 2)),
        val_interval=chance.choice((0, 6)),
        standbys=chance.choice((0, 0, 1)),
        durable=chance.random() < 0.3,
        copies=chance.random() < 0.4,
        hang_timeout_s=chance.choice((None, 4.0)),
        slow_mirror_s=chance.choice((0.0, 0.02, 0.05)),
    )


def _workers(mesh: str, drawn: int) -> int:
    """Return the number of dataloader workers: none with tensor parallelism.

    Lightning seeds workers by the global rank, so the noise that the test model's dataset adds would differ among the
    ranks of a tensor-parallel group, which have to read the same samples.
    """
    return 0 if mesh == "2x2" else drawn


@dataclass
class _Episodes:
    """Draw the faults of a run on one node, one episode at a time.

    Args:
        chance: random generator.
        configuration: what is trained.
        injected: faults so far.
        outside: faults from outside so far.
        left: remaining number of some kinds, which take long or may occur only once.
    """

    chance: Random
    configuration: Configuration
    injected: list[Fault] = field(default_factory=list)
    outside: list[OutsideFault] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=lambda: {"silent": 2, "fork_server": 1, "all": 1, "late_raise": 1})

    def draw(self, step: int) -> None:
        """Draw the faults of one episode.

        Args:
            step: optimizer step at which it begins.
        """
        form = self.chance.choices(("single", "pair", "phase", "moment", "outside"), (4, 3, 3, 2, 3))[0]
        if form == "outside":
            self._outside(step)
            return
        first = self._inject(step, alone=form == "single")
        if form == "moment":
            self._inject_into_recovery(first)
        elif form != "single":
            self._follow(first, is_pair=form == "pair")

    def _inject(self, step: int, *, alone: bool) -> Fault:
        moments = [moment for moment in MOMENTS if moment is not Moment.ACCUMULATION or self._accumulates]
        moment = self.chance.choice(moments)
        kind = self._kind(moment)
        is_of_all = alone and kind is FaultKind.KILL and self.chance.random() < 0.15 and self._take("all")
        fault = Fault(kind, ALL if is_of_all else self._rank(), step, moment)
        self.injected.append(fault)
        return fault

    def _inject_into_recovery(self, first: Fault) -> None:
        """Inject a second fault while the ranks rendezvous or the state is restored."""
        kinds = {kind: weight for kind, weight in KINDS.items() if kind is not FaultKind.RAISE}
        kind = self.chance.choices(list(kinds), list(kinds.values()))[0]
        if kind in SILENT and not self._take("silent"):
            kind = FaultKind.KILL
        moment = self.chance.choice((Moment.REGROUP, Moment.CONNECT, Moment.RESTORE))
        self.injected.append(Fault(kind, self._rank(), first.step, moment))

    def _follow(self, first: Fault, *, is_pair: bool) -> None:
        """Add a second fault from outside: up to a second after the first, or in a phase of its recovery."""
        phase = Phase.FIRED if is_pair else self.chance.choice(PHASES)
        delay_s = self.chance.uniform(0.0, PAIR_S if is_pair else PHASE_S)
        kind = self.chance.choice((OutsideKind.KILL, OutsideKind.KILL, OutsideKind.KILL, OutsideKind.CRASH))
        self.outside.append(OutsideFault(kind, self._rank(), first.step, phase, round(delay_s, 3)))

    def _outside(self, step: int) -> None:
        kinds = {OutsideKind.KILL: 4, OutsideKind.CRASH: 1, OutsideKind.MEMORY: 1}
        if self.configuration.copies:
            kinds[OutsideKind.FLIP] = 4
        if self.configuration.standbys:
            kinds[OutsideKind.STANDBY] = 3
        if self.configuration.durable:
            kinds |= {OutsideKind.SIDECAR: 2, OutsideKind.DISK_FULL: 2}
        if self.left["silent"]:
            kinds[OutsideKind.STOP] = 1
        if self.left["fork_server"]:
            kinds[OutsideKind.FORK_SERVER] = 1
        kind = self.chance.choices(list(kinds), list(kinds.values()))[0]
        if kind is OutsideKind.STOP:
            self._take("silent")
        if kind is OutsideKind.FORK_SERVER:
            self._take("fork_server")
        self.outside.append(OutsideFault(kind, self._rank(), step, None, round(self.chance.uniform(0.0, 0.05), 3)))

    def _kind(self, moment: Moment) -> FaultKind:
        kind = self.chance.choices(list(KINDS), list(KINDS.values()))[0]
        if kind in SILENT and not self._take("silent"):
            return FaultKind.KILL
        # A repeated exception at a step counts as the script's own and ends the run: two may not share a step.
        if kind is FaultKind.RAISE and moment in LATE and not self._take("late_raise"):
            return FaultKind.KILL
        return kind

    def _take(self, what: str) -> bool:
        has_some = self.left[what] > 0
        self.left[what] -= has_some
        return has_some

    def _rank(self) -> int:
        return self.chance.randrange(self.configuration.ranks)

    @property
    def _accumulates(self) -> bool:
        return self.configuration.accumulate > 1


# ---------------------------------------------------------------------- several agents


def _of_nodes(seed: int, chance: Random) -> Scenario:
    """Draw a scenario with agents in separate processes: several nodes, or a single one that is restarted."""
    loss = chance.choice(tuple(Loss))
    alone = loss in (Loss.AGENT, Loss.AGENT_AND_ARENA)
    elastic = loss is Loss.NODE and chance.random() < 0.5
    nodes = 1 if alone else 3 if elastic else 2
    ranks = 3 if elastic else chance.choice((2, 4))
    configuration = Configuration(
        ranks=ranks,
        nodes=nodes,
        loss=loss,
        elastic=elastic,
        mesh=chance.choice(("", "", f"{ranks}x1")),
        durable=loss is Loss.AGENT_AND_ARENA,
        slow_mirror_s=0.05,
    )
    step = chance.randint(8, STEPS // 2)
    faults = [] if elastic else _kills(chance, ranks, step)
    outside: list[OutsideFault] = []
    if loss is Loss.LINK:
        outside.append(OutsideFault(OutsideKind.CUT, 1, step))
    else:
        # The first node's agent hosts the store.
        rank = 0 if loss is Loss.STORE_HOST else ranks - 1
        faults.insert(1, Fault(FaultKind.NODE, rank, step, chance.choice(EXACT)))
    return Scenario(seed, configuration, tuple(faults), tuple(outside), chance.random() < 0.5)


def _kills(chance: Random, ranks: int, step: int) -> list[Fault]:
    """Draw kills of ranks before and after the loss of a node."""
    steps = (chance.randint(2, step - 3), chance.randint(step + 4, STEPS - 2))
    return [Fault(FaultKind.KILL, chance.randrange(ranks), at, chance.choice(EXACT)) for at in steps]
