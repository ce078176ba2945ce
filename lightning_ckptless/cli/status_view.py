"""How the status of a run looks."""

from __future__ import annotations

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lightning_ckptless.cli.survey import Survey

_COLOURS = {"running": "green", "ended": "blue", "stopped": "red"}
_SLOT_COLOURS = {"committed": "green", "staged": "yellow", "writing": "cyan"}


def show_status(found: Survey) -> None:
    """Print what is known about a run."""
    console = Console()
    console.print(_head(found))
    if found.arenas:
        console.print(_arenas(found))
    if found.slots:
        console.print(_slots(found))
    if found.recoveries:
        console.print(_recoveries(found))


def _head(found: Survey) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("run", Text(found.run_id, style="bold"), Text(found.state, style=_COLOURS[found.state]))
    table.add_row("ledger", found.folder)
    if found.generation is not None:
        table.add_row("members", f"generation {found.generation}, {found.world_size} ranks")
        table.add_row("placement", found.placement)
    if found.arenas:
        age = "" if found.commit_age_s is None else f", last written {found.commit_age_s:.1f} s ago"
        table.add_row("committed", f"{found.committed or 'nothing yet'}{age}")
        lag = found.commit_lag_steps
        table.add_row("commit lag", "unknown" if lag is None else f"{lag} steps are being mirrored")
        table.add_row("restorable", found.restorable)
    else:
        table.add_row("arenas", "none on this machine")
    table.add_row("recoveries", str(found.recovery_count))
    if found.goodput is not None:
        table.add_row("goodput", f"{found.goodput:.1%}")
    return table


def _arenas(found: Survey) -> Table:
    table = Table("node", "agent", "size", "torn slots", "folder", title="Arenas", title_justify="left")
    for arena in found.arenas:
        agent = Text("alive", style="green") if arena.alive else Text("gone", style="red")
        table.add_row(arena.node, agent, decimal(arena.bytes), str(arena.torn_headers), arena.path)
    return table


def _slots(found: Survey) -> Table:
    table = Table("shard", "kept by", "on", "slot", "version", "state", title="Shards", title_justify="left")
    table.add_column("size", justify="right")
    for slot in found.slots:
        state = Text(slot.state, style=_SLOT_COLOURS.get(slot.state, ""))
        own = " (its writer)" if slot.keeper == slot.shard else ""
        cells = (str(slot.shard), f"rank {slot.keeper}{own}", slot.node, str(slot.slot), slot.version)
        table.add_row(*cells, state, decimal(slot.bytes))
    return table


def _recoveries(found: Survey) -> Table:
    table = Table("who", "how", "went on from", "total", title="Last recoveries", title_justify="left")
    for facts in found.recoveries:
        rank = facts.get("culprit_rank")
        who = "?" if rank is None else f"rank {rank}"
        table.add_row(who, facts["cause"], facts["version"], f"{facts['total_s']:.2f} s")
    return table
