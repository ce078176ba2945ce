"""The private names of torch elastic that are touched are where they were."""

from __future__ import annotations

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from lightning_ckptless.torch_internals import forget_worker_store, skip_first_delay


def test_every_round_has_a_store_of_its_own() -> None:
    handler = get_rendezvous_handler(
        RendezvousParameters("c10d", "127.0.0.1:0", "run", 1, 1, "127.0.0.1", is_host=True, store_type="tcp")
    )
    assert isinstance(handler, DynamicRendezvousHandler)
    skip_first_delay(handler)
    assert handler._state_holder.state.round == 1
    ports = set()
    for _ in range(2):
        forget_worker_store(handler)
        info = handler.next_rendezvous().bootstrap_store_info
        assert info is not None
        ports.add(info.master_port)
    assert len(ports) == 2
    handler.shutdown()


def test_the_names_that_are_overridden_are_those_of_torch() -> None:
    for name in (
        "_rendezvous",
        "_assign_worker_ranks",
        "_start_workers",
        "_monitor_workers",
        "_stop_workers",
        "_shutdown",
    ):
        assert callable(getattr(LocalElasticAgent, name))
    for name in ("_start", "_poll", "_close", "start"):
        assert callable(getattr(PContext, name))
    assert {"_tail_logs"} <= set(PContext.__init__.__code__.co_names)
    assert {"_remaining_restarts"} <= set(LocalElasticAgent._invoke_run.__code__.co_names)
