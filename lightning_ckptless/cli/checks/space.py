"""Checks the folders of arenas and durable states, their free space, and the placement of copies."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from lightning_ckptless.cli.checks.check import FLOAT_BYTES, Check, Job, Status
from lightning_ckptless.durable.folder import DurableFolder
from lightning_ckptless.errors import ArenaError, OptionsError
from lightning_ckptless.protocol.placement import place
from lightning_ckptless.replica.arena_space import SHARED_MEMORY, SPACE_FIX, default_arena_dir, is_in_memory

DURABLE_STATES = 3
"""Durable states on disk at once: two are kept by default, and one is being written."""
_ADAM = 3 * FLOAT_BYTES
"""Bytes per float32 parameter with the two states of Adam."""


@dataclass(frozen=True, slots=True)
class ArenaFolder:
    """A folder for arenas, and its file system.

    Args:
        path: path of the folder.
        total_bytes: size of its file system.
        free_bytes: free space of its file system.
        in_memory: whether the file system is in memory.
        problem: why arenas cannot be created there; empty if they can.
    """

    path: Path
    total_bytes: int
    free_bytes: int
    in_memory: bool
    problem: str = ""


def inspect_folder(folder: Path | None) -> ArenaFolder:
    """Inspect a folder for arenas; None for the default one."""
    if folder is None:
        # It warns about a folder on a disk, which a check reports.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                folder = default_arena_dir()
            except ArenaError as error:
                return ArenaFolder(SHARED_MEMORY, 0, 0, in_memory=False, problem=str(error))
    existing = _nearest_folder(folder)
    if not os.access(existing, os.W_OK | os.X_OK):
        return ArenaFolder(folder, 0, 0, in_memory=False, problem=f"no write permission for {existing}")
    disk = os.statvfs(existing)
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    return ArenaFolder(folder, total, free, is_in_memory(existing))


def _nearest_folder(path: Path) -> Path:
    """Return the folder itself or its nearest existing parent."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def check_arena_folder(arena_folder: ArenaFolder) -> Check:
    """Check that arenas can be created, and that the folder is in memory."""
    expected = "a writable folder in memory"
    found = f"{arena_folder.path}, {decimal(arena_folder.free_bytes)} free of {decimal(arena_folder.total_bytes)}"
    if arena_folder.problem:
        fix = "set arena_dir= (or CKPTLESS_ARENA_DIR) to a writable folder"
        return Check("arena folder", Status.FAILURE, f"{arena_folder.path}: {arena_folder.problem}", expected, fix)
    if not arena_folder.in_memory:
        fix = "mount a tmpfs there, or set arena_dir= (or CKPTLESS_ARENA_DIR) to one: mirroring to a disk is slower"
        return Check("arena folder", Status.WARNING, f"{found}, on a disk", expected, fix)
    return Check("arena folder", Status.OK, found, expected)


def check_arena_space(job: Job, arena_folder: ArenaFolder) -> Check:
    """Check that all slots of all replicas on this node fit."""
    found = f"{decimal(arena_folder.free_bytes)} free in {arena_folder.path}"
    if job.state is None:
        fits = arena_folder.free_bytes // max(1, job.replicated(_ADAM + FLOAT_BYTES))
        found += f": enough for about {_short(fits)} parameters with Adam"
        expected = "enough for the model: use --parameters or --model to check"
        return Check("arena space", Status.OK, found, expected)
    # The slots of the first version, without optimizer state, exist until those of the next version are created.
    needed = job.replicated(job.state.bytes) + job.replicated(job.state.weight_bytes)
    expected = (
        f"{decimal(needed)}: two slots of {decimal(job.state.bytes)} for each of {1 + job.kept_copies} {_replicas(job)}"
        f"{f', divided over {job.nodes} nodes' if job.nodes > 1 else ''}, plus those of the first step"
    )
    if needed <= arena_folder.free_bytes:
        return Check("arena space", Status.OK, f"{found}, {decimal(needed)} needed", expected)
    fix = f"{SPACE_FIX}; with Docker, use `--shm-size {-(-needed // 10**9)}g`"
    if arena_folder.in_memory:
        found += (
            ": the agent's memory will hold the slots and lose them when it exits; under torchrun the run is refused"
        )
        return Check("arena space", Status.WARNING, found, expected, fix)
    return Check("arena space", Status.FAILURE, found, expected, fix)


def check_placement(job: Job) -> Check:
    """Check that there are enough failure domains for the copies."""
    expected = f"{job.copies + 1} failure domains for copies={job.copies}"
    try:
        placement = place(job.domains, job.copies, kind=job.failure_domain)
    except OptionsError as error:
        count = len(set(job.domains))
        return Check("copies", Status.FAILURE, str(error), expected, f"set copies={count - 1}, or add nodes")
    if job.copies and not placement.copies:
        expected += ", or a single one, whose loss is not covered"
    return Check("copies", Status.OK, placement.reason, expected)


def check_durable_folder(job: Job, folder: Path) -> Check:
    """Check that durable states can be written to a folder, and fit."""
    name, expected = "durable folder", "an empty or missing folder, or one of durable states, private to this user"
    try:
        DurableFolder(folder).require_ours()
    except OptionsError as error:
        return Check(name, Status.FAILURE, str(error), expected, "set durable_dir= to another folder")
    existing = _nearest_folder(folder)
    if not os.access(existing, os.W_OK | os.X_OK):
        fix = f"set durable_dir= to a folder that this user can create: {existing} has another owner or is read-only"
        return Check(name, Status.FAILURE, f"{existing} is not writable", expected, fix)
    disk = os.statvfs(existing)
    free = disk.f_bavail * disk.f_frsize
    found = f"{decimal(free)} free in {existing}"
    if job.state is None:
        return Check(name, Status.OK, found, expected)
    needed = DURABLE_STATES * job.state.bytes
    expected = f"{decimal(needed)}: two states that are kept and one being written"
    if needed <= free:
        return Check(name, Status.OK, f"{found}, {decimal(needed)} needed", expected)
    fix = "set durable_dir= to a folder on a larger file system, or set durable_keep=1"
    return Check(name, Status.FAILURE, found, expected, fix)


def check_space(job: Job, arena_folder: ArenaFolder, durable_dir: Path | None) -> list[Check]:
    """Run all checks of space on this host."""
    checks = [check_placement(job), check_arena_folder(arena_folder)]
    if not arena_folder.problem:
        checks.append(check_arena_space(job, arena_folder))
    if durable_dir is not None:
        checks.append(check_durable_folder(job, durable_dir))
    return checks


def _replicas(job: Job) -> str:
    return "replicas" if job.kept_copies else "replica"


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
