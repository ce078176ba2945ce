"""Draw the plots of the documentation from the dated files in benchmarks/results: `python -m benchmarks.plots`.

After a new measurement, put its tables into a new dated file, name the file below, and draw again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.harness.processes import ROOT

RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
COLORS = ("#5b7ba6", "#c98b3b", "#6f9c68", "#a35d5d", "#8a7bb0", "#666666")
STYLE: dict[Any, Any] = {
    "font.size": 8, "svg.hashsalt": "0", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "svg.fonttype": "none", "axes.titlelocation": "left", "axes.titlesize": 9, "axes.titleweight": "bold",
}  # fmt: skip
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


def column(rows: list[Row], label: str, *heads: str) -> Bars:
    return [(row[label], [float(row[head]) for head in heads]) for row in rows]


@contextmanager
def image(name: str, width: float, height: float) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure and its axes, and write it as an image that does not depend on the time."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


def bars(
    name: str, title: str, series: Sequence[str], found: Bars, form: str = "%.2f", *, stacked: bool = False
) -> None:
    """Draw horizontal bars, from top to bottom; the values of a bar add up, or lie below each other."""
    count = 1 if stacked else len(series)
    thickness, left = 0.85 / count, [0.0] * len(found)
    with image(name, 10, 1.1 + 0.17 * len(found) * count + 0.11 * len(found)) as (figure, ax):
        for index, values in enumerate(zip(*(values for _, values in found), strict=True)):
            places = [place + (0 if stacked else index * thickness) for place in range(len(found))]
            drawn = ax.barh(places, values, 0.9 * thickness, left, color=COLORS[index], label=series[index])
            left = [a + b for a, b in zip(left, values, strict=True)] if stacked else left
            if not stacked or index == len(series) - 1:
                ax.bar_label(drawn, [form % value for value in (left if stacked else values)], padding=4)
        middle = (count - 1) / 2 * thickness
        ax.set_yticks([place + middle for place in range(len(found))], [label for label, _ in found])
        ax.invert_yaxis()
        ax.set_title(title)
        if len(series) > 1:
            figure.legend(loc="outside right upper")


def draw_recoveries() -> None:
    """Draw recoveries by kind, by tool, and by number of ranks."""
    to_all, spread = "SIGKILL of one of 4 ranks to the first step finished by all", ("p50 s", "p95 s")
    ours = rows_of("2026-11-25-recovery", "SIGKILL of one of 4 ranks")
    others = rows_of("2026-11-26-recovery-other-tools", "SIGKILL of one of 4 ranks")
    phases = column(rows_of("2026-11-26-growth", "Phases"), "how", *PHASES)
    bars("bench-recovery", f"{to_all}, s", spread, column(ours, "how", *spread))
    bars("bench-other-tools", f"{to_all}, compared with other tools, s", spread, column(others, "how", *spread))
    bars("bench-growth", "Recovery in place with a standby, on two cores, s", PHASES, phases, stacked=True)


def draw_costs() -> None:
    """Draw what a version costs, and what a start takes."""
    steps = rows_of("2026-11-25-steady-state", "Step time")[:16]
    cost: Bars = [
        (f"{ddp['model']}, batch {ddp['batch']}", [float(ddp["step ms"]), float(ours["step ms"])])
        for ddp, ours in zip(steps[::2], steps[1::2], strict=True)
    ]
    bars("bench-steady-state", "Step of two CPU ranks, ms", ("ddp", "ckptless"), cost, "%.0f")
    on_disk: Bars = [
        (
            f"{row['model']}, {row['strategy']}, {row['ranks']} ranks",
            [float(row["committed ms"]), float(row["on disk after ms"])],
        )
        for row in rows_of("2026-11-26-sharded", "One version, and one async_save")
    ]
    kinds = ("version committed", "async_save on disk")
    bars("bench-sharded", "From a version to its copies, and to a file of async_save, ms", kinds, on_disk, "%.0f")
    starts = rows_of("2026-11-25-cold-start", "Command to the first optimizer step")
    first = "Command to the first optimizer step of two ranks, s"
    bars("bench-cold-start", first, ("p50 s",), column(starts, "launcher, strategy", "p50 s"))


def draw_scale() -> None:
    """Draw the parts of the protocol over the number of ranks, both axes logarithmic."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows_of("2026-11-29-scale", "One rank of a large world"):
        found.setdefault(row["part"], []).append((int(row["ranks"]), float(row["total s"])))
    with image("bench-scale", 10, 5) as (figure, ax):
        for color, (label, points) in zip(COLORS, found.items(), strict=False):
            ax.plot(*zip(*points, strict=True), color=color, label=label, linewidth=2)
        ranks = [ranks for ranks, _ in next(iter(found.values()))]
        title = "One rank of a large world, real decisions and modelled messages, s"
        ax.set(xscale="log", yscale="log", xlabel="ranks", title=title)
        ax.set_xticks(ranks, map(str, ranks), minor=False)
        ax.minorticks_off()
        ax.grid(axis="y", color="#dddddd")
        figure.legend(loc="outside right upper")


def draw_goodput() -> None:
    """Draw the measured goodput of jobs over the forecast for the same failures."""
    rows = rows_of("2026-11-29-goodput", "Goodput from the first batch to the last")
    with image("goodput", 5.5, 5) as (_, ax):
        ax.plot([0, 100], [0, 100], color="#999999", linewidth=0.8)
        for model, marker, color in zip(dict.fromkeys(row["failures"] for row in rows), "os^", COLORS, strict=False):
            of_model = [row for row in rows if row["failures"] == model]
            heads = ("forecast for these failures", "measured")
            points = ([float(row[head].rstrip("%")) for row in of_model] for head in heads)
            ax.plot(*points, marker, color=color, label=model, markersize=5)
        ax.set(xlabel="forecast goodput, %", ylabel="measured goodput, %", xlim=(0, 100), ylim=(0, 100), aspect="equal")
        ax.legend()


if __name__ == "__main__":
    draw_recoveries()
    draw_costs()
    draw_scale()
    draw_goodput()
