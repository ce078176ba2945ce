"""Benchmarks: each program prints tables and writes JSON with the machine, the versions and all repeats.

| Program | What it measures |
|---|---|
| `python -m benchmarks.steady_state` | the cost of mirroring every step while nothing fails |
| `python -m benchmarks.staging` | copying a shard into shared memory, against memcpy |
| `python -m benchmarks.sharded` | mirroring of large models, DDP and FSDP2: bytes, steps |
| `python -m benchmarks.durable` | the cost of durable states, and when they are on disk |
| `python -m benchmarks.recovery` | SIGKILL to the first step finished by all ranks, ours and other tools |
| `python -m benchmarks.growth` | the same by number of ranks |
| `python -m benchmarks.scale` | 8 to 64 ranks: times, and what each rank needs of the machine |
| `python -m benchmarks.projection` | 64 to 8,192 ranks: the real decisions and a model of the network |
| `python -m benchmarks.elastic` | a node is lost and rejoins: times, samples |
| `python -m benchmarks.cold_start` | command to the first optimizer step |

A program names its scenarios, its quantities and the columns of its tables. `harness` has what they share, and `jobs`
what runs in the processes of a job. `results` has the measured tables by date, and `plots` draws those of the page.
"""
