"""The soak test: random faults in random configurations; each run is compared with an undisturbed one.

| Module | What it has |
|---|---|
| `scenario` | what a run trains, and its faults |
| `draw` | the scenario of a seed |
| `run` | runs and judges a scenario |
| `one_node`, `nodes` | a scenario with the agent in this process, and with several agents |
| `stage` | folders, and undisturbed runs |
| `outside` | faults that other processes cause |
| `watching` | what is known of a run while it runs |
| `processes` | processes that may be harmed, and those left behind |
| `stuck` | the state of workers before a run misses its deadline |
| `bounds` | time limits |
| `evidence` | recoveries and lost steps |
| `results`, `summary` | results of runs, and their tables |
"""
