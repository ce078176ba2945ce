"""The soak test: random faults in random configurations; each run is compared with an undisturbed one.

| Module | What it has |
|---|---|
| `scenario`, `draw` | what a run trains, and its faults; the scenario of a seed |
| `run` | a scenario from start to verdict, with a search for leaks |
| `one_node`, `nodes` | a scenario with the agent in this process, and with several agents |
| `outside` | faults that other processes cause, and the moments at which they do |
| `stage` | the folders of a run, and undisturbed runs |
| `judge` | time limits, lost steps and outcomes |
| `results` | results of all runs, and their tables |
"""
