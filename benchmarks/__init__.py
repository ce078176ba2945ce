"""Benchmarks: each program prints a table and writes JSON with the machine, the versions and all repeats.

| Program | What it measures |
|---|---|
| `python -m benchmarks.steady_state` | the cost of mirroring every step while nothing fails |
| `python -m benchmarks.recovery` | SIGKILL to the first step finished by all ranks, ours and other tools |
| `python -m benchmarks.relaunch` | the same with a relaunch of all ranks |
| `python -m benchmarks.cold_start` | command to the first optimizer step |
| `python -m benchmarks.interference` | the cost of the mirror thread to training, by its scheduling |
| `python -m benchmarks.sharded` | mirroring of large models, DDP and FSDP2: bytes, staging, steps |
"""
