"""The explanation of a slow regrouping."""

from __future__ import annotations

import pytest

from lightning_ckptless.protocol.replacement_startup import Arrival, Imports, why_slow


@pytest.mark.parametrize("imports", Imports)
def test_advice_if_modules_were_imported(imports: Imports) -> None:
    arrivals = [Arrival(0.4, 900, imports), Arrival(1.9, 812, imports)]
    text = why_slow(2.1, arrivals)
    assert text.startswith("1.9 s of it for a new process to reach fit, importing 812 modules: ")
    assert "standbys=1" in text
    assert ("preload_imports=True" in text) == (imports is Imports.OFF)
    assert ("the next one finds them imported" in text) == (imports in (Imports.WAITING, Imports.IMPORTING))


def test_advice_if_the_script_spent_the_time_otherwise() -> None:
    text = why_slow(2.1, [Arrival(1.9, 3, Imports.READY)])
    assert text.startswith("1.9 s of it for a new process to reach fit, spent in the script before fit: ")
    assert text.endswith("standbys=1 avoids that")


@pytest.mark.parametrize(
    ("regroup_s", "arrivals"),
    [(0.9, [Arrival(0.8, 900, Imports.OFF)]), (5.0, [Arrival(0.8, 900, Imports.OFF)]), (5.0, [])],
)
def test_no_explanation_if_it_was_fast_or_slow_for_another_reason(regroup_s: float, arrivals: list[Arrival]) -> None:
    assert why_slow(regroup_s, arrivals) == ""
