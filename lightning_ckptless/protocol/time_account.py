"""Where the time of a run goes: every second belongs to one bucket of a closed list.

An account is advanced from one instant to the next. The time in between goes to one bucket, and an instant that is not
later than the last one adds nothing. So the buckets always sum to the wall time, and nothing is counted twice.

The account is mirrored with the state. When a version is restored, so is its account: it ends at the instant at which
the version was captured. What happened since then is the cost of the fault, and is split by what is known of it:

    version captured | discarded work | detect | abort | regroup | restore | training
                     ^                ^ fault

The discarded work is lost to `REPLAY`; the steps that repeat it are training. An unknown instant is left out: the time
before it goes to the bucket that ends at the next known one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import fsum
from typing import Any, Self

WINDOW_S = 3600.0
"""Length of the sliding window, in seconds."""
_NOTE_EVERY_S = 60.0
"""How often the productive time is noted for the window: the window is exact to that."""


class Bucket(StrEnum):
    """What the time of a run is spent on.

    | Bucket | Contains |
    |---|---|
    | `start` | from the start of the agent to the first batch |
    | `training` | steps that count; the only productive bucket |
    | `validation` | validation between training steps |
    | `checkpoint_wait` | writing checkpoint files |
    | `data_wait` | waiting for the next batch |
    | `mirror_stall` | waiting for copies, handing versions over, and replay checks |
    | `detect` | from a fault to its detection |
    | `abort` | from then until all survivors have stopped |
    | `regroup` | from then until the ranks have regrouped, including failed attempts |
    | `restore` | from then until the state is restored |
    | `replay` | work that a fault has undone: from the restored version to the fault |
    | `rewind` | work that a rewind has undone, and the rewind itself |
    | `elastic_transition` | continuing with another number of ranks |
    | `idle` | after the end of training, and while no agent of the run exists |
    """

    __hash__ = str.__hash__
    """An enumeration's own is a function in Python, and each second of a run is added up by these keys."""

    START = "start"
    TRAINING = "training"
    VALIDATION = "validation"
    CHECKPOINT_WAIT = "checkpoint_wait"
    DATA_WAIT = "data_wait"
    MIRROR_STALL = "mirror_stall"
    DETECT = "detect"
    ABORT = "abort"
    REGROUP = "regroup"
    RESTORE = "restore"
    REPLAY = "replay"
    REWIND = "rewind"
    ELASTIC_TRANSITION = "elastic_transition"
    IDLE = "idle"


Mark = tuple[float | None, Bucket]
"""An instant in seconds since the epoch, None if unknown, and what the time until then was spent on."""


