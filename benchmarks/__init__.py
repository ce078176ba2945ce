"""Benchmarks: each program answers one question, and prints tables with the machine, the versions and the load.

| Program | Question |
|---|---|
| `recovery` | How long does training pause when a rank is killed, with ours and with other tools? |
| `scale` | How do start, version, recovery and the needs of a rank grow from 2 to 64 ranks? |
| `projection` | And with thousands of ranks, by a model of the network? |
| `elastic` | How long is the pause when a node is lost and rejoins? |
| `drain` | How long is the pause when a rank is drained? |
| `rewind` | How long does a rewind take? |
| `steady_state` | What does a version cost while nothing fails, with DDP or FSDP2, on CPUs or a device? |
| `vote` | What does a vote cost? |
| `durable` | What do durable states cost, and when are they on disk? |
| `cold_start` | How soon does training begin? |
| `audit` | How many flipped bits and wrong ranks are found, and is anything left of them? |
| `goodput` | Is the forecast of the goodput right? |

`python -m benchmarks.NAME` runs one, `python -m benchmarks` all of them. `harness` has what they share, `jobs` what
runs in the processes of a job, `model` what `projection` computes with, and `rivals` the jobs of other tools. `results`
has the measured tables by date, and `plots` draws those of the documentation.
"""

PROGRAMS = (
    "steady_state", "vote", "recovery", "scale", "projection", "cold_start", "durable", "elastic", "rewind", "audit",
    "drain", "goodput",
)  # fmt: skip
