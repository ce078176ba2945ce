"""The plan of a placement, for people: who keeps what, and which losses at once are survived.

It has as many lines as a person reads, for four ranks and for a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_ckptless.protocol.placement import Placement

MOST_ROWS = 16
HEAD = ("shard", "writer", "holders", "domains", "bytes")
LOSSES_HEAD = ("lost at once", "survived", "but for")
_MOST_FATAL = 4
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class PlacementTable:
    """What is shown of a placement.

    Args:
        rows: one for each shard that is shown, as `HEAD` has it.
        more: what the rows leave out, in a sentence; empty where they leave out nothing.
        losses: one row for each number of domains lost at once that is worth telling, as `LOSSES_HEAD` has it.
    """

    rows: tuple[tuple[str, ...], ...]
    more: str
    losses: tuple[tuple[str, ...], ...]

    def lines(self) -> list[str]:
        """The tables as text."""
        shown = _aligned([HEAD, *self.rows])
        return [*shown, *([self.more] if self.more else []), *_aligned([LOSSES_HEAD, *self.losses])]


def table_of(
    placement: Placement, sizes_bytes: Sequence[int], *, kind: str = "domain", most_rows: int = MOST_ROWS
) -> PlacementTable:
    """What to show of a placement.

    Args:
        placement: who keeps what.
        sizes_bytes: size of each shard.
        kind: what a failure domain is, in a word.
        most_rows: shards that are shown one by one.
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
    more = f"and {left} shards more; all copies take {as_size(copies_bytes)}, twice for two slots" if left else ""
    return PlacementTable(rows, more, _losses(placement, kind))


def _losses(placement: Placement, kind: str) -> tuple[tuple[str, ...], ...]:
    rows = []
    for losses in range(1, min(placement.copies + 2, len(set(placement.domains))) + 1):
        odds = placement.recovery_loop(losses)
        survived = "always" if odds == 1 else "never" if not odds else f"with probability {odds:.3f}"
        fatal = placement.fatal_losses() if 0 < odds < 1 and losses == placement.copies + 1 else ()
        shown = ", ".join(" + ".join(names) for names in fatal[:_MOST_FATAL])
        more = f" and {len(fatal) - _MOST_FATAL} more" if len(fatal) > _MOST_FATAL else ""
        rows.append((f"any {losses} {kind}{'s' if losses > 1 else ''}", survived, shown + more))
    return tuple(rows)


def as_size(count: float) -> str:
    """A number of bytes, short."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == _UNITS[0] else f"{count:.1f} {unit}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
