"""Checks the limits of this process and its control group: open files, file size, locked memory, processes, memory."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path

import psutil
from rich.filesize import decimal

from lightning_ckptless.cli.checks.check import Check, Job, Status
from lightning_ckptless.protocol.wording import counted
from lightning_ckptless.system.control_groups import Ceiling, ceiling

_INFINIBAND = Path("/sys/class/infiniband")
# Minimum: measured with four ranks on gloo. Recommended: leaves room for dataloader workers, further process groups and
# the script's own files and threads.
_DESCRIPTORS = {"minimum": (32, 4), "recommended": (128, 8)}
_THREADS = {"minimum": (16, 10), "recommended": (16, 32)}
"""Base count, and count per rank."""


def check_descriptors(job: Job, soft: int) -> Check:
    """Check that each worker and the agent may open enough files.

    Args:
        job: job to be trained.
        soft: soft limit; `resource.RLIM_INFINITY` for none.
    """
    minimum, recommended = (base + per_rank * job.world_size for base, per_rank in _DESCRIPTORS.values())
    expected = f"at least {minimum}, recommended {recommended}, for {job.world_size} ranks"
    found = f"{_count(soft)} per process"
    if soft == resource.RLIM_INFINITY or soft >= recommended:
        return Check("open files", Status.OK, found, expected)
    status = Status.WARNING if soft >= minimum else Status.FAILURE
    fix = f"raise the limit before starting: `ulimit -n {max(4096, recommended)}`, in a container `--ulimit nofile=...`"
    return Check("open files", status, found, expected, fix)


def check_file_size(job: Job, soft: int) -> Check:
    """Check that files may be as large as the slots of an arena."""
    needed = 0 if job.state is None else -(-job.state.bytes // job.world_size)
    expected = f"at least {decimal(needed)}, the size of a slot" if needed else "no limit"
    if soft == resource.RLIM_INFINITY:
        return Check("file size", Status.OK, "unlimited", expected)
    if needed and soft >= needed:
        return Check("file size", Status.OK, decimal(soft), expected)
    status = Status.FAILURE if needed else Status.WARNING
    return Check("file size", status, decimal(soft), expected, "run `ulimit -f unlimited` before starting")


def check_locked_memory(soft: int, adapters: int) -> Check:
    """Check that NCCL can register memory with InfiniBand adapters; nothing else locks memory.

    Args:
        soft: soft limit in bytes.
        adapters: number of InfiniBand adapters on this host.
    """
    found = f"{_size(soft)}, {counted(adapters, 'InfiniBand adapter')}"
    if not adapters:
        return Check("locked memory", Status.OK, found, "any: no memory is locked without InfiniBand")
    if soft == resource.RLIM_INFINITY:
        return Check("locked memory", Status.OK, found, "unlimited, for InfiniBand")
    fix = "run `ulimit -l unlimited` before starting, in a container `--ulimit memlock=-1`; NCCL may fail otherwise"
    return Check("locked memory", Status.WARNING, found, "unlimited, for InfiniBand", fix)


def check_processes(job: Job, of_user: int, group: Ceiling | None, used: int) -> Check:
    """Check that the run may start all its processes and threads.

    Args:
        job: job to be trained.
        of_user: limit on the processes and threads of this user; `resource.RLIM_INFINITY` for none.
        group: limit of the control group; None for none.
        used: threads that this user has now.
    """
    minimum, recommended = (base + per_rank * job.ranks for base, per_rank in _THREADS.values())
    expected = f"at least {minimum} more processes and threads, recommended {recommended}, for {job.ranks} ranks"
    available = {}
    if of_user != resource.RLIM_INFINITY:
        available[f"user limit {of_user}, {used} in use"] = of_user - used
    if group is not None:
        available[f"control group limit {group.limit}, {group.used} in use"] = group.left
    if not available:
        return Check("processes", Status.OK, "unlimited", expected)
    found = min(available, key=lambda text: available[text])
    if available[found] >= recommended:
        return Check("processes", Status.OK, found, expected)
    status = Status.WARNING if available[found] >= minimum else Status.FAILURE
    fix = (
        "raise the limit: `ulimit -u unlimited`, the container's `--pids-limit`, the kubelet's podPidsLimit, or the "
        "systemd unit's TasksMax"
    )
    return Check("processes", status, found, expected, fix)


def check_memory(job: Job, available_bytes: int, group: Ceiling | None, *, arenas_in_memory: bool) -> Check:
    """Check that memory is large enough for the arenas and, when training on CPUs, for the model.

    Args:
        job: job to be trained.
        available_bytes: available memory of this host.
        group: limit of the control group; None for none.
        arenas_in_memory: whether arenas take memory, as in /dev/shm, which counts towards the control group's limit.
    """
    left_bytes, found = available_bytes, f"{decimal(available_bytes)} available"
    if group is not None and group.left < left_bytes:
        left_bytes = group.left
        found = f"{decimal(left_bytes)} left of the control group's {decimal(group.limit)}"
    if job.state is None:
        return Check("memory", Status.OK, found, "enough for arenas and processes: use --parameters to check")
    arenas = job.replicated(job.state.bytes) if arenas_in_memory else 0
    models = 0 if job.has_gpu else 1 / job.nodes if job.is_sharded else job.ranks
    trained = math.ceil(models * (job.state.bytes + job.state.weight_bytes))
    expected = f"at least {decimal(arenas + trained)}: {decimal(arenas)} for arenas"
    if trained:
        expected += f" and {decimal(trained)} for parameters, gradients and optimizer state of {job.ranks} ranks"
    if left_bytes >= arenas + trained:
        return Check("memory", Status.OK, f"{found}, {decimal(arenas + trained)} needed", expected)
    fix = "train a smaller model, use fewer ranks per node, shard the model (--sharded), or raise the memory limit"
    return Check("memory", Status.FAILURE, found, expected, fix)


def check_limits(job: Job, *, arenas_in_memory: bool) -> list[Check]:
    """Run all checks of limits on this host."""
    # RLIMIT_NPROC does not apply to root.
    of_user = _soft(resource.RLIMIT_NPROC) if os.geteuid() else resource.RLIM_INFINITY
    adapters = len(list(_INFINIBAND.iterdir())) if _INFINIBAND.is_dir() else 0
    return [
        check_memory(job, psutil.virtual_memory().available, ceiling("memory"), arenas_in_memory=arenas_in_memory),
        check_descriptors(job, _soft(resource.RLIMIT_NOFILE)),
        check_file_size(job, _soft(resource.RLIMIT_FSIZE)),
        check_locked_memory(_soft(resource.RLIMIT_MEMLOCK), adapters),
        check_processes(job, of_user, ceiling("pids"), _threads_of_user()),
    ]


def _soft(number: int) -> int:
    return resource.getrlimit(number)[0]


def _threads_of_user() -> int:
    own = psutil.Process().uids().real
    count = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == own:
            count += process.info["num_threads"] or 0
    return count


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def _size(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else decimal(limit)
