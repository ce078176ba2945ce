"""Rounds of the rendezvous: each has a store of its own for the workers that it brings together."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import WorkerGroup

from lightning_ckptless.membership.generation import skip_generations

_TIMEOUT_S = 60.0
_ROUNDS_KEY = "ckptless/rounds"


def worker_store(worker_group: WorkerGroup) -> TCPStore:
    """The store that the workers of a round meet in."""
    group: Any = worker_group  # torch declares its fields as None, which they are before the first rendezvous
    return TCPStore(group.master_addr, group.master_port, is_master=False, timeout=timedelta(seconds=_TIMEOUT_S))


def number_generations(worker_group: WorkerGroup, store: TCPStore) -> None:
    """Let the numbers of generations grow over the rounds, each of which has a new store."""
    group: Any = worker_group
    skip_generations(store, group.store.underlying_store.add(_ROUNDS_KEY, 1) - 1)