@dataclass(slots=True)
class TimeAccount:
    """The time of a run so far. All instants are in seconds of one clock that outlives the process.

    Args:
        began_at: when the run began.
        until: end of the time that is accounted for.
        seconds: seconds by bucket; they sum to `wall_s`.
        noted: pairs (instant, productive seconds until then); the first one begins the sliding window.
    """

    began_at: float
    until: float = 0.0
    seconds: dict[Bucket, float] = field(default_factory=dict)
    noted: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.until = max(self.until, self.began_at)
        self.noted = self.noted or [(self.began_at, 0.0)]

    @property
    def wall_s(self) -> float:
        """Seconds since the run began."""
        return self.until - self.began_at

    @property
    def productive_s(self) -> float:
        """Seconds of steps that count."""
        return self.seconds.get(Bucket.TRAINING, 0.0)

    @property
    def goodput(self) -> float:
        """Productive time / wall time; 0 if no time has passed."""
        return self.productive_s / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def recent_goodput(self) -> float:
        """Productive time / wall time in the sliding window."""
        at, productive_s = self.noted[0]
        return (self.productive_s - productive_s) / (self.until - at) if self.until > at else 0.0

    def advance(self, at: float, bucket: Bucket) -> None:
        """Add the time until an instant to a bucket; an instant in the past adds nothing."""
        if at <= self.until:
            return
        self.seconds[bucket] = self.seconds.get(bucket, 0.0) + at - self.until
        self.until = at
        if at - self.noted[-1][0] >= _NOTE_EVERY_S:
            kept = [pair for pair in self.noted if pair[0] >= at - WINDOW_S]
            # After a pause longer than the window, it begins with the last instant before.
            self.noted = [*(kept or self.noted[-1:]), (at, self.productive_s)]

    def advance_through(self, marks: Iterable[Mark]) -> None:
        """Advance from one known instant to the next."""
        for at, bucket in marks:
            if at is not None:
                self.advance(at, bucket)

    def rewind_to(self, productive_s: float) -> None:
        """Go back to an earlier version: the steps since then are lost. What was lost meanwhile stays where it is.

        Args:
            productive_s: productive seconds until that version.
        """
        undone_s = self.productive_s - productive_s
        if undone_s > 0:
            self.seconds[Bucket.TRAINING] = productive_s
            self.seconds[Bucket.REWIND] = self.seconds.get(Bucket.REWIND, 0.0) + undone_s
            self.noted = [(at, min(until_then_s, productive_s)) for at, until_then_s in self.noted]

    def to_dict(self) -> dict[str, Any]:
        """The account as plain values, to be mirrored with its version."""
        return {
            "began_at": self.began_at,
            "until": self.until,
            "seconds": {str(bucket): spent_s for bucket, spent_s in self.seconds.items()},
            "noted": list(self.noted),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """The account of a restored version."""
        seconds = {Bucket(name): spent_s for name, spent_s in saved["seconds"].items()}
        return cls(saved["began_at"], saved["until"], seconds, [(at, spent_s) for at, spent_s in saved["noted"]])


@dataclass(frozen=True, slots=True)
class Outage:
    """What is known of the time from a restored version until training resumes, as instants in seconds.

    Args:
        agent_at: start of the agent, if it is not the one that saw the fault.
        process_at: start of this process, if no agent of this package reports the fault.
        recovering_since: first fault of the recovery, if another one has interrupted it.
        fault_at: the fault.
        detected_at: when it was detected.
        stopped_at: when all survivors had stopped.
        regrouped_at: when the ranks had regrouped.
        grows: whether the ranks regrouped because nodes joined, and nothing was lost.
    """

    agent_at: float | None = None
    process_at: float | None = None
    recovering_since: float | None = None
    fault_at: float | None = None
    detected_at: float | None = None
    stopped_at: float | None = None
    regrouped_at: float | None = None
    grows: bool = False

    @property
    def fault_marks(self) -> tuple[Mark, ...]:
        """What the time until all survivors had stopped was spent on."""
        return (
            (self.agent_at, Bucket.IDLE),
            (self.process_at, Bucket.DETECT),
            (self.recovering_since, Bucket.REPLAY),
            (self.fault_at, Bucket.REPLAY if self.recovering_since is None else Bucket.REGROUP),
            (self.detected_at, Bucket.DETECT),
            (self.stopped_at, Bucket.ABORT),
        )

    def marks(self, restored_at: float) -> tuple[Mark, ...]:
        """What the time until the state was restored was spent on."""
        if self.grows:
            return ((self.fault_at, Bucket.REPLAY), (restored_at, Bucket.ELASTIC_TRANSITION))
        return (*self.fault_marks, (self.regrouped_at, Bucket.REGROUP), (restored_at, Bucket.RESTORE))


@dataclass(frozen=True, slots=True)
class FitTime:
    """What rank 0 has last reported of one `fit`.

    Args:
        began_at: when the time of this `fit` began.
        until: end of the time that is accounted for.
        seconds: seconds by bucket.
        is_over: whether this `fit` has returned.
    """

    began_at: float
    until: float
    seconds: Mapping[Bucket, float]
    is_over: bool = False


def whole_run(
    began_at: float, ended_at: float, fits: Sequence[FitTime], outages: Sequence[Outage] = (), *, is_over: bool = False
) -> TimeAccount:
    """Account for the time of a whole run, whatever is missing from its ledger.

    | Time | Bucket |
    |---|---|
    | before the first `fit` has reported | `start` |
    | between a `fit` and the next one | `idle` |
    | training of a `fit` that has not returned and that another one follows | `replay`: no version of it was restored |
    | after the last report, until a fault | `replay` |
    | after the last fault | `regroup`, or `idle` if the run is over |
    | after the last report, without a fault | `training`, or `idle` if the run or its last `fit` is over |

    Args:
        began_at: beginning of the run.
        ended_at: its end, or the present.
        fits: the last report of each `fit`, in chronological order.
        outages: the faults, in chronological order.
        is_over: whether the run has ended.
    """
    account = TimeAccount(began_at)
    if not fits:
        # Faults before the first report undid no work.
        account.advance(ended_at, Bucket.START)
        return account
    for number, fit in enumerate(fits):
        account.advance(min(fit.began_at, ended_at), Bucket.IDLE if number else Bucket.START)
        _absorb(account, fit, ended_at, is_lost=not fit.is_over and fit is not fits[-1])
    rest = Bucket.IDLE if is_over or fits[-1].is_over else Bucket.TRAINING
    for outage in outages:
        if outage.stopped_at is not None and outage.stopped_at > account.until and not fits[-1].is_over:
            known = ((at, bucket) for at, bucket in outage.fault_marks if at is not None)
            account.advance_through((min(at, ended_at), bucket) for at, bucket in known)
            rest = Bucket.IDLE if is_over else Bucket.REGROUP
    account.advance(ended_at, rest)
    return account


def _absorb(account: TimeAccount, fit: FitTime, ended_at: float, *, is_lost: bool) -> None:
    """Add the time of a fit; in proportion where it overlaps with time already accounted for."""
    end, total_s = min(fit.until, ended_at), fsum(fit.seconds.values())
    if end <= account.until or total_s <= 0:
        return
    length_s = end - account.until
    for bucket, spent_s in fit.seconds.items():
        into = Bucket.REPLAY if is_lost and bucket is Bucket.TRAINING else bucket
        # Dividing first: the quotient of two lengths is at most one, while `length_s / total_s` may overflow.
        account.advance(min(end, account.until + spent_s / total_s * length_s), into)
    account.until = end
