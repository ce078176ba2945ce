"""Lightning's `ddp` in the in-process `Wrapper` of NVIDIA's resiliency extension, with one reserve rank.

Written as a user would: the wrapped function re-creates everything and resumes from the newest checkpoint file.
"""

# No postponed annotations: the wrapper looks for its own class among those of the wrapped function.

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from nvidia_resiliency_ext.inprocess import CallWrapper, Compose, Wrapper
from nvidia_resiliency_ext.inprocess.rank_assignment import FillGaps, MaxActiveWorldSize
from torch.distributed import TCPStore, group, init_process_group  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from benchmarks.harness.wire import Wire
from benchmarks.jobs import fit
from benchmarks.jobs.gpt import random_tokens
from benchmarks.jobs.job import JobOptions
from benchmarks.jobs.training import Trained
from benchmarks.rivals.supervisor import GROUP_PORT

POLL_INTERVAL = timedelta(milliseconds=50)
"""Polling interval of its threads and processes; the default is one second."""
COLLECTIVE_TIMEOUT = timedelta(seconds=1)
"""Timeout of a collective. The wrapper cannot abort gloo, so a rank whose peer has left waits this long."""


def prepare(options: JobOptions) -> Callable[[Wire], None]:
    """Return the function that trains with the given options until stopped."""
    return partial(train, options)


def train(options: JobOptions, wire: Wire) -> None:
    warm_up(options)
    leads = os.environ["RANK"] == "0"
    base = TCPStore(os.environ["MASTER_ADDR"], int(os.environ[GROUP_PORT]), is_master=leads, wait_for_workers=False)
    groups: list[Any] = []

    def attempt(call: CallWrapper | None = None) -> None:
        """Train once; the wrapper calls this on all ranks again after each fault."""
        assert call is not None, "the wrapper passes it"
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        os.environ["LOCAL_RANK"] = str(rank)
        store = PrefixStore(f"attempt-{call.iteration}", base)
        init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT)
        # If DDP had the last reference, it would destroy the group while holding the interpreter lock, for which the
        # threads of the group wait too: the rank would block forever.
        groups.append(group.WORLD)
        fit.train(options, DDPStrategy(cluster_environment=TorchElasticEnvironment()), wire)

    wrapper = Wrapper(
        rank_assignment=Compose(MaxActiveWorldSize(options.devices), FillGaps()),
        monitor_thread_interval=POLL_INTERVAL,
        monitor_process_interval=POLL_INTERVAL,
        progress_watchdog_interval=POLL_INTERVAL,
        last_call_wait=POLL_INTERVAL,
    )
    wrapper(attempt)()


def warm_up(options: JobOptions) -> None:
    """Take one step alone, so that the reserve rank is as warm as the others when it is needed."""
    model = Trained(options.size)
    optimizer = model.configure_optimizers()
    model.training_step([random_tokens(options.batch)], 0).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    # The wrapper collects garbage between two attempts; exclude imported objects.
    gc.collect()
    gc.freeze()
