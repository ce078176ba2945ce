"""What the benchmarks share.

| Module | What it has |
|---|---|
| `report` | a program: options, wait for a quiet machine, progress, output |
| `table` | tables, and statistics of their cells |
| `machine` | hardware, versions and load |
| `processes` | launchers, commands that are ended completely, scratch folders, busy loops |
| `wire` | notes from the processes of a job |
| `watch` | a job that is followed by its notes |
| `scenario` | a way to start a job; a started one |
| `kills` | kills of ranks, in alternating blocks, and whether the recovered jobs are exact |
| `turns` | jobs that train in turns |
| `variants` | step times of jobs that train in turns |
| `nodes` | agents that are killed and rejoin |
| `world` | processes that only call a function |
"""
