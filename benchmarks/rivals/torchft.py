"""A loop as torchft wants it, with the same model, batches and optimizer: one rank per replica group.

torchft has no part for Lightning. What it leaves to its user is written so that nothing is lost: the replicas wait for
the one that is started again, and the batch follows from the step that they agreed on, so that a step that was not
committed is run again with its own batch.
"""

# No annotations as text: torch looks at those of the hook.

import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket, TCPStore  # type: ignore[attr-defined]
from torch.futures import Future
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.process_group import ProcessGroupDummy

from benchmarks.fingerprint import fingerprint
from benchmarks.gpt import GPT
from benchmarks.job import JobOptions
from benchmarks.rivals.batches import Batches
from benchmarks.rivals.supervisor import LOOPBACK
from benchmarks.wire import Wire

SAMPLES = 4096
PEER_LEFT = timedelta(seconds=5)
"""Time limit of a collective: a replica that is no neighbour of the lost one in the ring waits as long."""


def train(options: JobOptions, wire: Wire) -> None:
    """Train as the options say, until told to stop."""
    wire.say("fit")
    replica = int(os.environ["RANK"])
    torch.manual_seed(11)
    model = GPT(options.size)
    adam = torch.optim.AdamW(model.parameters(), 1e-4)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["optimizer"])

    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        ProcessGroupGloo(timeout=PEER_LEFT),
        load,
        lambda: {"model": model.state_dict(), "optimizer": adam.state_dict()},
        min_replica_size=options.devices,
        use_async_quorum=False,
        init_sync=False,
        rank=0,
        world_size=1,
        store_addr=LOOPBACK,
        store_port=store.port,
        hostname=LOOPBACK,
        replica_id=f"replica-{replica}",
    )
    mended = options.strategy_options.get("mended", True)
    wrapped = mended_parallel(manager, model) if mended else DistributedDataParallel(manager, model)
    optimizer = Optimizer(manager, adam)
    batches = Batches(SAMPLES, options.batch, replica, options.devices)
    wire.say("train")
    while True:
        optimizer.zero_grad()
        step = manager.current_step()
        wrapped(batches.at(step)).backward()
        optimizer.step()
        if manager.current_step() > step:
            wire.say("step", step=step + 1, fingerprint=fingerprint(model, adam))
            wire.say("committed", step=step + 1)


def mended_parallel(manager: Manager, model: nn.Module) -> nn.Module:
    """What torchft's own `DistributedDataParallel` is, but for a hook that outlives the loss of a peer.

    The hook of 0.2.0 asserts a future that is not there after an error, so that every replica that was averaging
    gradients when its peer died ends with it.
    """
    wrapped = nn.parallel.DistributedDataParallel(
        model, process_group=ProcessGroupDummy(0, 1), find_unused_parameters=True
    )
    wrapped.register_comm_hook(manager, average)
    return wrapped


def average(manager: Manager, bucket: GradBucket) -> Future[Tensor]:
    """Average a bucket; that it failed is known to the manager, who does not commit the step."""
    manager.allreduce(bucket.buffer()).wait()
    done = Future[Tensor]()
    done.set_result(bucket.buffer())
    return done
