"""The profile of a thread has one row per file, with the calls of one version."""

from __future__ import annotations

import cProfile
import json

from benchmarks.fixed_cost import profile_of
from benchmarks.jobs.profiled import MIRROR, _by_part


def test_calls_are_counted_per_version() -> None:
    ranks = [{"versions": 2, "profiles": {MIRROR: {"a": [4, 2, 0.002], "b": [2, 0, 0.00001]}}} for _ in range(2)]
    table = profile_of(MIRROR, [{"ranks": [rank]} for rank in ranks])
    assert table.rows == [("all", "3.0", "1.0", "1005", "100%"), ("a", "2.0", "1.0", "1000", "100%")]


def test_built_in_functions_count_for_the_file_that_calls_them() -> None:
    profile = cProfile.Profile()
    profile.runcall(json.dumps, [1])
    [(name, (calls, built_in, took_s))] = _by_part(profile).items()
    assert name == "Python's library"
    assert calls >= 2
    assert built_in >= 1
    assert took_s > 0
