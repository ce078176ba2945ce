"""Renders a forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lightning_ckptless.protocol.forecast.failure_model import SECONDS_PER_DAY, SECONDS_PER_HOUR
from lightning_ckptless.protocol.forecast.forecast import Forecast
from lightning_ckptless.protocol.forecast.inputs import Forecastable
from lightning_ckptless.protocol.forecast.price import SPARE_NODES, arena_bytes_per_node, lost_money
from lightning_ckptless.protocol.forecast.recommendation import Alternative
from lightning_ckptless.protocol.forecast.simulation import Bucket
from lightning_ckptless.protocol.forecast.summary import Summary
from lightning_ckptless.protocol.wording import counted

_HOURS = 30 * 24
_YEAR_S = 365.25 * SECONDS_PER_DAY


def show_forecast(found: Forecast, what: Forecastable, assumed: Sequence[str]) -> None:
    """Print a forecast.

    Args:
        found: the forecast.
        what: its inputs.
        assumed: what was assumed or measured, one line each.
    """
    console = Console()
    console.print(_head(found, what))
    console.print(_buckets(found, what))
    console.print(_bursts(found))
    if found.recommendation is not None:
        console.print(_recommended(found))
        console.print(_alternatives(found, what))
    console.print(_schemes(found))
    console.print(Text("Assumed or measured", style="bold"))
    for line in (*assumed, *(f"{curve.name}: {curve.assumptions}" for curve in found.comparison.curves)):
        console.print(f"  {line}", highlight=False)


def _head(found: Forecast, what: Forecastable) -> Table:
    cluster, expected, closed = found.job.cluster, found.expected, found.closed
    left_out = f", without {', '.join(closed.left_out)}" if closed.left_out else ""
    gap_s = what.failures.gaps(cluster.nodes).mean_s
    table = Table.grid(padding=(0, 2))
    spares = counted(found.job.choices.spares, "spare")
    elastic = f", at least {cluster.min_nodes}" if cluster.min_nodes < cluster.nodes else ""
    table.add_row(
        "job", f"{cluster.ranks} ranks on {cluster.nodes} nodes{elastic}, {spares}; {what.inputs.days:g} days"
    )
    table.add_row("failures", what.failures_text)
    table.add_row("", f"one incident every {_duration(gap_s)}, {expected.incidents:.1f} per job")
    spread = f"{expected.ettr_low:.2%} to {expected.ettr_high:.2%} in 90 % of {what.inputs.trials} simulated jobs"
    table.add_row("expected ETTR", Text.assemble((f"{expected.ettr:.2%}", "bold"), f"  ({spread})"))
    table.add_row("closed form", f"{closed.ettr:.2%}{left_out}")
    table.add_row("not covered", f"{_uncovered(expected)}; {expected.uncovered:.2f} per job")
    return table


def _uncovered(found: Summary) -> str:
    after = _duration(found.uncovered_after_s)
    return (
        f"first loss that memory does not cover after {after}"
        if found.uncovered_seen
        else f"none within {after} (95 %)"
    )


def _buckets(found: Forecast, what: Forecastable) -> Table:
    money = lost_money(found.expected, found.job, what.inputs.price)
    table = _table("Time of a job", "bucket", "hours", "share", *(["money"] if money else []))
    wall_s = sum(found.expected.spent_s.values())
    for bucket, spent_s in found.expected.spent_s.items():
        if bucket is Bucket.TRAINING or spent_s > 0:
            cells = [str(bucket), f"{spent_s / SECONDS_PER_HOUR:,.2f}", f"{spent_s / wall_s:.3%}"]
            table.add_row(*cells, *([f"{money[bucket]:,.0f}" if bucket in money else ""] if money else []))
    if money:
        table.add_row(SPARE_NODES, "", "", f"{money[SPARE_NODES]:,.0f}")
    return table


def _bursts(found: Forecast) -> Table:
    table = _table("The same rate", "failures", "ETTR", "losses not covered, per job", "first of them")
    for name, summary in (("as given", found.expected), ("independent", found.independent)):
        after = f"{'' if summary.uncovered_seen else 'more than '}{_duration(summary.uncovered_after_s)}"
        table.add_row(name, f"{summary.ettr:.3%}", f"{summary.uncovered:.2f}", after)
    return table


def _recommended(found: Forecast) -> Table:
    assert found.recommendation is not None and found.recommended is not None
    table = _table("Recommended", "option", "given", "recommended")
    given, best = asdict(found.job.choices), asdict(found.recommendation.choices)
    for option, value in best.items():
        changed = value != given[option]
        table.add_row(
            option, _value(option, given[option]), Text(_value(option, value), style="bold" if changed else "")
        )
    table.add_section()
    ettr, best_ettr = f"{found.expected.ettr:.2%}", f"{found.recommended.ettr:.2%}"
    table.add_row("expected ETTR", ettr, Text(best_ettr, style="bold"))
    nodes = found.job.cluster.nodes
    paid, best_paid = (nodes / (nodes + choices["spares"]) for choices in (given, best))
    efficiency, best_efficiency = f"{found.expected.ettr * paid:.2%}", f"{found.recommended.ettr * best_paid:.2%}"
    table.add_row("of all paid nodes", efficiency, Text(best_efficiency, style="bold"))
    return table


def _alternatives(found: Forecast, what: Forecastable) -> Table:
    assert found.recommendation is not None
    inputs, cluster = what.inputs, found.job.cluster
    money = ["money per 30 days"] if inputs.price is not None else []
    memory = ["memory per node"] if inputs.state_bytes is not None else []
    heads = ("option", "value", "ETTR", "not covered", "node hours lost per 30 days", *money, *memory)
    table = _table("Alternatives, compared with the recommended value", *heads)
    rows = found.recommendation.alternatives
    chosen = {row.option: row for row in rows if row.chosen}
    last = ""
    for row in rows:
        lost = chosen[row.option].efficiency - row.efficiency
        # Adding zero turns a rounded -0.0 into 0.0.
        hours = round(lost * _HOURS * cluster.nodes, 1) + 0.0
        cells = [f"{row.ettr:.3%}", "" if row.uncovered is None else f"{row.uncovered:.2f}", f"{hours:+,.1f}"]
        if inputs.price is not None:
            cells.append(f"{hours * cluster.ranks_per_node * inputs.price:+,.0f}")
        if inputs.state_bytes is not None:
            cells.append(_memory(row, found, inputs.state_bytes))
        mark = " (given)" if row.given else ""
        style = "bold" if row.chosen else ""
        table.add_row(
            row.option if row.option != last else "", f"{_value(row.option, row.value)}{mark}", *cells, style=style
        )
        last = row.option
    return table


def _memory(row: Alternative, found: Forecast, state_bytes: float) -> str:
    size = arena_bytes_per_node(found.job, state_bytes, row.value) if row.option == "copies" else None
    return "" if size is None else decimal(int(size))


def _schemes(found: Forecast) -> Table:
    ranks = found.comparison.ranks
    own = ranks.index(found.job.cluster.ranks)
    columns = sorted({own, *(place for place, size in enumerate(ranks) if size // ranks[0] in {16, 128, 1024, 8192})})
    title = "ETTR over the size of the cluster (closed form)"
    table = _table(title, "scheme", *(f"{ranks[place]:,} ranks" for place in columns))
    for curve in found.comparison.curves:
        table.add_row(curve.name, *(f"{curve.ettr[place]:.2%}" for place in columns))
    return table


def _value(option: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return _duration(value) if option == "durable_every_s" else str(value)


def _duration(seconds: float) -> str:
    """A duration in the unit that reads best."""
    for unit_s, unit in ((_YEAR_S, "years"), (SECONDS_PER_DAY, "days"), (SECONDS_PER_HOUR, "h"), (60.0, "min")):
        if seconds >= 2 * unit_s or (unit == "h" and seconds >= unit_s):
            return f"{seconds / unit_s:.3g} {unit}"
    return f"{seconds:.3g} s"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, heading in enumerate(headings):
        is_name = place == 0 or heading == "value"
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=is_name)
    return table
