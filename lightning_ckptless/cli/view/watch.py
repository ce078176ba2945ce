"""Renders a run for `ckptless watch`: lines that fit the terminal, the most important first.

They are plain lines, not tables, because the view is drawn twice a second and a table costs ten times as much.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from lightning_ckptless.cli.survey.members import Member
from lightning_ckptless.cli.survey.survey import Survey, Tier
from lightning_ckptless.cli.view.buckets import as_duration, buckets
from lightning_ckptless.protocol.phases import PHASES

STATE_COLOURS = {"starting": "yellow", "running": "green", "silent": "yellow", "ended": "blue", "stopped": "red"}
_HEAD_CHARS = 11
_LEAST_ROWS = 3
_MOST_ALARMS = 6


def screen(found: Survey, width: int, height: int | None) -> Group:
    """Return the view of a run.

    Args:
        found: status of the run.
        width: width of the terminal, in characters.
        height: height of the terminal, in lines; None to show everything.
    """
    above, below = _above(found), _below(found)
    free = len(found.members) if height is None else height - len(above) - len(below) - 2
    lines = [*above, *_members(found, max(_LEAST_ROWS, free)), *below]
    if height is not None:
        lines = lines[: height - 1]
    for line in lines:
        line.no_wrap, line.overflow = height is not None, "ellipsis" if height is not None else "fold"
        if height is not None:
            line.truncate(width, overflow="ellipsis")
    return Group(*lines)


def slowest_first(members: Sequence[Member]) -> list[Member]:
    """Sort ranks: those that do not run, those that are behind, then by their own time per step."""
    return sorted(members, key=lambda m: (m.state == "running", m.step or 0, -(m.step_s or 0.0), m.rank))


def _line(head: str, *parts: str | tuple[str, str]) -> Text:
    return Text.assemble((f"{head:<{_HEAD_CHARS}}", "dim"), *parts)


def _above(found: Survey) -> list[Text]:
    state = (found.state, f"bold {STATE_COLOURS[found.state]}")
    at = time.strftime("%H:%M:%S", time.localtime(found.at))
    members = f", generation {found.generation}, {found.world_size} ranks" if found.generation is not None else ""
    lines = [
        _line("run", (found.run_id, "bold"), "  ", state, members, (f"  {at}", "dim")),
        _line("protected", (found.protected.text, "bold" if found.protected.losses else "yellow")),
        _line("training", _pace(found)),
    ]
    shown = found.alarms[:_MOST_ALARMS]
    lines += [_line("alarm" if not number else "", (alarm.text, "bold red")) for number, alarm in enumerate(shown)]
    if len(found.alarms) > len(shown):
        lines.append(_line("", f"and {len(found.alarms) - len(shown)} more"))
    return lines


def _pace(found: Survey) -> str:
    pace = found.pace
    if pace.step is None:
        return "no step committed yet"
    of = f" of {pace.of:,} ({pace.step / pace.of:.0%})" if pace.of else ""
    rate = f", {pace.steps_per_s:.3g} steps/s" if pace.steps_per_s else ""
    left = f", {as_duration(pace.eta_s)} left" if pace.eta_s and found.state == "running" else ""
    return f"step {pace.step:,}{of}{rate}{left}"


def _members(found: Survey, most: int) -> list[Text]:
    if not found.members:
        return []
    faulty = {alarm.rank for alarm in found.alarms}
    head = f"  {'rank':>5} {'pid':>8} {'state':<9} {'step':>10} {'at':<10} {'progress':>9} {'own step':>9}  node"
    lines = [Text(head, style="dim")]
    ordered = slowest_first(found.members)
    lines += [Text(_member(member), style="red" if member.rank in faulty else "") for member in ordered[:most]]
    if len(ordered) > most:
        lines.append(Text(f"  and {len(ordered) - most} more ranks, all faster", style="dim"))
    return lines


def _member(member: Member) -> str:
    step = "" if member.step is None else f"{member.step:,}"
    age = "" if member.progress_age_s is None else f"{member.progress_age_s:.1f} s"
    own = "" if member.step_s is None else f"{1e3 * member.step_s:.1f} ms"
    return (
        f"  {member.rank:>5} {member.pid:>8} {member.state:<9} {step:>10} {member.point:<10} {age:>9} {own:>9}"
        f"  {member.node}"
    )


def _below(found: Survey) -> list[Text]:
    lines = [_line(f"{tier.name}", _tier(tier)) for tier in found.tiers]
    if found.standbys is not None:
        lines.append(_line("standbys", str(found.standbys)))
    lines += [_line("draining", reason.removeprefix("draining ")) for reason in found.draining]
    if found.recovery_count:
        lines.append(_line("recoveries", str(found.recovery_count)))
        lines += [_recovery(recovery, found.at) for recovery in reversed(found.recoveries[-3:])]
    if found.goodput is not None:
        recent = "" if found.goodput_1h is None else f", {found.goodput_1h:.1%} in the last hour"
        lines.append(_line("goodput", f"{found.goodput:.1%} of {as_duration(found.wall_s)}{recent}"))
    if spent := buckets(found.time_s):
        lines += [_line("time", "of the run, by what it was spent on"), *spent]
    return lines


def _tier(tier: Tier) -> str:
    if tier.step is None:
        return "no version yet"
    lag = "" if tier.lag_steps is None else f", {tier.lag_steps:,} step{'' if tier.lag_steps == 1 else 's'} behind"
    age = "" if tier.age_s is None else f", {as_duration(tier.age_s)} old"
    return f"step {tier.step:,}{lag}{age}, in {tier.place}"


def _recovery(facts: dict[str, object], now: float) -> Text:
    rank, phases = facts.get("culprit_rank"), facts["phases"]
    who = "" if rank is None else f"rank {rank} "
    assert isinstance(phases, dict)
    parts = " + ".join(f"{name} {phases[f'{name}_s']:.2f}" for name in PHASES if phases.get(f"{name}_s", 0.0) >= 0.005)
    ago = as_duration(max(0.0, now - float(str(facts["at"]))))
    total = float(str(facts["total_s"]))
    return Text(f"  {ago} ago: {who}{facts['cause']}, {facts['rung']} in {total:.2f} s = {parts}")
