"""Limits of this process and of its control group: open files, size of files, locked memory, processes, memory."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path

import psutil
from rich.filesize import decimal

from lightning_ckptless.cli.checks.check import Check, Job, Status
from lightning_ckptless.system.control_groups import Ceiling, ceiling

_INFINIBAND = Path("/sys/class/infiniband")
# Least: measured with four ranks on gloo. Comfortable: dataloader workers, further process groups and the program's own
# files and threads have room as well.
_DESCRIPTORS = {"least": (32, 4), "comfortable": (128, 8)}
_THREADS = {"least": (16, 10), "comfortable": (16, 32)}
"""What there is anyway, and what comes on top for each rank."""


def check_descriptors(job: Job, soft: int) -> Check:
    """Whether each worker and the agent may open as many files as they will.

    Args:
        job: to be trained.
        soft: the limit that holds; `resource.RLIM_INFINITY` for none.
    """
    least, comfortable = (beside + of_rank * job.world_size for beside, of_rank in _DESCRIPTORS.values())
    expected = f"at least {least}, better {comfortable} for {job.world_size} ranks"
    found = f"{_count(soft)} per process"
    if soft == resource.RLIM_INFINITY or soft >= comfortable:
        return Check("open files", Status.OK, found, expected)
    status = Status.WARNING if soft >= least else Status.FAILURE
    fix = (
        f"raise the limit before the start: `ulimit -n {max(4096, comfortable)}`, in a container `--ulimit nofile=...`"
    )
    return Check("open files", status, found, expected, fix)


def check_file_size(job: Job, soft: int) -> Check:
    """Whether files may become as large as the slots of an arena."""
    needed = 0 if job.state is None else -(-job.state.bytes // job.world_size)
    expected = f"at least {decimal(needed)}, the size of a slot" if needed else "no limit"
    if soft == resource.RLIM_INFINITY:
        return Check("file size", Status.OK, "unlimited", expected)
    if needed and soft >= needed:
        return Check("file size", Status.OK, decimal(soft), expected)
    status = Status.FAILURE if needed else Status.WARNING
    return Check("file size", status, decimal(soft), expected, "run `ulimit -f unlimited` before the start")


def check_locked_memory(soft: int, adapters: int) -> Check:
    """Whether NCCL can register memory with InfiniBand adapters; nothing else locks memory.

    Args:
        soft: the limit that holds, in bytes.
        adapters: InfiniBand adapters of this machine.
    """
    found = f"{_size(soft)}, {adapters} InfiniBand adapters"
    if not adapters:
        return Check("locked memory", Status.OK, found, "any: nothing is locked without InfiniBand")
    if soft == resource.RLIM_INFINITY:
        return Check("locked memory", Status.OK, found, "unlimited, for InfiniBand")
    fix = "run `ulimit -l unlimited` before the start, in a container `--ulimit memlock=-1`; else NCCL may not start"
    return Check("locked memory", Status.WARNING, found, "unlimited, for InfiniBand", fix)


def check_processes(job: Job, of_user: int, group: Ceiling | None, used: int) -> Check:
    """Whether as many processes and threads may be started as a run has.

    Args:
        job: to be trained.
        of_user: limit on the processes and threads of this user; `resource.RLIM_INFINITY` for none.
        group: limit of the control group; None for none.
        used: threads that this user has now.
    """
    least, comfortable = (beside + of_rank * job.ranks for beside, of_rank in _THREADS.values())
    expected = f"room for {least} processes and threads at least, better {comfortable}, with {job.ranks} ranks"
    rooms = {}
    if of_user != resource.RLIM_INFINITY:
        rooms[f"limit of the user {of_user}, {used} in use"] = of_user - used
    if group is not None:
        rooms[f"limit of the control group {group.limit}, {group.used} in use"] = group.room
    if not rooms:
        return Check("processes", Status.OK, "unlimited", expected)
    found = min(rooms, key=lambda text: rooms[text])
    if rooms[found] >= comfortable:
        return Check("processes", Status.OK, found, expected)
    status = Status.WARNING if rooms[found] >= least else Status.FAILURE
    fix = (
        "raise the limit: `ulimit -u unlimited`, `--pids-limit` of the container, podPidsLimit of the kubelet, or "
        "TasksMax of the systemd unit"
    )
    return Check("processes", status, found, expected, fix)


def check_memory(job: Job, available_bytes: int, group: Ceiling | None, *, arenas_in_memory: bool) -> Check:
    """Whether arenas and, on CPUs, the state that is trained fit into memory together.

    Args:
        job: to be trained.
        available_bytes: of the machine.
        group: limit of the control group; None for none.
        arenas_in_memory: whether arenas count: they do in /dev/shm, which the control group's limit covers as well.
    """
    room, found = available_bytes, f"{decimal(available_bytes)} available"
    if group is not None and group.room < room:
        room = group.room
        found = f"{decimal(room)} left of the control group's {decimal(group.limit)}"
    if job.state is None:
        return Check("memory", Status.OK, found, "enough for arenas and processes: give --parameters to know")
    arenas = job.replicated(job.state.bytes) if arenas_in_memory else 0
    models = 0 if job.has_gpu else 1 / job.nodes if job.is_sharded else job.ranks
    trained = math.ceil(models * (job.state.bytes + job.state.weight_bytes))
    expected = f"at least {decimal(arenas + trained)}: {decimal(arenas)} of arenas"
    if trained:
        expected += f" and {decimal(trained)} of parameters, gradients and optimizer state of {job.ranks} ranks"
    if room >= arenas + trained:
        return Check("memory", Status.OK, f"{found}, {decimal(arenas + trained)} needed", expected)
    fix = "train a smaller model or fewer ranks here, shard it (--sharded), or raise the memory limit"
    return Check("memory", Status.FAILURE, found, expected, fix)


def check_limits(job: Job, *, arenas_in_memory: bool) -> list[Check]:
    """All checks of limits, with what is found here."""
    # The superuser may start as many as the control group allows.
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
