"""The story of a run as one self-contained HTML page: no scripts, no further files, no network access."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from html import escape

from lightning_ckptless.cli.view.drawing import PHASE_COLOURS, draw
from lightning_ckptless.cli.view.story import Story
from lightning_ckptless.protocol.goodput import PHASES

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22272e; background: #fff; max-width: 72rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; margin: 0 0 1rem; }
dt { font-size: .8rem; color: #667; }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e4e7eb; text-align: right; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
i { display: inline-block; width: .7em; height: .7em; margin-right: .35em; }
"""


def page(story: Story) -> str:
    """Return the HTML page.

    Args:
        story: story of the run.

    Raises:
        OptionsError: matplotlib is not installed.
    """
    account, mtbf = story.time.account, story.time.mtbf
    facts = {
        "steps": str(story.last_step),
        "wall clock": f"{story.wall_s:.1f} s",
        "faults": str(len(story.faults)),
        "recoveries": str(len(story.recoveries)),
        "goodput": f"{account.goodput:.1%}" if story.time.is_known else "unknown",
        "steps replayed": str(story.time.steps_replayed),
        "time between failures": f"{mtbf.mean_s:.3g} s" if mtbf.failures else "no failure",
    }
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    title = f"Run {escape(story.run_id)}"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<dl>{listed}</dl>\n{_picture(story)}\n"
        f"{_buckets(story)}{_recoveries(story)}</body>\n</html>\n"
    )


def _picture(story: Story) -> str:
    drawn = io.BytesIO()
    draw(story, drawn, "svg")
    text = drawn.getvalue().decode()
    # Inline SVG must not have an XML prologue. The metadata refers to vocabularies on the web.
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)


def _buckets(story: Story) -> str:
    if not story.time.is_known:
        return ""
    wall_s = story.time.account.wall_s
    rows = [
        _row("td", [str(bucket), _bar(spent_s / wall_s), f"{spent_s:.2f} s", f"{spent_s / wall_s:.1%}"])
        for bucket, spent_s in story.time.by_size
    ]
    head = _row("th", ["bucket", "", "time", "share"])
    return f"<h2>Where the time went</h2>\n<table>\n{head}{''.join(rows)}</table>\n"


def _bar(share: float) -> str:
    return f'<i style="background:#004488;width:{30 * share:.2f}rem;margin:0"></i>'


def _recoveries(story: Story) -> str:
    if not story.recoveries:
        return ""
    phases = [f'<i style="background:{PHASE_COLOURS[name]}"></i>{name}' for name in PHASES]
    head = _row("th", ["at", "recovery", *phases, "total"])
    rows = []
    for span in story.recoveries:
        times = [f"{1e3 * span.phases[name]:.0f}" for name in PHASES]
        rows.append(_row("td", [f"{span.began_at:.1f} s", escape(span.text), *times, f"{1e3 * span.total_s:.0f}"]))
    return f"<h2>Recoveries (milliseconds)</h2>\n<table>\n{head}{''.join(rows)}</table>\n"


def _row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>\n"
