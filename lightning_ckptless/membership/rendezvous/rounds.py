"""Rounds of the rendezvous, each with its own store for its workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from string import Template
from typing import Any, Self

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import Worker, WorkerGroup

from lightning_ckptless.membership.rendezvous.generation import skip_generations

_TIMEOUT_S = 60.0
_ROUNDS_KEY = "ckptless/rounds"


@dataclass(frozen=True, slots=True)
class Round:
    """One completed round of the rendezvous.

    Args:
        node: number of this node.
        nodes: how many there are.
        world_size: number of ranks on all nodes.
        ranks: ranks of this node's workers, by local rank.
        store: the agents' store for this round.
        master: address of the workers' store.
        variables: environment variables that torch elastic sets for each local rank, except the count of restarts.
        role: name of the workers' role.
        run_id: id of the run.
        uses_agent_store: whether the agent of node 0 listens for the workers' store.
    """

    node: int
    nodes: int
    world_size: int
    ranks: Mapping[int, int]
    store: Any
    master: tuple[str, int]
    variables: Mapping[int, Mapping[str, str]]
    role: str
    run_id: str
    uses_agent_store: bool

    @classmethod
    def of(cls, worker_group: WorkerGroup) -> Self:
        """Return the round that torch elastic has completed."""
        group: Any = worker_group  # torch declares its fields as None, which they are before the first rendezvous
        handler = group.spec.rdzv_handler
        return cls(
            node=int(group.group_rank),
            nodes=int(group.group_world_size),
            world_size=group.workers[0].world_size,
            ranks={worker.local_rank: worker.global_rank for worker in group.workers},
            store=group.store,
            master=(group.master_addr, group.master_port),
            variables={worker.local_rank: _variables_of(worker_group, worker) for worker in group.workers},
            role=group.spec.role,
            run_id=handler.get_run_id(),
            uses_agent_store=handler.use_agent_store,
        )

    def connect_worker_store(self) -> TCPStore:
        """Connect to the store of the round's workers."""
        store = TCPStore(*self.master, is_master=False, timeout=timedelta(seconds=_TIMEOUT_S))
        if self.node == 0 and self.uses_agent_store:
            # Generation numbers grow over the rounds, each of which has a new store.
            skip_generations(store, self.store.underlying_store.add(_ROUNDS_KEY, 1) - 1)
        return store

    def line_prefixes(self, template: str | None) -> dict[int, str] | None:
        """Return the prefix of each line of a worker's output, by local rank.

        Args:
            template: with `${role_name}`, `${rank}` and `${local_rank}`; None for torch's own.
        """
        if template is None:
            return None
        text = Template(template)
        return {
            local_rank: text.safe_substitute(role_name=self.role, rank=rank, local_rank=local_rank)
            for local_rank, rank in self.ranks.items()
        }


def _variables_of(worker_group: WorkerGroup, worker: Worker) -> dict[str, str]:
    """Return the environment variables of a worker, named as torchrun names them."""
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
        "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
        "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
        "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
    }
