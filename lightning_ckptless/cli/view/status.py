"""Renders the status of a run."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lightning_ckptless.cli.survey.survey import Survey
from lightning_ckptless.cli.view.watch import STATE_COLOURS
from lightning_ckptless.protocol.mtbf import observed_mtbf
from lightning_ckptless.protocol.placement_table import HEAD, LOSSES_HEAD, PlacementTable
from lightning_ckptless.protocol.wording import counted

_MOST_RANKS = 8
_SLOT_COLOURS = {"committed": "green", "staged": "yellow", "writing": "cyan"}


def show_status(found: Survey) -> None:
    """Print the status of a run."""
    console = Console()
    console.print(_head(found))
    if found.plan is not None:
        _show_plan(console, found.plan)
    if found.arenas:
        console.print(_arenas(found))
    if found.slots:
        console.print(_slots(found))
    if found.goodput is not None:
        console.print(_time(found))
    if found.ranks:
        console.print(_ranks(found))
    if found.recoveries:
        console.print(_recoveries(found))


def _head(found: Survey) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("run", Text(found.run_id, style="bold"), Text(found.state, style=STATE_COLOURS[found.state]))
    table.add_row("ledger", found.folder)
    if found.generation is not None:
        table.add_row("members", f"generation {found.generation}, {found.world_size} ranks")
        table.add_row("", ", ".join(f"rank {member.rank}: pid {member.pid}" for member in found.members))
        if found.standbys is not None:
            table.add_row("standbys", str(found.standbys))
        for reason in found.draining:
            table.add_row("draining", reason.removeprefix("draining "))
        table.add_row("placement", found.placement)
    table.add_row("protected", found.protected.text)
    if found.protection:
        table.add_row("copies", found.protection)
    if found.arenas:
        table.add_row("committed", found.committed or "none yet")
        if found.commit_lag_steps is not None:
            age = "" if found.commit_age_s is None else f", last written {found.commit_age_s:.1f} s ago"
            steps = counted(found.commit_lag_steps, "step")
            table.add_row("commit lag", f"{steps}{age}")
        table.add_row("restorable", found.restorable)
    else:
        table.add_row("arenas", "none on this host")
    if found.durable:
        table.add_row("durable", found.durable)
    for alarm in found.alarms:
        table.add_row("alarm", Text(alarm.text, style="red"))
    table.add_row("recoveries", str(found.recovery_count))
    if found.goodput is not None:
        recent = "" if found.goodput_1h is None else f", {found.goodput_1h:.1%} in the last hour"
        table.add_row("goodput", f"{found.goodput:.1%} of {found.wall_s:.1f} s{recent}")
        table.add_row("replayed", counted(found.steps_replayed, "step"))
        table.add_row("failures", str(observed_mtbf(found.failures, found.wall_s)))
    return table


def _show_plan(console: Console, plan: PlacementTable) -> None:
    for title, head, rows in (("Plan", HEAD, plan.rows), ("Losses", LOSSES_HEAD, plan.losses)):
        table = _table(title, *head)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        if plan.more and head is HEAD:
            console.print(plan.more)


def _arenas(found: Survey) -> Table:
    table = _table("Arenas", "node", "agent", "size", "torn slots", "folder")
    for arena in found.arenas:
        agent = Text("alive", style="green") if arena.alive else Text("exited", style="red")
        table.add_row(arena.node, agent, decimal(arena.bytes), str(arena.torn_headers), arena.path)
    return table


def _slots(found: Survey) -> Table:
    table = _table("Shards", "shard", "holder", "node", "slot", "version", "state", "size")
    for slot in found.slots:
        state = Text(slot.state, style=_SLOT_COLOURS.get(slot.state, ""))
        holder = f"rank {slot.holder}" + (" (own)" if slot.holder == slot.shard else "")
        cells = (str(slot.shard), holder, slot.node, str(slot.slot), slot.version)
        table.add_row(*cells, state, decimal(slot.bytes))
    return table


def _time(found: Survey) -> Table:
    table = _table("Time", "bucket", "seconds", "share")
    for bucket, spent_s in sorted(found.time_s.items(), key=lambda pair: -pair[1]):
        if spent_s > 0:
            table.add_row(bucket, f"{spent_s:.2f}", f"{spent_s / found.wall_s:.1%}")
    return table


def _ranks(found: Survey) -> Table:
    table = _table("Ranks that others wait for", "rank", "waited for data", "own work per batch", "over the median")
    for rank in found.ranks[:_MOST_RANKS]:
        table.add_row(str(rank.rank), f"{rank.data_wait_s:.2f} s", f"{rank.own_ms:.1f} ms", f"{rank.behind_s:.2f} s")
    return table


def _recoveries(found: Survey) -> Table:
    table = _table("Last recoveries", "cause", "how", "resumed from", "total")
    for facts in found.recoveries:
        rank = facts.get("culprit_rank")
        who = "" if rank is None else f"rank {rank} "
        table.add_row(f"{who}{facts['cause']}", facts["rung"], facts["version"], f"{facts['total_s']:.2f} s")
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        # A truncated path is useless.
        table.add_column(heading, overflow="fold" if heading == "folder" else "ellipsis")
    return table
