"""Draw the plots of docs/benchmarks.md from the dated files in benchmarks/results: `python -m benchmarks.plots`.

After a new measurement, put its tables into a new dated file, name the file below, and draw again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from math import ceil, floor, log2, log10

from benchmarks.harness.machine import ROOT

RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
WIDTH, LABELS, VALUES, BAR, GAP, TOP = 1000, 440, 70, 17, 11, 66
COLORS = ("#5b7ba6", "#c98b3b", "#6f9c68", "#a35d5d", "#8a7bb0", "#666666")
PHASES = ("detect", "abort", "regroup", "restore", "replay")

Row = dict[str, str]
Bars = list[tuple[str, Sequence[float]]]
"""Labels, and the values of each series."""


def rows_of(file: str, title: str) -> list[Row]:
    """Return the rows of the table below a title; of several columns with the same head the first one counts."""
    text = (RESULTS / f"{file}.md").read_text()
    lines = text[text.index(f"**{title}") :].partition("\n|")[2].partition("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(reversed([*zip(head, row, strict=True)])) for row in rows]


@dataclass(frozen=True)
class Plot:
    """Horizontal bars.

    Args:
        name: name of the image.
        title: title, with the unit.
        series: names of the series; none for a single one.
        bars: bars, from top to bottom.
        form: format of the values.
        stacked: whether the values of a bar add up, instead of lying below each other.
    """

    name: str
    title: str
    series: tuple[str, ...]
    bars: Bars
    form: str = ".2f"
    stacked: bool = False

    def svg(self) -> str:
        """Return the image."""
        values = [sum(v) if self.stacked else max(v) for _, v in self.bars]
        scale = (WIDTH - LABELS - VALUES) / max(values)
        parts, y = [], TOP
        for label, numbers in self.bars:
            depth = BAR * (1 if self.stacked else len(numbers))
            parts.append(_text(LABELS - 12, y + depth / 2 + 4, label, "e"))
            begins = [0.0, *accumulate(numbers)] if self.stacked else [0.0] * len(numbers)
            for index, number in enumerate(numbers):
                top = y + (0 if self.stacked else index * BAR)
                x, width = LABELS + begins[index] * scale, max(0.5, number * scale)
                color = COLORS[index]
                parts.append(f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{BAR - 2}" fill="{color}"/>')
                if not self.stacked:
                    parts.append(_text(x + width + 6, top + 12, f"{number:{self.form}}"))
            if self.stacked:
                parts.append(_text(LABELS + sum(numbers) * scale + 6, y + 12, f"{sum(numbers):{self.form}}"))
            y += depth + GAP
        legend = _legend(self.series)
        return "\n".join([*_head(self.title, y + 8), *legend, *parts, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Curves:
    """Curves over the number of ranks, both axes logarithmic.

    Args:
        name: name of the image.
        title: title, with the unit.
        curves: the points of each series, by its name.
    """

    name: str
    title: str
    curves: dict[str, list[tuple[int, float]]]

    def svg(self) -> str:
        """Return the image."""
        points = [point for curve in self.curves.values() for point in curve]
        ranks = sorted({x for x, _ in points})
        low, high = floor(log10(min(y for _, y in points))), ceil(log10(max(y for _, y in points)))
        left, right, top, bottom = 90, WIDTH - 330, TOP, TOP + 60 * (high - low)

        def place(x: float, y: float) -> tuple[float, float]:
            across = log2(x / ranks[0]) / log2(ranks[-1] / ranks[0])
            return left + across * (right - left), bottom - (log10(y) - low) / (high - low) * (bottom - top)

        parts = ["<style>.m { text-anchor: middle; }</style>"]
        for power in range(low, high + 1):
            _, y = place(ranks[0], 10.0**power)
            parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#ddd"/>')
            parts.append(_text(left - 10, y + 4, f"{10.0**power:g}", "e"))
        parts += [_text(place(x, 10.0**low)[0], bottom + 20, str(x), "m") for x in ranks]
        parts.append(_text((left + right) / 2, bottom + 42, "ranks", "m"))
        for number, (color, (name, curve)) in enumerate(zip(COLORS, self.curves.items(), strict=False)):
            path = "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in curve)
            parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2.5"/>')
            y = top + 20 * number
            parts.append(f'<rect x="{right + 24}" y="{y}" width="12" height="12" fill="{color}"/>')
            parts.append(_text(right + 42, y + 10, name))
        return "\n".join([*_head(self.title, bottom + 56), *parts, "</svg>"]) + "\n"


def _head(title: str, height: float) -> list[str]:
    font = 'font-family="DejaVu Sans, Verdana, sans-serif" font-size="12" fill="#222"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" {font}>',
        f"  <title>{escape(title)}</title>",
        "  <style>.e { text-anchor: end; } .b { font-weight: bold; }</style>",
        f'  <rect width="{WIDTH}" height="{height:.0f}" rx="8" fill="#fff"/>',
        "  " + _text(24, 28, title, "b"),
    ]


def _legend(series: Sequence[str]) -> list[str]:
    parts, x = [], LABELS
    for color, name in zip(COLORS, series, strict=False):
        parts.append(f'<rect x="{x}" y="40" width="12" height="12" fill="{color}"/>' + _text(x + 17, 50, name))
        x += 34 + 8 * len(name)
    return parts


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def column(rows: list[Row], label: str, *heads: str) -> Bars:
    return [(row[label], [float(row[head]) for head in heads]) for row in rows]


def projection() -> Curves:
    """Return the curves of the projection to thousands of ranks."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows_of("2026-11-29-scale", "One rank of a large world"):
        curves.setdefault(row["part"], []).append((int(row["ranks"]), float(row["total s"])))
    return Curves("bench-scale", "One rank of a large world, real decisions and modelled messages, s", curves)


