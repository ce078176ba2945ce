"""Benchmarks: each program prints tables and writes JSON with the machine, the versions and all repeats.

| Program | What it measures |
|---|---|
| `steady_state` | the cost of mirroring every step while nothing fails, with DDP or FSDP2, on CPUs or a device |
| `vote` | a vote in shared memory, between nodes, and over gloo |
| `durable` | the cost of durable states, and when they are on disk, with `async_save` for comparison |
| `recovery` | SIGKILL to the first step finished by all ranks, ours and other tools |
| `scale` | 2 to 64 ranks: times, and what each rank needs of the machine |
| `projection` | 64 to 8,192 ranks: the real decisions and a model of the network |
| `elastic` | the pauses when a node is lost and rejoins |
| `drain` | the pause when a rank is drained |
| `rewind` | the time of a rewind |
| `audit` | flipped bits that are found and healed |
| `goodput` | the forecast, compared with jobs whose ranks are killed |
| `cold_start` | command to the first optimizer step |

`python -m benchmarks.NAME` runs one, `python -m benchmarks` all of them. A program names its scenarios, its quantities
and the columns of its tables. `harness` has what they share, `jobs` what runs in the processes of a job, `model` what
`projection` computes with, and `rivals` the jobs of other tools. `results` has the measured tables by date, and `plots`
draws those of the page. `soak` is no measurement: it looks for bugs, by random faults.
"""
