"""Who is alive and who is which rank: the agent, its fork server, and the numbering of generations.

Nothing here knows Lightning or the replicas. Importing this package, `launch`, `parent`, `cold` or `reaper` imports no
torch; `agent`, `workers` and `generation` do.
"""
