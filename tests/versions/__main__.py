"""Try versions of Python, torch and Lightning, each in an environment of its own, and print a table.

python -m tests.versions                  the lowest, one in the middle, and the newest
python -m tests.versions LEG ...          others: a leg for every file requirements-LEG.txt
python -m tests.versions --all --record   all, and put the results into docs/compatibility.md
python -m tests.versions --keep FOLDER    keep the environments, to use them again the next time
python -m tests.versions --wheel          build the wheel into dist/ and try it with the usual versions

A leg takes 5 GB of disk while it runs and about five minutes, most of them for torch's download. PIP_EXTRA_INDEX_URL
with an index of torch's CPU builds makes it a tenth of that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.versions.environment import Environment, FailedError, build_wheel, require_room, timed
from tests.versions.legs import REPOSITORY, USUAL, Leg, legs
from tests.versions.table import HEADER, IDENTICAL, NOT_INSTALLED, Row, record, row


def main() -> int:
    """Exit code: 0 where everything passed."""
    known = legs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("legs", nargs="*", metavar="LEG", choices=[*known, []])
    parser.add_argument("--all", action="store_true", help="every leg")
    parser.add_argument("--record", action="store_true", help="put the results into the page on compatibility")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of the environments, which stay; else they go")
    parser.add_argument(
        "--where-possible", action="store_true", help="a leg that cannot be installed here is named, and no failure"
    )
    parser.add_argument("--wheel", action="store_true", help="build the wheel into dist/ and try it, nothing else")
    args = parser.parse_args()
    wheel = build_wheel(sys.executable, REPOSITORY / "dist")
    if args.wheel:
        return _try_wheel(wheel)
    rows = [_try(known[name], wheel, args.keep) for name in (known if args.all else args.legs or USUAL)]
    print("\n".join([f"\n{HEADER}", *map(str, rows)]))
    if args.record:
        record(rows)
    return 0 if all(made.passed or (args.where_possible and not made.is_installed) for made in rows) else 1


def _try(leg: Leg, wheel: Path, keep: Path | None) -> Row:
    print(f"{leg.name}: Python {leg.python}, torch {leg.pins['torch']}, lightning {leg.pins['lightning']}", flush=True)
    if (interpreter := leg.interpreter()) is None:
        print(f"  there is no Python {leg.python} here: tried with {sys.version.split()[0]}")
    with TemporaryDirectory(prefix=f"versions-{leg.name}-") as scratch:
        environment = Environment((keep or Path(scratch)).absolute() / leg.name, leg.constraints())
        made = row(leg)
        try:
            made = made.with_example(NOT_INSTALLED)
            with timed("installing the wheel into an empty environment"):
                require_room(Path(scratch))
                environment.make(interpreter or Path(sys.executable))
                environment.install_wheel(f"{wheel}[cli]")
            made = made.with_example("fails").found(*environment.versions())
            with timed("training the README's example, with a kill"):
                environment.drill_readme(Path(scratch) / "readme")
            made = made.with_example(IDENTICAL)
            with timed("running the telling tests"):
                made = made.with_tests(environment.test())
        except FailedError as error:
            print(f"\n{error}", flush=True)
    return made


def _try_wheel(wheel: Path) -> int:
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
