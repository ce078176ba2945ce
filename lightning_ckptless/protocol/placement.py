"""Which ranks keep which shard: placement over failure domains, and the losses that it survives.

Ranks that fail together must not keep all copies of a shard, so shards are placed over failure domains first and over
the ranks inside them second. Domains are arranged in circles; the shards of a domain are kept by the next `copies`
domains of its circle. A circle of `copies + 1` domains is a group, in which every domain keeps the shards of all
others. Groups survive more losses than any other placement. If groups do not divide the domains evenly, the last circle
is longer and is called a ring.

A shard is lost if its domain and the `copies` domains after it in the circle are lost. So a circle survives as long as
no `copies + 1` consecutive domains are lost. `Placement.survival_probability` counts these cases exactly.

If several domains are lost together, for example because a group of ranks spans them, they are joined first: see
`fail_together`. A copy is never kept by a rank that is lost with the shard's writer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import comb
from typing import NamedTuple

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.wording import counted

Circle = tuple[str, ...]


class PlacementRow(NamedTuple):
    """One shard of a placement, for printing.

    Args:
        shard: index of the shard.
        writer: rank that writes the shard and keeps the first copy; equal to `shard`.
        holders: ranks that keep another copy.
        domains: failure domains that contain a copy, the writer's first.
    """

    shard: int
    writer: int
    holders: tuple[int, ...]
    domains: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Which ranks keep which shard.

    Args:
        holders: for each shard the ranks, other than its writer, that keep a copy.
        domains: failure domain of each rank.
        circles: the domains, grouped into circles that keep each other's shards.
        copies: replicas of each shard in addition to the writer's own; 0 if there is only one domain.
        kind: noun for a failure domain in messages, e.g. `node`.
        reason: what was placed and what it survives, one sentence.
    """

    holders: tuple[tuple[int, ...], ...]
    domains: tuple[str, ...]
    circles: tuple[Circle, ...]
    copies: int
    kind: str
    reason: str

    def sources(self, rank: int) -> tuple[int, ...]:
        """The shards that a rank keeps for other ranks."""
        return tuple(shard for shard, holders in enumerate(self.holders) if rank in holders)

    def survival_probability(self, losses: int) -> float:
        """Probability that every shard still has a copy if this many domains, chosen uniformly, are lost at once.

        Raises:
            OptionsError: fewer than 0 or more losses than there are domains.
        """
        most = sum(len(circle) for circle in self.circles)
        if not 0 <= losses <= most:
            raise OptionsError(f"{losses} losses: expected 0 to {most}, the number of failure domains")
        return _survival(self.circles, self.copies, losses)

    def fatal_losses(self) -> tuple[tuple[str, ...], ...]:
        """The smallest sets of domains whose simultaneous loss destroys every copy of some shard.

        A loss is survived if it contains none of these sets.
        """
        run = self.copies + 1
        starts = ((circle, start) for circle in self.circles for start in range(len(circle)))
        runs = ([circle[(start + step) % len(circle)] for step in range(run)] for circle, start in starts)
        return tuple(dict.fromkeys(tuple(sorted(neighbours)) for neighbours in runs))

    def rows(self) -> tuple[PlacementRow, ...]:
        """The placement as a table, one row per shard."""
        return tuple(
            PlacementRow(shard, shard, holders, tuple(self.domains[rank] for rank in (shard, *holders)))
            for shard, holders in enumerate(self.holders)
        )


def fail_together(domains: Sequence[str], groups: Iterable[Collection[int]]) -> tuple[str, ...]:
    """Join the failure domains that share a group, since they are lost together.

    Args:
        domains: name of each rank's failure domain.
        groups: ranks that are lost together, e.g. tensor-parallel groups; a rank may be in none or several.

    Returns:
        The name of each rank's joined domain: `a+b` if `a` and `b` share a group, directly or transitively. This is the
        finest partition that splits no domain and no group.
    """
    joined = {name: {name} for name in domains}
    for group in groups:
        together = set[str]().union(*(joined[domains[rank]] for rank in group))
        joined |= dict.fromkeys(together, together)
    order = {name: position for position, name in enumerate(dict.fromkeys(domains))}
    return tuple("+".join(sorted(joined[name], key=order.__getitem__)) for name in domains)


