"""The report of a run as one self-contained HTML page: no scripts, no further files, no network access.

Its tables and bars are those of the live page of `ckptless watch --web`. Apart from `timeline`, because a command does
not render anything itself.
"""

from __future__ import annotations

import io
import re
from html import escape

from lightning_ckptless.cli.view.drawing import draw
from lightning_ckptless.cli.view.html import bucket_bar, document, facts_list, recoveries_table, section, waits_table
from lightning_ckptless.cli.view.timeline import Timeline


def timeline_page(timeline: Timeline) -> str:
    """Return the HTML page.

    Args:
        timeline: timeline of the run.

    Raises:
        OptionsError: matplotlib is not installed.
    """
    account, mtbf = timeline.time.account, timeline.time.mtbf
    facts = {
        "steps": f"{timeline.last_step:,}",
        "wall clock": f"{timeline.wall_s:.1f} s",
        "faults": str(len(timeline.faults)),
        "recoveries": str(len(timeline.recoveries)),
        "goodput": f"{account.goodput:.1%}" if timeline.time.is_known else "unknown",
        "steps replayed": str(timeline.time.steps_replayed),
        "time between failures": f"{mtbf.mean_s:.3g} s" if mtbf.failures else "no failure",
    }
    spent = {str(bucket): spent_s for bucket, spent_s in timeline.time.by_size} if timeline.time.is_known else {}
    recoveries = [(f"{span.began_at:.1f} s", span.fields) for span in timeline.recoveries]
    parts = (
        f"<h1>Run {escape(timeline.run_id)}</h1>",
        facts_list(facts),
        f'<div class="drawing">{_drawing(timeline)}</div>',
        section("Time of the run, by what it was spent on", bucket_bar(spent)),
        section("Recoveries", recoveries_table(recoveries)),
        section("What ranks kept the others waiting for", waits_table(timeline.time.ranks)),
    )
    return document(f"Run {timeline.run_id}", "\n".join(parts))


def _drawing(timeline: Timeline) -> str:
    drawn = io.BytesIO()
    draw(timeline, drawn, "svg")
    text = drawn.getvalue().decode()
    # Inline SVG must not have an XML prologue. The metadata refers to vocabularies on the web.
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
