"""Hang detection: which rank hangs, judged by the progress of all ranks.

Ranks run in lockstep, so one hung rank stops all: the others reach the next collective and wait there. The culprit is
therefore not a silent rank but the one that lags behind. No rank is blamed if all are at the same point (a long
validation, a first compilation), if a debugger has stopped one, or if all have been stopped. Ranks at the same point
are distinguished by what they do there. Each is asked, and in the backward pass a rank that does not wait, while the
others wait, has not entered their collective. Elsewhere it may have its own work, such as writing a checkpoint; it
hangs only if neither it nor a child process has used any CPU time for minutes.

| All ranks silent for longer than the limit, and | Then |
|---|---|
| a debugger holds one | no rank is hung |
| all are stopped by a signal | no rank is hung |
| some are stopped by a signal | they are hung |
| some lag behind the others | they are hung |
| all are in the backward pass of the same step, and some do not wait while the others do | they are hung |
| all are at another common point, and some do not wait while the others do, and are idle | they are hung |
| some restore a version, do not wait, and have been idle for longer than the limit | they are hung |
| all of this node are at the same point, and some of another node are not silent | no rank is hung |
| all are at the same point, for less than the ceiling | no rank is hung |
| all are at the same point for longer | all are hung |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum

FLOOR_S = 10.0
CEILING_S = 1800.0
RELEASE_S = 30.0
"""For a survivor of a fault to release the process groups it shared with the lost ranks."""
REGROUP_S = 60.0
"""For the ranks of a node that are ready to regroup to complete the regroup."""
GROUP_S = 10.0
"""For the last ranks to create a process group that others have already created, while they regroup."""
STOPPED_S = 10.0
"""For a rank that was stopped by a signal during a recovery; the other ranks wait for it."""
STARTUP_S = 60.0
"""Minimum time allowed for a new process to reach `fit`; more if the first processes took long."""
STUCK_COLLECTIVE_S = 0.5
"""Time after which a thread that sleeps in a collective without connections counts as stuck."""
IDLE_S = 120.0
"""How long a rank that other ranks wait for may use no CPU time, outside the backward pass."""
IDLE_SHARE = 0.005
"""Share of one core below which a process counts as idle: answering its agent takes some CPU time."""
ANSWER_S = 5.0
"""Longest wait for the answers of ranks that are asked whether they wait for others."""
FACTOR = 8.0
"""Limit for silence, as a multiple of the longest pause seen between two signs of progress."""


class Point(IntEnum):
    """Where a rank is in a step, in order; RESTORE means that it restores a version after a fault."""

    OUTSIDE = 0
    RESTORE = 1
    BATCH = 2
    BACKWARD = 3
    OPTIMIZER = 4
    COMMIT = 5
    VALIDATION = 6


@dataclass(frozen=True, slots=True)
class RankProgress:
    """What is known about one rank's progress.

    Args:
        step: optimizer step that it has begun; 0 while it restores a version.
        point: where it is in the step.
        count: signs of progress at this point, e.g. batches of a validation.
        at: when it gave the last sign, in seconds of a clock that all ranks of the node share.
        longest_pause_s: longest pause between two signs since its first step.
        own_s: its own time per step in seconds, without waiting for others; 0 if unknown.
        stopped: whether a signal has stopped it.
        traced: whether a debugger holds it.
        epoch: its epoch; -1 where that is not known.
        out_of_data: whether it has completed the last step of that epoch.
        waits: whether it waits for other ranks; None if it was not asked or its answers differ.
        idle_s: how long it and its children have used no CPU time, since all ranks fell silent.
    """

    step: int
    point: Point
    count: int
    at: float
    longest_pause_s: float
    own_s: float
    stopped: bool = False
    traced: bool = False
    epoch: int = -1
    out_of_data: bool = False
    waits: bool | None = None
    idle_s: float = 0.0

    @property
    def position(self) -> tuple[int, int, int]:
        """How far it has come, for comparison with other ranks."""
        return self.step, self.point, self.count


@dataclass(frozen=True, slots=True)
class Hang:
    """Ranks that hang, why, and for how many seconds no rank has made progress."""

    ranks: tuple[int, ...]
    reason: str
    silent_s: float


def limit_s(progress: Mapping[int, RankProgress], override_s: float | None) -> float:
    """Return for how long all ranks may be silent, in seconds.

    Args:
        progress: by rank.
        override_s: the user's limit; None to learn it from the pauses that were seen.
    """
    if override_s is not None:
        return override_s
    longest_s = max((rank_progress.longest_pause_s for rank_progress in progress.values()), default=0.0)
    # No limit before the first step is complete: a compilation may take long.
    learned_s = CEILING_S if longest_s == 0.0 else min(CEILING_S, max(FLOOR_S, FACTOR * longest_s))
    return min(learned_s, RELEASE_S) if _some_restore(progress) else learned_s


def _silence(progress: Mapping[int, RankProgress], now: float, override_s: float | None) -> tuple[float, float] | None:
    """Return silence and limit in seconds, if all ranks are silent for longer and no debugger holds one."""
    if (
        not progress
        or override_s == 0.0
        or any(rank_progress.point is Point.OUTSIDE for rank_progress in progress.values())
    ):
        return None
    silent_s, allowed_s = (
        now - max(rank_progress.at for rank_progress in progress.values()),
        limit_s(progress, override_s),
    )
    if silent_s <= allowed_s or any(rank_progress.traced for rank_progress in progress.values()):
        return None
    return silent_s, allowed_s


def are_silent(progress: Mapping[int, RankProgress], *, now: float, override_s: float | None = None) -> bool:
    """Whether all ranks have been silent for longer than the limit, and their progress alone blames none of them.

    They are at the same point, or some restore a version: ranks that lag then may have more to restore.

    Args:
        progress: as for `find_hang`.
        now: as for `find_hang`.
        override_s: as for `find_hang`.
    """
    is_open = _common_point(progress) is not None or _some_restore(progress)
    return is_open and _silence(progress, now, override_s) is not None


def should_ask(progress: Mapping[int, RankProgress], *, override_s: float | None = None) -> bool:
    """Whether to ask silent ranks what they do, because the answers would show which of them hangs.

    Args:
        progress: progress of ranks for which `are_silent` is true, with how long each has been idle.
        override_s: as for `find_hang`.
    """
    return any(_is_suspect(progress, rank, override_s) for rank in progress)


def find_hang(
    progress: Mapping[int, RankProgress], *, now: float, override_s: float | None = None, is_whole: bool = True
) -> Hang | None:
    """Decide which ranks hang.

    Args:
        progress: by rank, of all ranks whose progress is known.
        now: time on the clock of the progress.
        override_s: the user's limit; None to learn it, 0 to disable detection.
        is_whole: whether these are all the ranks that wait for each other.
    """
    silence = _silence(progress, now, override_s)
    stopped = tuple(rank for rank, rank_progress in progress.items() if rank_progress.stopped)
    if silence is None or len(stopped) == len(progress):
        return None
    silent_s, allowed_s = silence
    silent = f"no rank made progress for {silent_s:.1f} s (limit: {allowed_s:.1f} s)"
    if stopped:
        return Hang(stopped, f"stopped by a signal; {silent}", silent_s)
    least = min(rank_progress.position for rank_progress in progress.values())
    behind = tuple(rank for rank, rank_progress in progress.items() if rank_progress.position == least)
    restoring = least[1] == Point.RESTORE
    where = "restore" if restoring else f"{Point(least[1]).name.lower()} of step {least[0]}"
    all_there = len(behind) == len(progress)
    lags = Hang(behind, f"lags at {where}, behind the other ranks; {silent}", silent_s)
    if not all_there and not restoring:
        return lags
    busy = tuple(rank for rank, rank_progress in progress.items() if rank_progress.waits is False)
    is_answered = all(rank_progress.waits is not None for rank_progress in progress.values())
    hung = tuple(rank for rank in busy if _is_suspect(progress, rank, override_s))
    if is_answered and hung and (restoring or len(busy) < len(progress)):
        return Hang(
            hung, f"peers are blocked at {where} in a collective that this rank never entered; {silent}", silent_s
        )
    if all_there and not is_whole:
        return None
    # The user's limit is for a step: restoring a version may take longer.
    ceiling_s = max(allowed_s, CEILING_S if override_s is None or restoring else override_s)
    if silent_s <= ceiling_s + (0.0 if is_answered or not should_ask(progress, override_s=override_s) else ANSWER_S):
        return None
    return Hang(behind, f"all ranks are at the same point; {silent}", silent_s) if all_there else lags


def _is_suspect(progress: Mapping[int, RankProgress], rank: int, override_s: float | None) -> bool:
    """Whether a silent rank hangs if it does not wait for the others, because it has no other work."""
    rank_progress, common_point = progress[rank], _common_point(progress)
    if rank_progress.point is Point.RESTORE:
        return rank_progress.idle_s > limit_s(progress, override_s)
    is_limited = common_point is not None and override_s is not None
    return common_point is Point.BACKWARD or is_limited or rank_progress.idle_s > IDLE_S


def _some_restore(progress: Mapping[int, RankProgress]) -> bool:
    return any(rank_progress.point is Point.RESTORE for rank_progress in progress.values())


def _common_point(progress: Mapping[int, RankProgress]) -> Point | None:
    positions = {rank_progress.position for rank_progress in progress.values()}
    return Point(next(iter(positions))[1]) if len(positions) == 1 else None


@dataclass(frozen=True, slots=True)
class Idleness:
    """Since when a process has been idle.

    Args:
        used_s: CPU time in seconds that it had used by then, with its children.
        since: time of the measurement, on any clock.
    """

    used_s: float
    since: float

    def after(self, used_s: float, now: float) -> Idleness:
        """Return itself if the process is still idle, else a new record that starts now.

        Args:
            used_s: CPU time in seconds that it has used by now.
            now: time on the same clock.
        """
        # The kernel counts in ticks of 0.01 s: a single one does not count as work.
        is_idle = used_s - self.used_s <= max(0.02, IDLE_SHARE * (now - self.since))
        return self if is_idle else Idleness(used_s, now)


@dataclass(frozen=True, slots=True)
class SleepingThread:
    """Where a thread sleeps that waits for other ranks.

    Args:
        thread: its name.
        where: module and function.
        used_ticks: CPU time that it has used, in kernel ticks.
    """

    thread: str
    where: str
    used_ticks: int


def unchanged_since(
    before: Mapping[int, tuple[SleepingThread, float]], found: Mapping[int, SleepingThread], now: float
) -> dict[int, tuple[SleepingThread, float]]:
    """Return since when each thread has slept where it is now, without any work in between.

    Args:
        before: previous result of this function.
        found: where threads sleep now.
        now: seconds of any clock.
    """
    return {
        number: before[number] if number in before and before[number][0] == stand else (stand, now)
        for number, stand in found.items()
    }


def find_stuck_collective(since: Mapping[int, tuple[SleepingThread, float]], now: float) -> str | None:
    """Find a thread that will sleep forever, in a process without connections to other ranks.

    Whatever it waits for has failed by then, and would have woken it within milliseconds.

    Args:
        since: since when each thread has slept, as `unchanged_since` returns it.
        now: time on the same clock.
    """
    for stand, at in since.values():
        if now - at > STUCK_COLLECTIVE_S:
            return f"{stand.thread} sleeps in {stand.where} for {now - at:.1f} s, with no connection left to end it"
    return None


def find_unreleased(
    notified_at: Mapping[int, float],
    *,
    now: float,
    override_s: float | None = None,
    held: Mapping[int, str] | None = None,
) -> Hang | None:
    """Find survivors of a fault that do not release their process groups.

    A driver that waits for a lost peer may hold a survivor forever.

    Args:
        notified_at: when they were notified of the fault, by rank, for ranks that have not released their groups.
        now: time on the same clock.
        override_s: the user's limit; None for our own, 0 to disable detection.
        held: why some of them report that they are stuck, by rank: those are not waited for.
    """
    for rank, at in notified_at.items():
        if held is not None and rank in held:
            return Hang((rank,), f"did not release its process groups after the fault: {held[rank]}", now - at)
    allowed_s = RELEASE_S if override_s is None else override_s
    late = {rank: now - at for rank, at in notified_at.items() if now - at > allowed_s}
    if not late or allowed_s == 0.0:
        return None
    reason = f"did not release its process groups within {allowed_s:.1f} s of the fault report"
    return Hang(tuple(late), reason, max(late.values()))


@dataclass(frozen=True, slots=True)
class RegroupStatus:
    """How far the workers of one agent have regrouped with the other ranks after a fault.

    Args:
        coming: since when new processes have been on their way to `fit`, by rank.
        unreleased: when survivors were notified of the fault that have not released their groups, by rank.
        ready: since when ranks have released their groups but not completed the regroup, by rank.
        created: how many process groups each rank has created in this regroup, and when the last one was, by rank.
        regrouped: ranks that have completed the regroup.
        startup_s: longest time in seconds that one of the first processes took to reach `fit`.
        is_whole: whether this node has all ranks.
    """

    coming: Mapping[int, float]
    unreleased: Mapping[int, float]
    ready: Mapping[int, float]
    created: Mapping[int, tuple[int, float]]
    regrouped: Collection[int]
    startup_s: float
    is_whole: bool

    @property
    def is_under_way(self) -> bool:
        """Whether a rank has yet to complete the regroup."""
        return bool(self.coming or self.unreleased or self.ready)

    def is_late(self, now: float, override_s: float | None = None) -> bool:
        """Whether ranks that are ready have not regrouped within the limit."""
        if self.coming or not self.ready or override_s == 0.0:
            return False
        return now - max(self.ready.values()) > _regroup_limit_s(override_s)


def find_late(
    status: RegroupStatus,
    *,
    now: float,
    override_s: float | None = None,
    stopped: Mapping[int, float] | None = None,
    waits: Mapping[int, bool | None] | None = None,
) -> Hang | None:
    """Decide which ranks hold up a regroup.

    | For longer than the limit | Late are |
    |---|---|
    | some ranks are stopped by a signal, and others are not | those that are stopped |
    | a new process is on its way to `fit` | this process |
    | some ranks have not regrouped, and others have | those that have not |
    | some ranks have not created a group that others have | those that have not |
    | no rank has regrouped, and some do not wait for others | those that do not wait |
    | no rank has regrouped, all wait, and no other node has ranks | all |
    | the same for twice as long, and whether all wait is unknown | all |

    Args:
        status: what is known about the regroup.
        now: time on the clock of the status.
        override_s: the user's limit; None for our own, 0 to disable detection.
        stopped: since when a signal has stopped ranks, by rank.
        waits: whether each rank waits for others; None if it was not asked.
    """
    waits = waits or {}
    if override_s == 0.0 or not status.is_under_way:
        return None
    found = (
        _stopped(status, now, override_s, stopped or {})
        or _late_start(status, now, override_s)
        or _without_group(status, now, override_s)
    )
    if found is not None or not status.is_late(now, override_s):
        return found
    silent_s, ranks = now - max(status.ready.values()), tuple(status.ready)
    why = f"ranks that are ready to regroup have not regrouped within {_regroup_limit_s(override_s):.1f} s"
    if status.regrouped:
        return Hang(ranks, f"{why}, but others have", silent_s)
    if busy := tuple(rank for rank in ranks if waits.get(rank) is False):
        return Hang(busy, f"does not wait for the other ranks; {why}", silent_s)
    # No rank is known to be at fault, and the machine may be slow: the user's limit for a step does not apply.
    all_wait = all(waits.get(rank) for rank in ranks)
    if status.is_whole and silent_s > (REGROUP_S if all_wait else 2 * REGROUP_S):
        waiting = "all ranks wait for each other" if all_wait else "it is unknown which ranks wait for which"
        return Hang(ranks, f"{waiting}; {why}", silent_s)
    return None


def _stopped(status: RegroupStatus, now: float, override_s: float | None, stopped: Mapping[int, float]) -> Hang | None:
    """Find ranks that a signal has stopped; none if it has stopped all, as for a suspended job."""
    allowed_s = STOPPED_S if override_s is None else override_s
    late = tuple(sorted(rank for rank, since in stopped.items() if now - since > allowed_s))
    everyone = {*status.coming, *status.unreleased, *status.ready, *status.regrouped}
    if not late or everyone <= stopped.keys():
        return None
    stopped_s = now - min(stopped[rank] for rank in late)
    return Hang(late, f"stopped by a signal for {stopped_s:.1f} s while the ranks recover", stopped_s)


def _late_start(status: RegroupStatus, now: float, override_s: float | None) -> Hang | None:
    allowed_s = max(STARTUP_S, FACTOR * status.startup_s, override_s or 0.0)
    for rank, since in status.coming.items():
        if now - since > allowed_s:
            why = f"did not reach fit within {allowed_s:.1f} s; the first processes took {status.startup_s:.1f} s"
            return Hang((rank,), why, now - since)
    return None


def _without_group(status: RegroupStatus, now: float, override_s: float | None) -> Hang | None:
    """Find ranks that have not created a group, though all ranks that they could wait for have."""
    if status.coming or not status.is_whole or not status.created:
        return None
    most, since = max(status.created.values(), key=lambda created: (created[0], -created[1]))
    allowed_s = min(GROUP_S, _regroup_limit_s(override_s))
    late = tuple(rank for rank in status.ready if status.created.get(rank, (0, 0.0))[0] < most)
    if not late or now - since <= allowed_s:
        return None
    return Hang(late, f"did not create a process group within {allowed_s:.1f} s of the other ranks", now - since)


def _regroup_limit_s(override_s: float | None) -> float:
    return REGROUP_S if override_s is None else override_s
