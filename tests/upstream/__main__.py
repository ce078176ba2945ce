"""`python -m tests.upstream`: run Lightning's tests with DDP and with our strategy, and print the differences."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from packaging.version import Version

# Set before torch is imported. Small tensors do not need more threads, and a single-threaded process can be forked.
os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"})

from tests.upstream.comparison import Comparison, comparable, compare, draft, read_expected, summary
from tests.upstream.runs import Outcomes, Runner
from tests.upstream.sources import Sources, SourcesError, find_sources

HERE = Path(__file__).parent
LIGHTNING = "LIGHTNING_REPOSITORY"
DIFFERENT, NO_SOURCES, TERMINATED = 1, 2, 143


def main() -> int:
    """Run the command; return the exit code."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        sources = find_sources(args.lightning, args.folder, Version(version("lightning")), args.tag)
    except SourcesError as error:
        print(error, file=sys.stderr)
        return NO_SOURCES
    label = f"lightning-{sources.tag or 'given'}-torch-{version('torch')}"
    base = Runner(sources, "ddp", args.folder / label / "ddp")
    if args.discover:
        return discover(sources, base, args)
    ours = Runner(sources, "ckptless", args.folder / label / "ckptless")
    tests = [test for test in args.list.read_text().splitlines() if is_chosen(test, args.tests)]
    if not tests:
        print(f"no test in {args.list} starts with {' or '.join(args.tests)}", file=sys.stderr)
        return NO_SOURCES
    print(f"{len(tests)} tests of Lightning {sources.tag} in {sources.tests}", flush=True)
    comparison = run_and_compare(base, ours, tests, args)
    (args.folder / "result.json").write_text(json.dumps(asdict(comparison), indent=1))
    print(draft(comparison.differences) if args.draft else table(comparison), flush=True)
    return DIFFERENT if comparison.unexpected else 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__)
    parser.add_argument(
        "tests", nargs="*", help="prefixes of test ids, such as `trainer/` or `a.py::test_b` (default: all)"
    )
    parser.add_argument(
        "--lightning",
        type=Path,
        default=os.environ.get(LIGHTNING),
        metavar="PATH",
        help=f"a clone of Lightning's repository or a folder with its tests (default: ${LIGHTNING}, or a new clone)",
    )
    parser.add_argument(
        "--tag", help="release whose tests are run (default: the newest one up to the installed version)"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/upstream"), help="folder for sources and results")
    parser.add_argument(
        "--list", type=Path, default=HERE / "tests.txt", help="file with the ids of the tests to compare"
    )
    parser.add_argument("--expected", type=Path, default=HERE / "expected.toml", help="file with expected differences")
    parser.add_argument(
        "--resume", action="store_true", help="reuse the outcomes of an interrupted run with our strategy"
    )
    parser.add_argument("--draft", action="store_true", help="print the differences in the format of the expected ones")
    parser.add_argument(
        "--discover", action="store_true", help="run all tests with DDP and write the list of tests to compare"
    )
    return parser.parse_args()


def run_and_compare(base: Runner, ours: Runner, tests: Sequence[str], args: argparse.Namespace) -> Comparison:
    """Run the tests file by file with both strategies; repeat tests with unexpected differences once."""
    expected = read_expected(args.expected)
    outcomes: tuple[Outcomes, Outcomes] = ({}, {})
    for file, group in groupby(tests, file_of):
        began_at, wanted = time.monotonic(), list(group)
        theirs = base.run(file, wanted)
        passed = [test for test in wanted if test in theirs and theirs[test].result == "passed"]
        if not args.resume:
            ours.forget(file)
        found = ours.run(file, passed) if passed else {}
        unexpected = [difference.test for difference in compare(theirs, found, expected).unexpected]
        if unexpected:
            found |= ours.run(file, unexpected, trial="again-")
        for collected, of_file in zip(outcomes, (theirs, found), strict=True):
            collected.update(of_file)
        print(line_of(file, compare(theirs, found, expected), time.monotonic() - began_at), flush=True)
    return compare(*outcomes, expected)


def discover(sources: Sources, base: Runner, args: argparse.Namespace) -> int:
    """Run all test files with DDP, and write the list of tests that can be compared."""
    found = list[str]()
    for path in sorted(sources.tests.rglob("test_*.py")):
        file = str(path.relative_to(sources.tests))
        if not is_chosen(file, args.tests):
            continue
        outcomes = base.run(file)
        found += comparable(outcomes)
        counts = Counter(outcome.result for outcome in outcomes.values() if outcome.trainers)
        print(f"{file}: {dict(counts)} of {len(outcomes)}", flush=True)
    args.list.write_text("".join(f"{test}\n" for test in found))
    print(f"{len(found)} tests in {args.list}")
    return 0


def is_chosen(test: str, prefixes: Sequence[str]) -> bool:
    """Whether a test or file starts with one of the prefixes; true if there are none."""
    return not prefixes or test.startswith(tuple(prefixes))


def file_of(test: str) -> str:
    """Return the file of a test."""
    return test.partition("::")[0]


def line_of(file: str, comparison: Comparison, seconds: float) -> str:
    """Return the line that is printed when a file is finished."""
    counts = {
        "same": len(comparison.same),
        "expected": len(comparison.differences) - len(comparison.unexpected),
        "DIFFERENT": len(comparison.unexpected),
    }
    summarized = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{seconds:6.1f} s  {file}: {summarized or 'nothing to compare'}"


def table(comparison: Comparison) -> str:
    """Return the report: all differences, stale entries, and the number of equal tests."""
    lines = list[str]()
    for title, group in (
        ("expected", [d for d in comparison.differences if d.is_expected]),
        ("unexpected", comparison.unexpected),
    ):
        lines += [f"\n{len(group)} {title} differences"] if group else []
        lines += [f"  {d.test}\n    {d.reason or summary(d.found)} ({d.found.place or d.found.result})" for d in group]
    lines += [f"\n{len(comparison.stale)} entries of the list are no longer needed"] if comparison.stale else []
    lines += [f"  {entry}" for entry in comparison.stale]
    counts = f"{len(comparison.same)} tests pass with both, {len(comparison.differences)} with DDP alone"
    return "\n".join([*lines, f"\n{counts}, {len(comparison.unexpected)} of them unexpectedly"])


if __name__ == "__main__":
    sys.exit(main())
