"""What Lightning's loggers receive under `ckptless/`, as of the step that is logged.

Apart from `report`, because it is pure: the names and units of the values are the user's interface, and all are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

from lightning_ckptless.protocol.mtbf import Mtbf
from lightning_ckptless.protocol.phases import PHASE_FIELDS, Phases
from lightning_ckptless.protocol.run_counts import RunCounts
from lightning_ckptless.protocol.time_account import Bucket, TimeAccount
from lightning_ckptless.replica.mirror.mirror import MirrorStats


@dataclass(frozen=True, slots=True)
class TakenVersion:
    """The version that was taken last.

    Args:
        stall_s: seconds for which the training thread waited for the version before.
        cost_s: seconds that handing it to the mirror took.
        stats: statistics of the mirror.
    """

    stall_s: float
    cost_s: float
    stats: MirrorStats


def logged_values(
    taken: TakenVersion,
    account: TimeAccount,
    mtbf: Mtbf,
    last: Phases | None,
    counts: RunCounts,
) -> dict[str, float]:
    """Return the values by name.

    Args:
        taken: the version that was taken last.
        account: the time of the run.
        mtbf: its mean time between failures.
        last: phases of the last recovery; None if there was none.
        counts: what the run has counted.
    """
    stats = taken.stats
    values = {
        "goodput": account.goodput,
        "goodput_1h": account.recent_goodput,
        "recoveries": float(counts.recoveries),
        "rewinds": float(counts.rewinds),
        "steps_replayed": float(counts.steps_replayed),
        "mtbf_s": mtbf.mean_s if mtbf.failures else nan,
        "mtbf_low_s": mtbf.low_s,
        "mtbf_high_s": mtbf.high_s if mtbf.failures else nan,
        "mirror_ms": 1e3 * stats.last_round_s,
        "mirror_stall_ms": 1e3 * taken.stall_s,
        "mirror_submit_ms": 1e3 * taken.cost_s,
        "mirror_skipped": float(stats.skipped + stats.aborted),
        "mirrored_bytes": float(stats.staged_bytes + stats.sent_bytes) / max(1, stats.committed),
        "recovery_s": 0.0 if last is None else last.total_s,
    }
    values |= {f"recovery_{name}": 0.0 if last is None else getattr(last, name) for name in PHASE_FIELDS}
    return values | {f"time_{bucket}_s": account.seconds.get(bucket, 0.0) for bucket in Bucket}
