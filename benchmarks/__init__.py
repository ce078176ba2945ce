"""Measures that decide: each program prints a table and writes JSON with the machine, the versions and all repeats.

| Program | What it measures |
|---|---|
| `python -m benchmarks.steady_state` | what mirroring every step costs while nothing fails |
| `python -m benchmarks.recovery` | SIGKILL to the first step finished by all, ours beside others |
| `python -m benchmarks.relaunch` | the same where all ranks are started again |
| `python -m benchmarks.cold_start` | command to the first optimizer step |
| `python -m benchmarks.interference` | what the mirror's thread takes from training, by how it behaves |
| `python -m benchmarks.sharded` | mirroring of large models, data-parallel and sharded: bytes, staging, steps |
"""
