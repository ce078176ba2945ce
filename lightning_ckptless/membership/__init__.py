"""Membership: which processes are alive and which rank each of them is.

The agent, its fork server, and the numbering of generations. Nothing here knows Lightning or the replicas. Importing
this package, `launch` or `forkserver.client` imports no torch; `agent` and `rendezvous` do.
"""
