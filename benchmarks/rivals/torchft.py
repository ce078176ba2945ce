"""A torchft training loop with the same model, batches and optimizer: one rank per replica group.

torchft has no integration with Lightning. What it leaves to the user is written so that nothing is lost: the replicas
wait for the restarted one, and the batch follows from the step that they agreed on, so that a step that was not
committed is replayed with its own batch.
"""

# No postponed annotations: torch inspects those of the hook.

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket, TCPStore  # type: ignore[attr-defined]
from torch.futures import Future
from torchft import Manager, Optimizer, ProcessGroupGloo
from torchft.process_group import ProcessGroupDummy

from benchmarks.harness.wire import Wire
from benchmarks.jobs.gpt import GPT, Batches, fingerprint
from benchmarks.jobs.job import JobOptions
from benchmarks.rivals.supervisor import LOOPBACK

SAMPLES = 4096
COLLECTIVE_TIMEOUT = timedelta(seconds=5)
"""Timeout of a collective: a replica that is not a ring neighbour of the lost one waits this long."""


def prepare(options: JobOptions) -> Callable[[Wire], None]:
    """Return the function that trains with the given options until stopped."""
    return partial(train, options)


def train(options: JobOptions, wire: Wire) -> None:
    wire.send("fit")
    replica = int(os.environ["RANK"])
    torch.manual_seed(11)
    model = GPT(options.size)
    adam = torch.optim.AdamW(model.parameters(), 1e-4)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["optimizer"])

    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        ProcessGroupGloo(timeout=COLLECTIVE_TIMEOUT),
        load,
        lambda: {"model": model.state_dict(), "optimizer": adam.state_dict()},
        min_replica_size=options.devices, use_async_quorum=False, init_sync=False, rank=0, world_size=1,
        store_addr=LOOPBACK, store_port=store.port, hostname=LOOPBACK, replica_id=f"replica-{replica}",
    )  # fmt: skip
    wrapped = patched_ddp(manager, model)
    optimizer = Optimizer(manager, adam)
    batches = Batches(SAMPLES, options.batch, replica, options.devices)
    wire.send("train")
    while True:
        optimizer.zero_grad()
        step = manager.current_step()
        wrapped(batches.at(step)).backward()
        optimizer.step()
        if manager.current_step() > step:
            wire.send("step", step=step + 1, fingerprint=fingerprint(model, adam))
            wire.send("committed", step=step + 1)


def patched_ddp(manager: Manager, model: nn.Module) -> nn.Module:
    """Return torchft's own `DistributedDataParallel` with a hook that survives the loss of a peer.

    The hook of 0.2.0 asserts a future that does not exist after an error, so every replica that is averaging gradients
    when a peer dies exits as well.
    """
    wrapped = nn.parallel.DistributedDataParallel(
        model, process_group=ProcessGroupDummy(0, 1), find_unused_parameters=True
    )
    wrapped.register_comm_hook(manager, average)
    return wrapped


def average(manager: Manager, bucket: GradBucket) -> Future[Tensor]:
    """Average a bucket; if that fails, the manager knows and does not commit the step."""
    manager.allreduce(bucket.buffer()).wait()
    done = Future[Tensor]()
    done.set_result(bucket.buffer())
    return done
