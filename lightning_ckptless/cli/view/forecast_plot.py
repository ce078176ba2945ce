"""Draws goodput over the size of the cluster. Apart from the tables of a forecast, because they need no matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_ckptless.protocol.forecast.forecast import Forecast
from lightning_ckptless.protocol.forecast.inputs import Forecastable

# A palette that is distinguishable with most kinds of colour blindness; one colour per scheme.
COLOURS = ("#bbbbbb", "#ee7733", "#33bbee", "#004488")
_INK, _GRID, _POINT = "#22272e", "#e4e7eb", "#cc3311"


def draw_comparison(found: Forecast, what: Forecastable, target: Path) -> None:
    """Draw the expected goodput of all schemes over the size of the cluster, and the simulated job as a point.

    Args:
        found: the forecast.
        what: its inputs.
        target: path of the picture; its suffix is the format.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"font.size": 9, "axes.edgecolor": _GRID, "text.color": _INK, "svg.hashsalt": "0"}
    with rc_context(style):
        figure = Figure(figsize=(9, 5), layout="constrained")
        ax = figure.subplots()
        figure.suptitle("Expected share of productive time", x=0.01, ha="left", fontsize=12, fontweight="bold")
        ax.set_title(what.failures_text, loc="left", fontsize=8, wrap=True)
        for curve, colour in zip(found.comparison.curves, COLOURS, strict=True):
            shares = [100 * share for share in curve.ettr]
            ax.plot(found.comparison.ranks, shares, color=colour, linewidth=1.8, marker=".", label=curve.name)
        expected = found.expected
        spread = [[100 * (expected.ettr - expected.ettr_low)], [100 * (expected.ettr_high - expected.ettr)]]
        ax.errorbar(
            [found.job.cluster.ranks],
            [100 * expected.ettr],
            yerr=spread,
            color=_POINT,
            marker="o",
            capsize=3,
            label="this job, simulated (5 to 95 %)",
        )
        ax.set_xscale("log", base=2)
        ax.set(xlabel="ranks", ylabel="ETTR, %", ylim=(0, 102))
        ax.xaxis.set_major_formatter(lambda ranks, _: f"{ranks:,.0f}")
        ax.grid(color=_GRID, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, loc="lower left")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Omit date and program, so that the same forecast always gives the same file.
        metadata = {"Software": None} if target.suffix == ".png" else {"Date": None, "Creator": None}
        figure.savefig(target, dpi=150, metadata=metadata)
