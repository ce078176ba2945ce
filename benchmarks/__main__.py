"""Run all benchmarks, one after another: `python -m benchmarks [--quick] [--folder FOLDER]`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

PROGRAMS = (
    "steady_state",
    "vote",
    "recovery",
    "scale",
    "projection",
    "cold_start",
    "durable",
    "elastic",
    "rewind",
    "audit",
    "drain",
    "goodput",
)


def main() -> int:
    """Run each program in its own process; stop at the first that fails.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"The benchmarks: {', '.join(PROGRAMS)}.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: a smoke test, not a measurement")
    about = "folder for JSON and tables (default: %(default)s)"
    parser.add_argument("--folder", type=Path, default=Path("bench"), help=about)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for program in PROGRAMS:
        results = [f"--json={args.folder / program}.json", f"--markdown={args.folder / program}.md"]
        quick = ["--quick"] if args.quick else []
        done = subprocess.run([sys.executable, "-m", f"{__package__}.{program}", *results, *quick], check=False)
        if done.returncode:
            return done.returncode
    print(f"results: {args.folder}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
