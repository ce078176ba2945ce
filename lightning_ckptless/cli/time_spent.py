"""Where the time of a run went, from its ledger: the account that every report of the command line shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from lightning_ckptless.ledger import Event
from lightning_ckptless.protocol.mtbf import Mtbf, observed_mtbf
from lightning_ckptless.protocol.time_account import WINDOW_S, Bucket, FitTime, Outage, TimeAccount, whole_run


@dataclass(frozen=True, slots=True)
class RankTime:
    """What one rank has kept the others waiting for, in the current `fit`.

    Args:
        rank: the rank.
        data_wait_s: seconds that it has waited for its data.
        own_ms: its own work per batch, up to its first collective, in milliseconds.
        behind_s: seconds that its own work took longer than that of the median rank, over all batches.
    """

    rank: int
    data_wait_s: float
    own_ms: float
    behind_s: float


@dataclass(frozen=True, slots=True)
class RunTime:
    """The time of a run.

    Args:
        account: the time by bucket, from the first event to the last.
        steps_replayed: optimizer steps that faults have undone.
        mtbf: the mean time between failures.
        productive: pairs (instant, productive seconds until then), one per report.
        ranks: the ranks that have reported, by the time for which they may have kept the others waiting.
    """

    account: TimeAccount
    steps_replayed: int
    mtbf: Mtbf
    productive: tuple[tuple[float, float], ...]
    ranks: tuple[RankTime, ...]

    @property
    def is_known(self) -> bool:
        """Whether the run has reported its time."""
        return bool(self.productive)

    @property
    def recent_goodput(self) -> float:
        """Productive time / wall time in the last hour."""
        account = self.account
        before = [pair for pair in self.productive if pair[0] <= account.until - WINDOW_S]
        at, productive_s = before[-1] if before else (account.began_at, 0.0)
        return max(0.0, account.productive_s - productive_s) / (account.until - at) if account.until > at else 0.0

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Pairs (seconds since the run began, goodput until then)."""
        spans = [(at - self.account.began_at, productive_s) for at, productive_s in self.productive]
        return [(wall_s, productive_s / wall_s) for wall_s, productive_s in spans if wall_s > 0]

    @property
    def by_size(self) -> list[tuple[Bucket, float]]:
        """The buckets that are not empty, largest first."""
        return sorted(((b, s) for b, s in self.account.seconds.items() if s > 0), key=lambda pair: -pair[1])


def run_time(events: Sequence[Event]) -> RunTime:
    """Account for the time of a run.

    Args:
        events: events of its ledger; at least one.
    """
    lines = [event for event in events if event.event == "time_spent"]
    last = {line.fields["began_at"]: line for line in lines}
    fits = [_fit(line) for line in last.values()]
    agents = [event.event for event in events if event.event in ("agent_started", "agent_ended")]
    account = whole_run(
        min([event.at for event in events] + [fit.began_at for fit in fits]),
        max([event.at for event in events] + [fit.until for fit in fits]),
        fits,
        [_outage(event) for event in events if event.event == "fault"],
        is_over=agents[-1:] == ["agent_ended"],
    )
    failures = sum(int(line.fields["failures"]) for line in last.values())
    return RunTime(
        account=account,
        steps_replayed=sum(int(line.fields["steps_replayed"]) for line in last.values()),
        mtbf=observed_mtbf(failures, account.wall_s),
        productive=tuple(_productive(map(_fit, lines))),
        ranks=tuple(_ranks(events)),
    )


def _ranks(events: Sequence[Event]) -> list[RankTime]:
    last = {event.rank: event.fields for event in events if event.event == "rank_time" and event.fields["batches"]}
    own_s = {rank: fields["own_s"] / fields["batches"] for rank, fields in last.items() if rank is not None}
    usual_s = median(own_s.values()) if own_s else 0.0
    found = [
        RankTime(
            rank, last[rank]["data_wait_s"], 1e3 * of_rank_s, max(0.0, of_rank_s - usual_s) * last[rank]["batches"]
        )
        for rank, of_rank_s in own_s.items()
    ]
    return sorted(found, key=lambda found: -(found.data_wait_s + found.behind_s))


def _productive(reports: Iterable[FitTime]) -> Iterator[tuple[float, float]]:
    of_fits: dict[float, float] = {}
    for report in reports:
        of_fits[report.began_at] = report.seconds.get(Bucket.TRAINING, 0.0)
        yield report.until, sum(of_fits.values())


def _fit(line: Event) -> FitTime:
    fields = line.fields
    seconds = {Bucket(name): spent_s for name, spent_s in fields["seconds"].items() if name in set(Bucket)}
    return FitTime(fields["began_at"], fields["until"], seconds, fields["is_over"])


def _outage(fault: Event) -> Outage:
    died_at, detected_at, stopped_at = (fault.fields.get(name) for name in ("died_at", "detected_at", "stopped_at"))
    return Outage(fault_at=died_at, detected_at=detected_at, stopped_at=stopped_at or fault.at)
