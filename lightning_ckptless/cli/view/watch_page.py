"""Renders a run as a page: HTML and SVG without further files. A few lines of script replace its content regularly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from lightning_ckptless.cli.survey.history import History
from lightning_ckptless.cli.survey.members import Member
from lightning_ckptless.cli.survey.survey import Survey
from lightning_ckptless.cli.view.buckets import as_duration
from lightning_ckptless.cli.view.html import (
    bucket_bar,
    document,
    facts_list,
    recoveries_table,
    row,
    section,
    table,
    waits_table,
)
from lightning_ckptless.cli.view.watch import slowest_first
from lightning_ckptless.cli.web.heatmap import Cell, Heatmap, Row

REFRESH_MS = 500
_MOST_MEMBERS = 64
_WIDTH, _HEIGHT = 1000, 160

_SCRIPT = """
async function refresh() {
  try {
    const answer = await fetch("content", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status);
    document.querySelector("main").innerHTML = await answer.text();
    document.body.classList.remove("stale");
  } catch { document.body.classList.add("stale"); }
  setTimeout(refresh, EVERY);
}
setTimeout(refresh, EVERY);
"""


def watch_page(found: Survey, history: History, heat: Heatmap) -> str:
    """Return the whole page; the arguments are those of `content`."""
    script = _SCRIPT.replace("EVERY", str(REFRESH_MS))
    return document(
        found.run_id,
        '<p id="stale">No answer from <code>ckptless watch</code>: the state below is the last one that was read.</p>\n'
        f"<main>{content(found, history, heat)}</main>\n<script>{script}</script>",
    )


def content(found: Survey, history: History, heat: Heatmap) -> str:
    """Return what changes on the page.

    Args:
        found: status of the run.
        history: its events.
        heat: ranks by steps.
    """
    return "\n".join(
        (
            _head(found),
            section("Ranks, slowest first", _members(found)),
            section("Own time per step, by rank and step", _heatmap(heat)),
            section("Steps over time", _timeline(history)),
            section("Time of the run, by what it was spent on", bucket_bar(found.time_s)),
            section("What ranks kept the others waiting for", waits_table(found.ranks)),
            section("Tiers", _tiers(found)),
            section("Last recoveries", _recoveries(found)),
        )
    )


def _head(found: Survey) -> str:
    pace, at = found.pace, time.strftime("%H:%M:%S", time.localtime(found.at))
    of = f" of {pace.of:,}" if pace.of else ""
    facts = {
        "generation": "none yet" if found.generation is None else str(found.generation),
        "ranks": str(found.world_size or len(found.members)),
        "step": "none yet" if pace.step is None else f"{pace.step:,}{of}",
        "steps/s": "" if pace.steps_per_s is None else f"{pace.steps_per_s:.3g}",
        "time left": "" if pace.eta_s is None else as_duration(pace.eta_s),
        "standbys": "" if found.standbys is None else str(found.standbys),
        "recoveries": str(found.recovery_count),
        "goodput": "" if found.goodput is None else f"{found.goodput:.1%}",
    }
    alarms = "".join(
        f'<p class="alarm" data-kind="{alarm.kind}" data-rank="{"" if alarm.rank is None else alarm.rank}">'
        f"{escape(alarm.text)}</p>"
        for alarm in found.alarms
    )
    return (
        f'<h1>{escape(found.run_id)} <span class="state" id="state">{found.state}</span> '
        f'<span class="soft">{at}</span></h1>\n'
        f'<p id="protected">{escape(found.protected.text)}</p>\n<div id="alarms">{alarms}</div>\n{facts_list(facts)}'
    )


def _members(found: Survey) -> str:
    if not found.members:
        return ""
    faulty = {alarm.rank for alarm in found.alarms}
    shown = slowest_first(found.members)[:_MOST_MEMBERS]
    rows = (row("td", _cells(member), "bad" if member.rank in faulty else "") for member in shown)
    left = len(found.members) - len(shown)
    more = f'<p class="soft">and {left} more ranks, all faster</p>' if left else ""
    head = row("th", ("rank", "node", "pid", "state", "step", "at", "last progress", "own time per step"))
    return f'<table id="members">{head}{"".join(rows)}</table>{more}'


def _cells(member: Member) -> tuple[str, ...]:
    return (
        str(member.rank),
        member.node,
        str(member.pid),
        member.state,
        "" if member.step is None else f"{member.step:,}",
        member.point,
        "" if member.progress_age_s is None else f"{member.progress_age_s:.1f} s ago",
        "" if member.step_s is None else f"{1e3 * member.step_s:.1f} ms",
    )


def _tiers(found: Survey) -> str:
    rows = [
        (
            tier.name,
            "" if tier.step is None else f"{tier.step:,}",
            "" if tier.lag_steps is None else f"{tier.lag_steps:,}",
            "" if tier.age_s is None else as_duration(tier.age_s),
            tier.place,
        )
        for tier in found.tiers
    ]
    return table("tiers", ("tier", "newest step", "steps behind", "age", "place"), rows)


def _recoveries(found: Survey) -> str:
    shown = [(f"{as_duration(max(0.0, found.at - facts['at']))} ago", facts) for facts in reversed(found.recoveries)]
    return recoveries_table(shown)


# ---------------------------------------------------------------------- pictures


def _heatmap(heat: Heatmap) -> str:
    """Return the heatmap: light is the fastest rank of the step, dark three times as long or more."""
    rows, steps = heat.rows(), heat.steps
    if not rows:
        return ""
    cell, left = max(4.0, min(16.0, (_WIDTH - 60) / len(steps))), 50
    tall = max(6, min(18, 400 // len(rows)))
    fastest = [_fastest(rows, column) for column in range(len(steps))]
    drawn = []
    for place, of_rank in enumerate(rows):
        drawn.append(f'<text x="{left - 6}" y="{(place + 0.75) * tall:.0f}" text-anchor="end">{of_rank.rank}</text>')
        for column, found in enumerate(of_rank.cells):
            if found is not None:
                where = (
                    f'x="{left + column * cell:.1f}" y="{place * tall}" width="{cell - 0.5:.1f}" height="{tall - 1}"'
                )
                drawn.append(_heat_cell(where, of_rank.rank, steps[column], found, fastest[column]))
    below = len(rows) * tall
    ends = f'<text x="{left}" y="{below + 14}">step {steps[0]:,}</text>'
    if len(steps) > 1:
        ends += f'<text x="{left + len(steps) * cell:.0f}" y="{below + 14}" text-anchor="end">{steps[-1]:,}</text>'
    return f'<svg id="heatmap" viewBox="0 0 {_WIDTH} {below + 18}">{"".join(drawn)}{ends}</svg>'


def _fastest(rows: Sequence[Row], column: int) -> float:
    known = [row.cells[column] for row in rows]
    return min((found.step_s for found in known if found is not None and found.step_s), default=0.0)


def _heat_cell(where: str, rank: int, step: int, found: Cell, fastest_s: float) -> str:
    own = "unknown" if found.step_s is None else f"{1e3 * found.step_s:.1f} ms"
    title = f"rank {rank}, step {step:,}: {own}, {found.state}"
    if found.state not in {"running", "elsewhere"}:
        colour = "#cc3311"
    elif found.step_s is None or not fastest_s:
        colour = "#bbbbbb"
    else:
        share = min(1.0, (found.step_s / fastest_s - 1.0) / 2.0)
        colour = f"hsl(205 70% {88 - 58 * share:.0f}%)"
    return f'<rect {where} fill="{colour}" data-rank="{rank}" data-step="{step}"><title>{escape(title)}</title></rect>'


def _timeline(history: History) -> str:
    """Return the committed steps over the last minutes, with the recoveries among them."""
    points = list(history.steps)
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return ""
    (began_at, _), (ended_at, _) = points[0], points[-1]
    lowest, highest = min(step for _, step in points), max(step for _, step in points)

    def x(at: float) -> float:
        return 50 + (_WIDTH - 60) * (min(max(at, began_at), ended_at) - began_at) / (ended_at - began_at)

    def y(step: int) -> float:
        return 10 + (_HEIGHT - 40) * (1 - (step - lowest) / max(1, highest - lowest))

    line = " ".join(f"{x(at):.1f},{y(step):.1f}" for at, step in points)
    bands = []
    for event in history.recoveries:
        start, end = event.at - event.fields["total_s"], event.at
        if end >= began_at:
            title = escape(f"{event.fields['cause']}: {event.fields['total_s']:.2f} s")
            bands.append(
                f'<rect class="recovery" x="{x(start):.1f}" y="5" width="{max(2.0, x(end) - x(start)):.1f}" '
                f'height="{_HEIGHT - 30}" fill="#cc3311" opacity=".35"><title>{title}</title></rect>'
            )
    return (
        f'<svg id="timeline" viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(bands)}'
        f'<polyline points="{line}" fill="none" stroke="#0077bb" stroke-width="2"/>'
        f'<text x="44" y="18" text-anchor="end">{highest:,}</text>'
        f'<text x="44" y="{_HEIGHT - 28}" text-anchor="end">{lowest:,}</text>'
        f'<text x="50" y="{_HEIGHT - 8}">{as_duration(ended_at - began_at)} ago</text>'
        f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 8}" text-anchor="end">last commit</text></svg>'
    )