def place(domains: Sequence[str], copies: int, *, kind: str = "node") -> Placement:
    """Choose the holders of every shard.

    The shard of the i-th rank of a domain is kept by the (i mod size)-th rank of each domain that keeps it.

    Args:
        domains: name of each rank's failure domain.
        copies: replicas of each shard in addition to the writer's own.
        kind: noun for a failure domain in messages, e.g. `node`.

    Raises:
        OptionsError: there are several domains, but too few for this number of copies.
    """
    assert domains, "a placement needs at least one rank"
    assert copies >= 0, copies
    names = tuple(dict.fromkeys(domains))
    if 1 < len(names) <= copies:
        raise OptionsError(_too_few(len(domains), len(names), copies, kind))
    placed = copies if len(names) > 1 else 0
    circles = _circles(names, placed + 1)
    holders = _holders(domains, circles, placed)
    reason = _reason(len(domains), circles, copies, kind)
    return Placement(holders, tuple(domains), circles, placed, kind, reason)


def _circles(names: tuple[str, ...], group_size: int) -> tuple[Circle, ...]:
    group_count, rest = divmod(len(names), group_size)
    if rest:
        group_count -= 1
    ring_start = group_count * group_size
    groups = tuple(names[start : start + group_size] for start in range(0, ring_start, group_size))
    return (*groups, names[ring_start:]) if rest else groups


def _holders(domains: Sequence[str], circles: Sequence[Circle], copies: int) -> tuple[tuple[int, ...], ...]:
    ranks: dict[str, list[int]] = {}
    for rank, domain in enumerate(domains):
        ranks.setdefault(domain, []).append(rank)
    holders: list[tuple[int, ...]] = [()] * len(domains)
    for circle in circles:
        for position, domain in enumerate(circle):
            others = [circle[(position + step) % len(circle)] for step in range(1, copies + 1)]
            for index, rank in enumerate(ranks[domain]):
                holders[rank] = tuple(ranks[other][index % len(ranks[other])] for other in others)
    return tuple(holders)


def _survival(circles: Sequence[Circle], copies: int, losses: int) -> float:
    """Probability that no circle loses `copies + 1` consecutive domains.

    Circles survive independently of each other, so the numbers of ways to survive multiply like polynomials whose
    degree is the number of losses.
    """
    ways: list[int] = [1]
    for size, count in Counter(len(circle) for circle in circles).items():
        in_circle = [_survivals_of_circle(size, copies + 1, lost) for lost in range(min(size, losses) + 1)]
        for _ in range(count):
            ways = _product(ways, in_circle, losses)
    total = sum(len(circle) for circle in circles)
    return ways[losses] / comb(total, losses)


def _survivals_of_circle(size: int, run: int, lost: int) -> int:
    """Number of ways to lose `lost` of `size` domains in a circle without losing `run` consecutive ones.

    The remaining domains divide the circle into as many gaps, each with fewer than `run` lost domains. The count uses
    inclusion-exclusion over the gaps with too many. Fixing a remaining domain as the first counts each way once per
    remaining domain, which the last line corrects.
    """
    left = size - lost
    if left == 0:
        return 0
    ways = sum(
        (-1 if full % 2 else 1) * comb(left, full) * comb(lost - full * run + left - 1, left - 1)
        for full in range(lost // run + 1)
    )
    return size * ways // left


def _product(a: Sequence[int], b: Sequence[int], degree: int) -> list[int]:
    product = [0] * min(len(a) + len(b) - 1, degree + 1)
    for i, left in enumerate(a):
        for j, right in enumerate(b[: degree + 1 - i]):
            product[i + j] += left * right
    return product


def _reason(shards: int, circles: Sequence[Circle], copies: int, kind: str) -> str:
    count = sum(len(circle) for circle in circles)
    if count == 1 and copies:
        return (
            f"{counted(shards, 'shard')}, 1 copy each on 1 {kind}: a {kind} loss is not covered "
            f"(copies={copies} needs {copies + 1} {kind}s)"
        )
    if not copies:
        return f"{counted(shards, 'shard')}, 1 copy each over {counted(count, kind)}: survives no {kind} loss"
    beyond = copies + 1
    odds = _survival(circles, copies, beyond)
    covered = f"any {kind} loss" if copies == 1 else f"any {copies} simultaneous {kind} losses"
    return (
        f"{counted(shards, 'shard')}, {beyond} copies each over {count} {kind}s in {_shape(circles, beyond)}: "
        f"survives {covered}, {beyond} at once with probability {odds:.3f}"
    )


def _shape(circles: Sequence[Circle], group_size: int) -> str:
    groups = [f"groups of {group_size}"] if any(len(circle) == group_size for circle in circles) else []
    rings = [f"a ring of {len(circle)}" for circle in circles if len(circle) > group_size]
    return " and ".join(groups + rings)


def _too_few(ranks: int, found: int, copies: int, kind: str) -> str:
    return (
        f"copies={copies} needs {copies + 1} {kind}s (the writer's own and {copies} more), "
        f"but the {ranks} ranks are on {found}: set copies={found - 1} or add {counted(copies + 1 - found, kind)}"
    )