def plots() -> list[Plot]:
    """Return the plots of the page."""
    recovery = rows_of("2026-11-25-recovery", "SIGKILL of one of 4 ranks")
    others = rows_of("2026-11-26-recovery-other-tools", "SIGKILL of one of 4 ranks")
    steps = rows_of("2026-11-25-steady-state", "Step time")[:16]
    cost: Bars = [
        (f"{ddp['model']}, batch {ddp['batch']}", [float(ddp["step ms"]), float(ours["step ms"])])
        for ddp, ours in zip(steps[::2], steps[1::2], strict=True)
    ]
    versions = rows_of("2026-11-26-sharded", "One version, and one async_save")
    sizes = [(f"{row['model']}, {row['strategy']}, {row['ranks']} ranks", row) for row in versions]
    on_disk: Bars = [(name, [float(row["committed ms"]), float(row["on disk after ms"])]) for name, row in sizes]
    phases = column(rows_of("2026-11-26-growth", "Phases"), "how", *PHASES)
    starts = rows_of("2026-11-25-cold-start", "Command to the first optimizer step")
    to_all, spread = "SIGKILL of one of 4 ranks to the first step finished by all", ("p50 s", "p95 s")
    return [
        Plot("bench-recovery", f"{to_all}, s", spread, column(recovery, "how", *spread)),
        Plot("bench-other-tools", f"{to_all}, compared with other tools, s", spread, column(others, "how", *spread)),
        Plot("bench-steady-state", "Step of two CPU ranks, ms", ("ddp", "ckptless"), cost, ".0f"),
        Plot("bench-sharded", "From a version to its copies, and to a file of async_save, ms",
             ("version committed", "async_save on disk"), on_disk, ".0f"),
        Plot("bench-growth", "Recovery in place with a standby, on two cores, s", PHASES, phases, stacked=True),
        Plot("bench-cold-start", "Command to the first optimizer step of two ranks, s", (),
             column(starts, "launcher, strategy", "p50 s")),
    ]  # fmt: skip


def main() -> None:
    drawn: list[Plot | Curves] = [*plots(), projection()]
    for plot in drawn:
        (IMAGES / f"{plot.name}.svg").write_text(plot.svg())
        print(f"docs/images/{plot.name}.svg")


if __name__ == "__main__":
    main()
