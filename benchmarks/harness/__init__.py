"""What the benchmarks share.

| Module | What it has |
|---|---|
| `benchmark` | a benchmark: its options, a wait for a quiet machine, progress, output |
| `table` | tables, and statistics of their cells |
| `processes` | launchers, commands that are ended completely, scratch folders |
| `wire`, `watch` | notes from the processes of a job; a job that is followed by them |
| `scenario` | a way to start a job; a started one |
| `kills` | ranks that are killed |
| `turns` | jobs that train in turns, and their step times |
| `world` | processes that only call a function |
"""
