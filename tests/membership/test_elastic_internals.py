"""The private names of torch elastic that we use still exist."""

from __future__ import annotations

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, _RendezvousState


def test_overridden_names_exist_in_torch() -> None:
    for name in (
        "_rendezvous",
        "_assign_worker_ranks",
        "_start_workers",
        "_restart_workers",
        "_exit_barrier",
        "_monitor_workers",
        "_stop_workers",
        "_shutdown",
    ):
        assert callable(getattr(LocalElasticAgent, name))
    for name in ("_start", "_poll", "_close", "start"):
        assert callable(getattr(PContext, name))
    # The first one since torch 2.10, the others before.
    tails = set(PContext.__init__.__code__.co_names)
    assert "_tail_logs" in tails or {"_stdout_tail", "_stderr_tail"} <= tails
    assert {"_remaining_restarts"} <= set(LocalElasticAgent._invoke_run.__code__.co_names)
    # A rendezvous whose stores would listen elsewhere, or whose state has more than is written as data, fails here.
    names = DynamicRendezvousHandler.next_rendezvous.__code__.co_names
    assert {"_create_tcp_store_server", "_bootstrap_store_info", "_shared_tcp_store_server"} <= {*names}
    assert {*vars(_RendezvousState())} == {
        "round",
        "complete",
        "deadline",
        "closed",
        "participants",
        "wait_list",
        "redundancy_list",
        "last_heartbeats",
    }
