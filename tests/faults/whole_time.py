"""The time of every run in the fault tests: its buckets sum to its wall time, whatever happened to it.

Apart from `conftest`, because it is a check and no fixture.
"""

from __future__ import annotations

from math import fsum
from pathlib import Path

from lightning_ckptless.cli.time_spent import run_time
from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.protocol.time_account import Bucket

SHARE = 1e-3
"""Largest share of the wall time by which the sum of the buckets may differ from it."""


def require_whole_time(ledger: Path) -> None:
    """Require that each report of a run, and the account of all of it, sum to the wall time.

    Raises:
        AssertionError: they do not, a report goes back in time, or a recovery took no time.
    """
    events = read_ledger(ledger).events
    until = 0.0
    for report in (event.fields for event in events if event.event == "time_spent"):
        wall_s = report["until"] - report["began_at"]
        assert abs(fsum(report["seconds"].values()) - wall_s) <= SHARE * wall_s, report
        assert report["until"] >= until, f"a report until {report['until']} follows one until {until}"
        until = report["until"]
    if not events:
        return
    account = run_time(events).account
    wall_s = max(event.at for event in events) - account.began_at
    assert abs(fsum(account.seconds.values()) - wall_s) <= SHARE * wall_s, (account, wall_s)
    if until and any(event.event == "recovery" for event in events):
        assert sum(account.seconds.get(bucket, 0.0) for bucket in (Bucket.RESTORE, Bucket.ELASTIC_TRANSITION)) > 0
