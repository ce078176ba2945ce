"""Parts of HTML pages, shared by the live page and the report of a finished run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lightning_ckptless.cli.time_spent import RankTime
from lightning_ckptless.cli.view.buckets import as_duration
from lightning_ckptless.cli.view.drawing import PHASE_COLOURS
from lightning_ckptless.protocol.phases import PHASES

_COLOURS = ("#cc3311", "#ee7733", "#ddaa33", "#33bbee", "#0077bb", "#bbbbbb", "#009988", "#ee3377")
"""Distinguishable with most kinds of colour blindness."""
_MOST_RANKS = 16

_STYLE = """
:root { color-scheme: light dark; --ink: #22272e; --soft: #667; --line: #e4e7eb; --paper: #fff; --bad: #c31; }
@media (prefers-color-scheme: dark) { :root { --ink: #dde; --soft: #99a; --line: #333a44; --paper: #16191d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
       margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.soft { color: var(--soft); } .state { border-radius: .3rem; padding: .05rem .5rem; border: 1px solid; }
#protected { font-size: 1.15rem; font-weight: 600; margin: .6rem 0; }
.alarm { color: var(--bad); font-weight: 600; margin: .2rem 0; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2.2rem; margin: .8rem 0; }
dt { font-size: .8rem; color: var(--soft); } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid var(--line); text-align: left; font-weight: normal; }
th { color: var(--soft); font-size: .85rem; } tr.bad td { color: var(--bad); font-weight: 600; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.drawing { background: #fff; padding: .4rem; }
#stale { display: none; color: var(--bad); } body.stale #stale { display: block; } body.stale main { opacity: .45; }
i { display: inline-block; width: .7em; height: .7em; margin-right: .35em; }
.bar { display: flex; height: 1.1rem; border-radius: .2rem; overflow: hidden; } .bar span { min-width: 2px; }
ul.legend { list-style: none; padding: 0; margin: .4rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; }
"""


def document(title: str, body: str) -> str:
    """Return a whole page, which refers to nothing outside itself.

    Args:
        title: plain text.
        body: HTML.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a titled section; nothing without a body."""
    return f"<h2>{title}</h2>\n{body}" if body else ""


def facts_list(facts: Mapping[str, str]) -> str:
    """Return names with values; those without a value are left out."""
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items() if value)
    return f"<dl>{listed}</dl>"


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of plain text; nothing without rows."""
    return f'<table id="{name}">{row("th", head)}{"".join(row("td", cells) for cells in rows)}</table>' if rows else ""


def row(tag: str, cells: Iterable[str], kind: str = "") -> str:
    """Return a row of plain text.

    Args:
        tag: `td` or `th`.
        cells: its cells.
        kind: its class, if any.
    """
    of_kind = f' class="{kind}"' if kind else ""
    return f"<tr{of_kind}>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>\n"


def bucket_bar(seconds: Mapping[str, float]) -> str:
    """Return a bar divided by where time went, with a legend; nothing if no time is accounted for.

    Args:
        seconds: seconds by name.
    """
    spent, total_s = {name: s for name, s in seconds.items() if s > 0}, sum(seconds.values())
    colours = dict(zip(spent, (_COLOURS[number % len(_COLOURS)] for number in range(len(spent))), strict=True))
    parts = "".join(
        f'<span style="flex:{s / total_s:.6f};background:{colours[name]}"></span>' for name, s in spent.items()
    )
    legend = "".join(
        f'<li data-bucket="{escape(name)}"><i style="background:{colours[name]}"></i>{escape(name)} {as_duration(s)} '
        f"({s / total_s:.1%})</li>"
        for name, s in spent.items()
    )
    return f'<div class="bar" id="buckets">{parts}</div><ul class="legend">{legend}</ul>' if spent else ""


def recoveries_table(recoveries: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return a table of recoveries, with a bar divided into the phases of each; nothing without any.

    Args:
        recoveries: when, and the fields of the `recovery` event in the ledger.
    """
    if not recoveries:
        return ""
    head = row("th", ("when", "rank", "cause", "how", "resumed from", "took", "phases"))
    longest_s = max(float(fields["total_s"]) for _, fields in recoveries)
    rows = "".join(_recovery(when, fields, longest_s) for when, fields in recoveries)
    legend = "".join(f'<li><i style="background:{PHASE_COLOURS[name]}"></i>{name}</li>' for name in PHASES)
    return f'<table id="recoveries">{head}{rows}</table><ul class="legend">{legend}</ul>'


def _recovery(when: str, fields: Mapping[str, Any], longest_s: float) -> str:
    cells = (
        when,
        "" if fields.get("culprit_rank") is None else str(fields["culprit_rank"]),
        str(fields["cause"]),
        str(fields["rung"]),
        str(fields["version"]),
        as_duration(float(fields["total_s"])),
    )
    spans = "".join(
        f'<span style="width:{100 * spent_s / longest_s:.2f}%;background:{PHASE_COLOURS[name]}" '
        f'title="{name}: {as_duration(spent_s)}"></span>'
        for name in PHASES
        if (spent_s := float(fields["phases"].get(f"{name}_s", 0.0))) > 0
    )
    texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr>{texts}<td style="width:30%"><div class="bar">{spans}</div></td></tr>\n'


def waits_table(ranks: Sequence[RankTime]) -> str:
    """Return a table of what ranks have kept the others waiting for, longest first; nothing without any.

    Args:
        ranks: the ranks, longest first.
    """
    rows = [
        (str(found.rank), as_duration(found.data_wait_s), f"{found.own_ms:.1f} ms", as_duration(found.behind_s))
        for found in ranks[:_MOST_RANKS]
    ]
    head = ("rank", "waited for its data", "own work per batch", "longer than the median rank, in all")
    return table("waits", head, rows)
