"""The differences between two runs of the same tests, and which of them are expected."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.upstream.runs import Outcome, Outcomes

NOT_RUN = Outcome("not run", "the test was not found or its file could not be imported: see the output")


@dataclass(frozen=True, slots=True)
class Difference:
    """A test that passes with DDP and does not with our strategy.

    Args:
        test: its id.
        found: outcome with our strategy.
        entry: its id, or the id without parameters if that is listed.
        reason: why the difference is expected; empty if it is not.
    """

    test: str
    found: Outcome
    entry: str
    reason: str = ""

    @property
    def is_expected(self) -> bool:
        """Whether the difference is in the list of expected ones."""
        return bool(self.reason)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of the comparison.

    Args:
        same: tests that pass with both strategies.
        differences: tests that pass with DDP only.
        stale: expected differences whose tests were compared and all pass with both.
    """

    same: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    @property
    def unexpected(self) -> list[Difference]:
        """The differences that are not listed."""
        return [difference for difference in self.differences if not difference.is_expected]


def compare(base: Mapping[str, Outcome], ours: Mapping[str, Outcome], expected: Mapping[str, str]) -> Comparison:
    """Compare the tests that pass with DDP.

    Args:
        base: outcomes with DDP.
        ours: outcomes with our strategy.
        expected: reasons by test id; an id without parameters covers all parameters.
    """
    comparison, compared, differing = Comparison(), set[str](), set[str]()
    for test, outcome in base.items():
        if outcome.result != "passed":
            continue
        entry = entry_for(test, expected)
        compared.add(entry)
        found = ours.get(test, NOT_RUN)
        if found.result == "passed":
            comparison.same.append(test)
        else:
            differing.add(entry)
            comparison.differences.append(Difference(test, found, entry, expected.get(entry, "")))
    comparison.stale.extend(entry for entry in expected if entry in compared - differing)
    return comparison


def entry_for(test: str, expected: Mapping[str, str]) -> str:
    """Return the entry for a test: its id, or the id without parameters if only that is listed."""
    bare = test.partition("[")[0]
    return test if test in expected or bare not in expected else bare


def comparable(outcomes: Outcomes) -> list[str]:
    """Return the tests that pass and have trained with the forced strategy."""
    return sorted(test for test, outcome in outcomes.items() if outcome.result == "passed" and outcome.trainers)


def read_expected(path: Path) -> dict[str, str]:
    """Read the list of expected differences: reasons by test id."""
    groups = tomllib.loads(path.read_text()).get("difference", [])
    return {test: group["reason"] for group in groups for test in group["tests"]}


def draft(differences: Iterable[Difference]) -> str:
    """Return an up-to-date list of expected differences; those without a reason are grouped by error."""
    groups = defaultdict[str, set[str]](set)
    for difference in differences:
        groups[difference.reason or f"TODO: {summary(difference.found)}"].add(difference.entry)
    return "\n".join(_group(reason, tests) for reason, tests in groups.items())


def _group(reason: str, tests: Iterable[str]) -> str:
    listed = "".join(f"    {quoted(test)},\n" for test in sorted(tests))
    return f"[[difference]]\nreason = {quoted(reason)}\ntests = [\n{listed}]\n"


def quoted(text: str) -> str:
    """Return a text as a TOML basic string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def summary(outcome: Outcome) -> str:
    """Return the start of an error message, on one line."""
    first = next(iter(outcome.message.splitlines()), "") or outcome.result
    return first if len(first) <= 160 else f"{first[:157]}..."
