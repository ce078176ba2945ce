"""Which outcomes are differences, and which of them the list of expected differences covers."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.upstream.comparison import comparable, compare, draft, read_expected
from tests.upstream.runs import Outcome

HERE = Path(__file__).parent
PASSED, FAILED = Outcome("passed", trainers=1), Outcome("failed", 'AssertionError: "a" \\ b\nmore', "test_a.py:7", 1)


def test_only_tests_that_pass_with_ddp_are_compared() -> None:
    base = {"a": PASSED, "b": PASSED, "c": FAILED, "d": Outcome("skipped")}
    comparison = compare(base, {"a": PASSED, "b": FAILED, "c": PASSED, "d": FAILED}, {})
    assert comparison.same == ["a"]
    assert [difference.test for difference in comparison.unexpected] == ["b"]


@pytest.mark.parametrize("result", ["failed", "skipped", "died", "not run"])
def test_anything_but_a_pass_is_a_difference(result: str) -> None:
    assert compare({"a": PASSED}, {"a": Outcome(result)}, {}).unexpected[0].found.result == result


def test_a_test_that_was_not_run_is_a_difference() -> None:
    assert compare({"a": PASSED}, {}, {}).unexpected[0].found.result == "not run"


def test_a_listed_difference_has_its_reason_and_is_expected() -> None:
    comparison = compare({"a": PASSED}, {"a": FAILED}, {"a": "because"})
    assert comparison.unexpected == []
    assert comparison.differences[0].reason == "because"


def test_an_entry_without_parameters_covers_all_parameters() -> None:
    base, ours = {"a[1]": PASSED, "a[2]": PASSED, "ab[1]": PASSED}, {"a[1]": FAILED, "a[2]": PASSED, "ab[1]": FAILED}
    comparison = compare(base, ours, {"a": "because"})
    assert [difference.test for difference in comparison.unexpected] == ["ab[1]"]
    assert comparison.stale == []


def test_stale_entries_are_reported() -> None:
    base = {"a[1]": PASSED, "b": PASSED}
    assert compare(base, base, {"a": "because", "b": "because", "c": "was not run"}).stale == ["a", "b"]


def test_the_draft_is_a_valid_list(tmp_path: Path) -> None:
    comparison = compare(
        {"a": PASSED, "b[x\\n]": PASSED, "c": PASSED}, {"a": FAILED, "b[x\\n]": FAILED}, {"c": "because"}
    )
    path = tmp_path / "expected.toml"
    path.write_text(draft(comparison.differences))
    expected = read_expected(path)
    todo = 'TODO: AssertionError: "a" \\ b'
    assert expected == {"a": todo, "b[x\\n]": todo, "c": "because"}


def test_only_tests_that_train_with_the_forced_strategy_are_comparable() -> None:
    assert comparable({"b": PASSED, "a": PASSED, "c": Outcome("passed", trainers=0), "d": FAILED}) == ["a", "b"]


def test_every_expected_difference_is_a_listed_test() -> None:
    tests = (HERE / "tests.txt").read_text().splitlines()
    assert len(tests) == len(set(tests)) > 500
    groups = tomllib.loads((HERE / "expected.toml").read_text())["difference"]
    entries = [test for group in groups for test in group["tests"]]
    assert len(entries) == len(set(entries))
    assert [e for e in entries if e not in tests and not any(test.startswith(f"{e}[") for test in tests)] == []
