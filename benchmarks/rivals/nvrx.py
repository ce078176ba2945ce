"""Lightning's `ddp` in the in-process `Wrapper` of NVIDIA's resiliency extension, with one rank in reserve.

As a user would write it: the wrapped function builds everything anew and goes on from the newest checkpoint file.
"""

# No annotations as text: the wrapper looks for its own class among those of the function that it wraps.

import gc
import os
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from nvidia_resiliency_ext.inprocess import CallWrapper, Compose, Wrapper
from nvidia_resiliency_ext.inprocess.rank_assignment import FillGaps, MaxActiveWorldSize
from torch.distributed import TCPStore, group, init_process_group  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from benchmarks import training
from benchmarks.gpt import random_tokens
from benchmarks.job import JobOptions
from benchmarks.rivals.supervisor import GROUP_PORT
from benchmarks.wire import Wire

OFTEN = timedelta(milliseconds=50)
"""How often its threads and processes look; usually every second."""
PEER_LEFT = timedelta(seconds=1)
"""Time limit of a collective. The wrapper cannot abort gloo: a rank whose peer has left its place waits as long."""


def train(options: JobOptions, wire: Wire) -> None:
    """Train as the options say, until told to stop."""
    warm_up(options)
    leads = os.environ["RANK"] == "0"
    base = TCPStore(os.environ["MASTER_ADDR"], int(os.environ[GROUP_PORT]), is_master=leads, wait_for_workers=False)
    groups: list[Any] = []

    def attempt(call: CallWrapper | None = None) -> None:
        """What is wrapped: called anew on all ranks after each fault."""
        assert call is not None, "the wrapper fills it in"
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        os.environ["LOCAL_RANK"] = str(rank)
        store = PrefixStore(f"attempt-{call.iteration}", base)
        init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=PEER_LEFT)
        # If DDP had the last reference, it would end the group with the interpreter's lock held, which the threads of
        # the group want too: the rank would stand still for ever.
        groups.append(group.WORLD)
        training.train(options, DDPStrategy(cluster_environment=TorchElasticEnvironment()), wire)

    wrapper = Wrapper(
        rank_assignment=Compose(MaxActiveWorldSize(options.devices), FillGaps()),
        monitor_thread_interval=OFTEN,
        monitor_process_interval=OFTEN,
        progress_watchdog_interval=OFTEN,
        last_call_wait=OFTEN,
    )
    wrapper(attempt)()


def warm_up(options: JobOptions) -> None:
    """Take one step alone, so that the rank in reserve is no colder than the others when it is needed."""
    model = training.Trained(options.size)
    optimizer = model.configure_optimizers()
    model.training_step([random_tokens(options.batch)], 0).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    # The wrapper collects garbage between two attempts; what was imported is none.
    gc.collect()
    gc.freeze()
