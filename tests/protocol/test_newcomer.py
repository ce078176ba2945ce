"""What is said of a regrouping that took long."""

from __future__ import annotations

import pytest

from lightning_ckptless.protocol.newcomer import Arrival, Imports, why_slow


@pytest.mark.parametrize("imports", Imports)
def test_what_would_help_where_modules_were_imported(imports: Imports) -> None:
    arrivals = [Arrival(0.4, 900, imports), Arrival(1.9, 812, imports)]
    said = why_slow(2.1, arrivals)
    assert said.startswith("1.9 s of it on the way of a new process to fit, where it imported 812 modules: ")
    assert "standbys=1" in said
    assert ("preload_imports=True" in said) == (imports is Imports.OFF)
    assert ("the next one finds them imported" in said) == (imports in (Imports.WAITING, Imports.IMPORTING))


def test_what_would_help_where_the_script_does_something_else() -> None:
    said = why_slow(2.1, [Arrival(1.9, 3, Imports.READY)])
    assert said.startswith("1.9 s of it on the way of a new process to fit, in what the script does before that: ")
    assert said.endswith("standbys=1 would avoid that")


@pytest.mark.parametrize(
    ("regroup_s", "arrivals"),
    [(0.9, [Arrival(0.8, 900, Imports.OFF)]), (5.0, [Arrival(0.8, 900, Imports.OFF)]), (5.0, [])],
)
def test_nothing_where_it_was_quick_or_not_for_a_new_process(regroup_s: float, arrivals: list[Arrival]) -> None:
    assert why_slow(regroup_s, arrivals) == ""
