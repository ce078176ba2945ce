"""Measures that decide: each program prints a table and writes JSON with the machine, the versions and all repeats.

| Program | What it measures |
|---|---|
| `python -m benchmarks.steady_state` | what mirroring every step costs while nothing fails |
| `python -m benchmarks.relaunch` | SIGKILL to the first step finished by all |
| `python -m benchmarks.cold_start` | command to the first optimizer step |
"""
