"""Draws a run with matplotlib: steps and goodput over time, and the phases of each recovery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_ckptless.cli.view.timeline import Timeline
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.phases import PHASES

# A palette that is distinguishable with most kinds of colour blindness.
PHASE_COLOURS = dict(zip(PHASES, ("#cc3311", "#ee7733", "#ddaa33", "#33bbee", "#0077bb", "#bbbbbb"), strict=True))
_INK, _STEPS, _FAULT, _GRID = "#22272e", "#004488", "#cc3311", "#e4e7eb"
_ROW_INCHES = 0.34


def draw(timeline: Timeline, target: Path | Any, format_name: str) -> None:
    """Draw a timeline.

    Args:
        timeline: timeline of the run.
        target: path, or file opened for writing bytes.
        format_name: `png` or `svg`.

    Raises:
        OptionsError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise OptionsError(f"drawing a timeline requires matplotlib: pip install matplotlib ({error})") from error

    rows = max(1, len(timeline.recoveries))
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.edgecolor": _GRID,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "svg.hashsalt": "0",
    }
    with rc_context(style):
        heights = [3.0, 1.3, _ROW_INCHES * (rows + 1)]
        figure = Figure(figsize=(11, sum(heights) + 1.9), layout="constrained")
        axes = figure.subplots(3, 1, height_ratios=heights)
        figure.suptitle(_title(timeline), x=0.01, ha="left", fontsize=12, fontweight="bold")
        _draw_steps(axes[0], timeline)
        _draw_goodput(axes[1], timeline)
        _draw_recoveries(axes[2], timeline)
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(color=_GRID, labelcolor=_INK)
        # Omit date and program, so that the same run always gives the same file.
        metadata = {"Software": None} if format_name == "png" else {"Date": None, "Creator": None}
        figure.savefig(target, format=format_name, dpi=150, metadata=metadata)


def _title(timeline: Timeline) -> str:
    parts = [f"{timeline.last_step} steps in {timeline.wall_s:.1f} s", f"{len(timeline.recoveries)} recoveries"]
    if timeline.time.is_known:
        parts.append(f"goodput {timeline.time.account.goodput:.1%}")
    return f"{timeline.run_id}:  {',  '.join(parts)}"


def _draw_steps(ax: Any, timeline: Timeline) -> None:
    for span in timeline.recoveries:
        ax.axvspan(span.began_at, span.ended_at, color=_FAULT, alpha=0.15, linewidth=0)
    for steps in timeline.by_generation.values():
        ax.plot([s.at for s in steps], [s.step for s in steps], color=_STEPS, linewidth=1.8, marker=".", markersize=3)
    for number, fault in enumerate(timeline.faults):
        ax.axvline(fault.at, color=_FAULT, linewidth=1, linestyle=(0, (3, 2)))
        # Alternate heights, so that labels of faults close together stay legible.
        height = 0.97 - 0.09 * (number % 4)
        ax.annotate(
            fault.text,
            (fault.at, height),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color=_FAULT,
            fontsize=8,
            va="top",
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
        )
    ax.set(xlim=(0, timeline.wall_s), ylabel="optimizer step")
    ax.set_ylim(bottom=0)
    ax.grid(color=_GRID, linewidth=0.6)
    ax.tick_params(labelbottom=False)


def _draw_goodput(ax: Any, timeline: Timeline) -> None:
    instants = [instant for instant, _ in timeline.time.curve]
    shares = [100 * share for _, share in timeline.time.curve]
    ax.fill_between(instants, shares, color=_STEPS, alpha=0.15, linewidth=0)
    ax.plot(instants, shares, color=_STEPS, linewidth=1.4)
    for fault in timeline.faults:
        ax.axvline(fault.at, color=_FAULT, linewidth=1, linestyle=(0, (3, 2)))
    ax.set(xlim=(0, timeline.wall_s), ylim=(0, 105), ylabel="goodput so far, %", xlabel="seconds since the run began")
    ax.grid(color=_GRID, linewidth=0.6)


def _draw_recoveries(ax: Any, timeline: Timeline) -> None:
    if not timeline.recoveries:
        ax.text(0.5, 0.5, "no recoveries", ha="center", va="center", transform=ax.transAxes)
        ax.set(xticks=[], yticks=[])
        return
    longest_s = max(span.total_s for span in timeline.recoveries)
    rows = range(len(timeline.recoveries))
    left = [0.0] * len(timeline.recoveries)
    for name in PHASES:
        widths = [1e3 * span.phases[name] for span in timeline.recoveries]
        ax.barh(rows, widths, left=left, height=0.62, color=PHASE_COLOURS[name], label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, span in zip(rows, timeline.recoveries, strict=True):
        label = f"  {1e3 * span.total_s:.0f} ms   {span.text}"
        ax.text(1e3 * span.total_s, row, label, va="center", fontsize=8)
    # Leave room for the labels next to the bars.
    ax.set(xlim=(0, 2200 * longest_s), xlabel="recoveries: milliseconds since the fault", yticks=list(rows))
    ax.set_yticklabels([f"{span.began_at:.1f} s" for span in timeline.recoveries])
    ax.set_ylim(len(timeline.recoveries) - 0.4, -0.6)
    ax.legend(ncols=len(PHASES), loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
