"""Test combinations of Python, torch and Lightning, each in its own environment, and print a table.

python -m tests.versions                  the lowest, a middle and the newest combination
python -m tests.versions LEG ...          given combinations, one per file requirements-LEG.txt
python -m tests.versions --all --record   all, and record the results in docs/compatibility.md
python -m tests.versions --keep FOLDER    keep the environments and reuse them the next time
python -m tests.versions --wheel          build the wheel into dist/ and test it with the pinned versions

A leg takes about 5 GB of disk and five minutes, mostly to download torch. With PIP_EXTRA_INDEX_URL set to an index of
CPU builds of torch it takes a tenth of that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.versions.environment import Environment, FailedError, build_wheel, require_disk_space, timed
from tests.versions.legs import REPOSITORY, USUAL, Leg, legs
from tests.versions.table import HEADER, IDENTICAL, NOT_INSTALLED, Row, record, row


def main() -> int:
    """Run the command; return 0 if everything passed."""
    known = legs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("legs", nargs="*", metavar="LEG", choices=[*known, []])
    parser.add_argument("--all", action="store_true", help="test all legs")
    parser.add_argument("--record", action="store_true", help="record the results in docs/compatibility.md")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep the environments in this folder (default: remove them)"
    )
    parser.add_argument(
        "--where-possible", action="store_true", help="do not count a leg that cannot be installed here as a failure"
    )
    parser.add_argument("--wheel", action="store_true", help="only build the wheel into dist/ and test it")
    args = parser.parse_args()
    wheel = build_wheel(sys.executable, REPOSITORY / "dist")
    if args.wheel:
        return _test_wheel(wheel)
    rows = [_test_leg(known[name], wheel, args.keep) for name in (known if args.all else args.legs or USUAL)]
    print("\n".join([f"\n{HEADER}", *map(str, rows)]))
    if args.record:
        record(rows)
    return 0 if all(made.passed or (args.where_possible and not made.is_installed) for made in rows) else 1


def _test_leg(leg: Leg, wheel: Path, keep: Path | None) -> Row:
    print(f"{leg.name}: Python {leg.python}, torch {leg.pins['torch']}, lightning {leg.pins['lightning']}", flush=True)
    if (interpreter := leg.interpreter()) is None:
        print(f"  Python {leg.python} is not installed: using {sys.version.split()[0]}")
    with TemporaryDirectory(prefix=f"versions-{leg.name}-") as scratch:
        environment = Environment((keep or Path(scratch)).absolute() / leg.name, leg.constraints())
        made = row(leg)
        try:
            made = made.with_example(NOT_INSTALLED)
            with timed("installing the wheel into an empty environment"):
                require_disk_space(Path(scratch))
                environment.make(interpreter or Path(sys.executable))
                environment.install_wheel(f"{wheel}[cli]")
            made = made.with_example("fails").found(*environment.versions())
            with timed("training the README's example, with a kill"):
                environment.drill_readme(Path(scratch) / "readme")
            made = made.with_example(IDENTICAL)
            with timed("running the selected tests"):
                made = made.with_tests(environment.test())
        except FailedError as error:
            print(f"\n{error}", flush=True)
    return made


def _test_wheel(wheel: Path) -> int:
    with TemporaryDirectory(prefix="wheel-") as scratch:
        environment = Environment(Path(scratch) / "env", (REPOSITORY / "constraints.txt").read_text())
        with timed(f"installing {wheel.name} into an empty environment"):
            environment.make(Path(sys.executable))
            environment.install_wheel(str(wheel))
        with timed("training the README's example, with a kill"):
            environment.drill_readme(Path(scratch) / "readme")
    print(wheel.relative_to(REPOSITORY))
    return 0


if __name__ == "__main__":
    sys.exit(main())
