"""`python -m tests.simulation`: explores more seeds than the suite does, or shows what happens under one.

python -m tests.simulation --seeds 5000 --first 2000
python -m tests.simulation --scenario "two nodes" --seed 17
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.explore import SCENARIOS, failing_seeds, run
from tests.simulation.tasks import Carriers, carriers


def main() -> int:
    """Run what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Simulate recoveries.")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=1000, help="how many per scenario (default: 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--seed", type=int, help="run this one alone, and show what happens")
    asked = parser.parse_args()
    names = asked.scenario or list(SCENARIOS)
    with carriers() as threads:
        if asked.seed is None:
            return _explore(names, range(asked.first, asked.first + asked.seeds), threads)
        return _show(names, asked.seed, threads)


def _show(names: list[str], seed: int, threads: Carriers) -> int:
    for name in names:
        print(f"--- {name}")
        print("\n".join(run(SCENARIOS[name], seed, threads).events_log))
    return 0


def _explore(names: list[str], seeds: range, threads: Carriers) -> int:
    count = 0
    for name in names:
        began_at = time.process_time()
        failing = failing_seeds(SCENARIOS[name], seeds, threads)
        each_ms = 1000 * (time.process_time() - began_at) / len(seeds)
        print(f"{name}: {len(seeds)} seeds, {each_ms:.1f} ms each, {len(failing)} failing", flush=True)
        for error in failing.values():
            print(f"  {error.splitlines()[0]}")
        count += len(failing)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
