"""Run all benchmarks, one after another; each writes its results as JSON and Markdown."""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks import PROGRAMS


def main() -> int:
    """Run each program in its own process; stop at the first that fails, and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"The benchmarks: {', '.join(PROGRAMS)}.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: a smoke test, not a measurement")
    parser.add_argument("--folder", default="bench", help="folder of the results (default: %(default)s)")
    args = parser.parse_args()
    options = [f"--folder={args.folder}", *(["--quick"] if args.quick else [])]
    for program in PROGRAMS:
        done = subprocess.run([sys.executable, "-m", f"{__package__}.{program}", *options], check=False)
        if done.returncode:
            return done.returncode
    print(f"results: {args.folder}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
