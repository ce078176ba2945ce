"""A placement as a readable table: which ranks keep which shard, and which simultaneous losses it survives.

The table stays short for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_ckptless.protocol.placement import Placement

MOST_ROWS = 16
HEAD = ("shard", "writer", "holders", "domains", "bytes")
LOSSES_HEAD = ("lost at once", "survived", "except for")
_MOST_FATAL = 4
_LEAST_SLOTS = 2
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class PlacementTable:
    """The rows that are shown of a placement.

    Args:
        rows: one row for each shard that is shown, with the columns of `HEAD`.
        more: summary of the omitted rows; empty if there are none.
        losses: one row for each number of simultaneously lost domains, with the columns of `LOSSES_HEAD`.
    """

    rows: tuple[tuple[str, ...], ...]
    more: str
    losses: tuple[tuple[str, ...], ...]

    def lines(self) -> list[str]:
        """The tables as text."""
        shown = _aligned([HEAD, *self.rows])
        return [*shown, *([self.more] if self.more else []), *_aligned([LOSSES_HEAD, *self.losses])]


def table_of(
    placement: Placement,
    sizes_bytes: Sequence[int],
    *,
    kind: str = "domain",
    most_rows: int = MOST_ROWS,
    slots: int = _LEAST_SLOTS,
) -> PlacementTable:
    """Build the table of a placement.

    Args:
        placement: the placement.
        sizes_bytes: size of each shard.
        kind: noun for a failure domain, e.g. `node`.
        most_rows: maximum number of shards to list.
        slots: number of slots of each replica; those beyond two hold the history.
    """
    rows = tuple(
        (
            str(row.shard),
            f"rank {row.writer}",
            ", ".join(f"rank {holder}" for holder in row.holders) or "none",
            ", ".join(row.domains),
            as_size(sizes_bytes[row.shard]),
        )
        for row in placement.rows()[:most_rows]
    )
    left = len(placement.holders) - len(rows)
    copies_bytes = sum(sizes_bytes) * (placement.copies + 1)
    more = f"and {left} more shards; all copies take {as_size(copies_bytes)}, twice that for two slots" if left else ""
    if slots > _LEAST_SLOTS:
        first = f"and {left} more shards; " if left else ""
        more = (
            f"{first}all copies take {as_size(copies_bytes)}, and {slots} times that, {as_size(slots * copies_bytes)}, "
            f"with a history of {slots - _LEAST_SLOTS}"
        )
    return PlacementTable(rows, more, _losses(placement, kind))


def _losses(placement: Placement, kind: str) -> tuple[tuple[str, ...], ...]:
    rows = []
    for losses in range(1, min(placement.copies + 2, len(set(placement.domains))) + 1):
        odds = placement.survival_probability(losses)
        survived = "always" if odds == 1 else "never" if not odds else f"with probability {odds:.3f}"
        fatal = placement.fatal_losses() if 0 < odds < 1 and losses == placement.copies + 1 else ()
        shown = ", ".join(" + ".join(names) for names in fatal[:_MOST_FATAL])
        more = f" and {len(fatal) - _MOST_FATAL} more" if len(fatal) > _MOST_FATAL else ""
        rows.append((f"any {losses} {kind}{'s' if losses > 1 else ''}", survived, shown + more))
    return tuple(rows)


def as_size(count: float) -> str:
    """Format a number of bytes with a decimal unit."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == _UNITS[0] else f"{count:.1f} {unit}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
