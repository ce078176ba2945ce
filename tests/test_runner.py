"""What is left of a run when its agent ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless import runner
from lightning_ckptless.membership.launch.torchrun import config_from_torchrun_args
from lightning_ckptless.protocol.run_end import Conclusion, RunOutcome


@pytest.mark.parametrize(
    ("line", "is_named"),
    [("--rdzv-id mine train.py", True), ("train.py --rdzv-id mine", False), ("train.py --rdzv_id=mine", False)],
)
def test_only_an_option_names_a_run(line: str, is_named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[RunOutcome] = []

    def run_agent(argv: Sequence[str], *, ended: Callable[..., str], **_: Any) -> int:
        ended(config_from_torchrun_args(argv), None)
        return 0

    def conclude(outcome: RunOutcome) -> Conclusion:
        outcomes.append(outcome)
        return Conclusion(keeps_arenas=False)

    monkeypatch.setattr(runner, "run_agent", run_agent)
    monkeypatch.setattr(runner, "conclude", conclude)
    assert runner.main([f"--run-root={tmp_path}", *line.split()]) == 0
    (outcome,) = outcomes
    assert outcome.is_named == is_named
    assert outcome.command.startswith("ckptless run --rdzv-id=") != is_named
    assert outcome.command.endswith(line)
