"""Rounds of the rendezvous, each with its own store for the workers that meet in it."""

from __future__ import annotations

from datetime import timedelta
from string import Template
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import Worker, WorkerGroup

from lightning_ckptless.membership.rendezvous.generation import skip_generations

_TIMEOUT_S = 60.0
_ROUNDS_KEY = "ckptless/rounds"


def worker_store(worker_group: WorkerGroup) -> TCPStore:
    """Connect to the store that the workers of a round meet in."""
    group: Any = worker_group  # torch declares its fields as None, which they are before the first rendezvous
    return TCPStore(group.master_addr, group.master_port, is_master=False, timeout=timedelta(seconds=_TIMEOUT_S))


def number_generations(worker_group: WorkerGroup, store: TCPStore) -> None:
    """Let generation numbers grow over the rounds, each of which has a new store."""
    group: Any = worker_group
    skip_generations(store, group.store.underlying_store.add(_ROUNDS_KEY, 1) - 1)


def variables_of(worker_group: WorkerGroup, worker: Worker, *, restarts: int) -> dict[str, str]:
    """Return the environment variables that torch elastic sets for a worker, named as torchrun names them.

    Args:
        worker_group: all workers of this node.
        worker: one of them.
        restarts: how many were used.
    """
    spec = worker_group.spec
    return {
        "LOCAL_RANK": str(worker.local_rank),
        "RANK": str(worker.global_rank),
        "GROUP_RANK": str(worker_group.group_rank),
        "ROLE_RANK": str(worker.role_rank),
        "ROLE_NAME": spec.role,
        "LOCAL_WORLD_SIZE": str(spec.local_world_size),
        "WORLD_SIZE": str(worker.world_size),
        "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
        "ROLE_WORLD_SIZE": str(worker.role_world_size),
        "MASTER_ADDR": str(worker_group.master_addr),
        "MASTER_PORT": str(worker_group.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
        "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
        "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
    }


def line_prefixes(worker_group: WorkerGroup, template: str | None) -> dict[int, str] | None:
    """Return the prefix of each line of a worker's output, by local rank.

    Args:
        worker_group: all workers of this node.
        template: with `${role_name}`, `${rank}` and `${local_rank}`; None for torch's own.
    """
    if template is None:
        return None
    text, role = Template(template), worker_group.spec.role
    return {
        worker.local_rank: text.safe_substitute(role_name=role, rank=worker.global_rank, local_rank=worker.local_rank)
        for worker in worker_group.workers
    }
