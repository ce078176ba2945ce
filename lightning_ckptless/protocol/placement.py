"""Which ranks keep which shard: placement over failure domains, and what it survives.

What fails together must not keep the same shard alone, so shards are placed over failure domains first and over the
ranks inside them second. Domains are put in circles; the shards of a domain are kept by the next `copies` domains of
its circle. A circle of `copies + 1` domains is a group, where everyone keeps everyone's shards: of all placements it
survives the most. Where groups do not divide the domains evenly, the last circle is longer and is called a ring.

A shard is lost when its domain and the `copies` domains behind it in the circle are lost, so a circle survives when no
`copies + 1` domains in a row are gone. That is counted exactly, see `Placement.survival`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import comb
from typing import NamedTuple

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.options import FailureDomain

Circle = tuple[str, ...]


class PlacementRow(NamedTuple):
    """One shard of a placement, for printing.

    Args:
        shard: index of the shard.
        writer: rank that writes it and keeps the first copy; equal to `shard`.
        keepers: ranks that keep a further copy.
        domains: failure domains that hold a copy, the writer's first.
    """

    shard: int
    writer: int
    keepers: tuple[int, ...]
    domains: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Who keeps what.

    Args:
        keepers: for each shard the ranks, beyond its writer, that keep a copy.
        domains: failure domain of each rank.
        circles: the domains, in the circles that keep each other's shards.
        copies: replicas of each shard beyond the writer's own; 0 where a single domain leaves no other place.
        reason: what was placed and what it survives, in a sentence.
    """

    keepers: tuple[tuple[int, ...], ...]
    domains: tuple[str, ...]
    circles: tuple[Circle, ...]
    copies: int
    reason: str

    def wards(self, rank: int) -> tuple[int, ...]:
        """Shards that a rank keeps for others."""
        return tuple(shard for shard, keepers in enumerate(self.keepers) if rank in keepers)

    def survival(self, losses: int) -> float:
        """Probability that every shard still has a copy when this many domains, drawn evenly, are lost at once.

        Raises:
            OptionsError: fewer than 0 or more losses than there are domains.
        """
        most = len(self._survived) - 1
        if not 0 <= losses <= most:
            raise OptionsError(f"survival of {losses} losses: expected 0 to {most}, the number of failure domains")
        return self._survived[losses] / comb(most, losses)

    def rows(self) -> tuple[PlacementRow, ...]:
        """The placement as a table, one row per shard."""
        return tuple(
            PlacementRow(shard, shard, keepers, tuple(self.domains[rank] for rank in (shard, *keepers)))
            for shard, keepers in enumerate(self.keepers)
        )

    @cached_property
    def _survived(self) -> tuple[int, ...]:
        return _survived_sets([len(circle) for circle in self.circles], self.copies)


def place(domains: Sequence[str], copies: int, *, kind: FailureDomain = "node") -> Placement:
    """Choose the keepers of every shard.

    The shard of the i-th rank of a domain is kept by the (i mod size)-th rank of each domain that keeps it.

    Args:
        domains: name of each rank's failure domain.
        copies: replicas of each shard beyond the writer's own.
        kind: what a failure domain is, for the wording.

    Raises:
        OptionsError: there are several domains, but too few for so many copies.
    """
    assert domains, "a placement needs at least one rank"
    assert copies >= 0, copies
    names = tuple(dict.fromkeys(domains))
    if 1 < len(names) <= copies:
        raise OptionsError(_too_few(len(domains), len(names), copies, kind))
    placed = copies if len(names) > 1 else 0
    circles = _circles(names, placed + 1)
    keepers = _keepers(domains, circles, placed)
    survived = _survived_sets([len(circle) for circle in circles], placed)
    reason = _reason(len(domains), circles, survived, copies, kind)
    return Placement(keepers, tuple(domains), circles, placed, reason)


def _circles(names: tuple[str, ...], group_size: int) -> tuple[Circle, ...]:
    group_count, rest = divmod(len(names), group_size)
    if rest:
        group_count -= 1
    ring_start = group_count * group_size
    groups = tuple(names[start : start + group_size] for start in range(0, ring_start, group_size))
    return (*groups, names[ring_start:]) if rest else groups


def _keepers(domains: Sequence[str], circles: Sequence[Circle], copies: int) -> tuple[tuple[int, ...], ...]:
    ranks: dict[str, list[int]] = {}
    for rank, domain in enumerate(domains):
        ranks.setdefault(domain, []).append(rank)
    keepers: list[tuple[int, ...]] = [()] * len(domains)
    for circle in circles:
        for position, domain in enumerate(circle):
            others = [circle[(position + step) % len(circle)] for step in range(1, copies + 1)]
            for index, rank in enumerate(ranks[domain]):
                keepers[rank] = tuple(ranks[other][index % len(ranks[other])] for other in others)
    return tuple(keepers)


def _survived_sets(circle_sizes: Sequence[int], copies: int) -> tuple[int, ...]:
    """For each k, how many of the sets of k lost domains leave every shard a copy.

    Circles fail independently of each other, so the counts multiply like polynomials in k.
    """
    return reduce(_product, (_survived_in_circle(size, copies + 1) for size in circle_sizes), (1,))


def _survived_in_circle(size: int, run: int) -> tuple[int, ...]:
    """For each k, the ways to lose k of `size` domains in a circle without `run` neighbours among them.

    The z = size - k domains left cut the circle into z gaps that hold k losses, each gap fewer than `run`:
    inclusion and exclusion over the gaps that hold too many. Each set is counted once per gap that can come first.
    """
    counts = []
    for lost in range(size):
        left = size - lost
        ways = sum(
            (-1) ** full * comb(left, full) * comb(lost - full * run + left - 1, left - 1)
            for full in range(lost // run + 1)
        )
        counts.append(size * ways // left)
    return (*counts, 0)


def _product(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    product = [0] * (len(a) + len(b) - 1)
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            product[i + j] += left * right
    return tuple(product)


def _reason(shards: int, circles: Sequence[Circle], survived: Sequence[int], copies: int, kind: str) -> str:
    count = len(survived) - 1
    if count == 1 and copies:
        return (
            f"{_counted(shards, 'shard')}, 1 copy each on 1 {kind}: a {kind} loss is not covered "
            f"(copies={copies} takes {copies + 1} {kind}s)"
        )
    if not copies:
        return f"{_counted(shards, 'shard')}, 1 copy each over {_counted(count, kind)}: no {kind} loss is survived"
    beyond = copies + 1
    odds = survived[beyond] / comb(count, beyond)
    covered = f"any 1 {kind} loss is survived" if copies == 1 else f"any {copies} {kind} losses at once are survived"
    return (
        f"{_counted(shards, 'shard')}, {beyond} copies each over {count} {kind}s in {_shape(circles, beyond)}: "
        f"{covered}, {beyond} at once with probability {odds:.3f}"
    )


def _shape(circles: Sequence[Circle], group_size: int) -> str:
    groups = [f"groups of {group_size}"] if any(len(circle) == group_size for circle in circles) else []
    rings = [f"a ring of {len(circle)}" for circle in circles if len(circle) > group_size]
    return " and ".join(groups + rings)


def _too_few(ranks: int, found: int, copies: int, kind: str) -> str:
    return (
        f"copies={copies} takes {copies + 1} {kind}s (the writer's own and {copies} more), "
        f"but the {ranks} ranks are on {found}: set copies={found - 1} or add {_counted(copies + 1 - found, kind)}"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
