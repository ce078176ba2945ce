"""Events of one rank, and the package's warnings among them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lightning_ckptless.ledger import Ledger, read_ledger
from lightning_ckptless.trainer.reporting.rank_ledger import RankLedger, WarningsInLedger


def test_warnings_are_recorded_while_attached(tmp_path: Path) -> None:
    recorded = WarningsInLedger(RankLedger(Ledger(tmp_path / "ledger.jsonl"), lambda: 3, lambda: 2))
    log = logging.getLogger("lightning_ckptless.replica.mirror.mirror")
    recorded.attach()
    log.warning("ckptless: rank %d: late", 3)
    log.info("ckptless: not a warning")
    logging.getLogger("elsewhere").warning("of another package")
    recorded.detach()
    log.warning("ckptless: too late")
    (event,) = read_ledger(tmp_path / "ledger.jsonl")
    assert (event.event, event.rank, event.generation) == ("warning", 3, 2)
    assert event.fields["text"] == "rank 3: late"


def test_a_ledger_that_cannot_be_written_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    recorded = WarningsInLedger(RankLedger(Ledger(tmp_path / "file" / "ledger.jsonl"), lambda: 0, lambda: 1))
    recorded.attach()
    try:
        logging.getLogger("lightning_ckptless").warning("ckptless: something")
    finally:
        recorded.detach()
    assert sum("cannot write, later events will be missing" in message for message in caplog.messages) == 1
