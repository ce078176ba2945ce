"""Shows where the time of a run went.

Apart from `watch`, because the names of the buckets are not its subject: any mapping of names to seconds is shown.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text

_COLOURS = ("red", "magenta", "yellow", "cyan", "blue", "white", "green")
_BAR = 24


def buckets(seconds: Mapping[str, float], most: int = 8) -> list[Text]:
    """Return one line per bucket with its share of their sum, the largest first; empty buckets are left out.

    Args:
        seconds: seconds by name.
        most: number of lines.
    """
    total_s = sum(seconds.values())
    spent = sorted(((s, name) for name, s in seconds.items() if s > 0), reverse=True)[:most]
    return [
        Text.assemble(
            f"  {name:<18} {as_duration(s):>10}  {s / total_s:>4.0%}  ",
            ("█" * max(1, round(_BAR * s / total_s)), _COLOURS[number % len(_COLOURS)]),
        )
        for number, (s, name) in enumerate(spent)
    ]


def as_duration(seconds: float) -> str:
    """Format a duration with one or two units."""
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
