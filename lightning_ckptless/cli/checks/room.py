"""Where replicas and durable states go, and whether they fit."""

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
from lightning_ckptless.replica.arena_space import MAKE_ROOM, SHARED_MEMORY, default_arena_dir, is_in_memory

DURABLE_STATES = 3
"""On the disk at once: two are kept by default, and one is on its way."""
_ADAM = 3 * FLOAT_BYTES
"""Bytes of a parameter in float32 with both states of Adam."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder for arenas, and its file system.

    Args:
        folder: itself.
        total_bytes: of its file system.
        free_bytes: of its file system.
        in_memory: whether it is a file system in memory.
        problem: why arenas cannot be made there; empty where they can.
    """

    folder: Path
    total_bytes: int
    free_bytes: int
    in_memory: bool
    problem: str = ""


def look_at(folder: Path | None) -> Place:
    """The place of arenas: the folder that is named, or the default one."""
    if folder is None:
        # That it is a folder of temporary files is said by a check.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                folder = default_arena_dir()
            except ArenaError as error:
                return Place(SHARED_MEMORY, 0, 0, in_memory=False, problem=str(error))
    there = _nearest_folder(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        return Place(folder, 0, 0, in_memory=False, problem=f"this user may not write to {there}")
    disk = os.statvfs(there)
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    return Place(folder, total, free, is_in_memory(there))


def _nearest_folder(path: Path) -> Path:
    """A folder that need not be there, or the nearest one above it that is."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def check_arena_folder(place: Place) -> Check:
    """Whether arenas can be made, and lie in memory."""
    expected = "a folder in memory that this user may write to"
    found = f"{place.folder}, {decimal(place.free_bytes)} free of {decimal(place.total_bytes)}"
    if place.problem:
        fix = "set arena_dir= (or CKPTLESS_ARENA_DIR) to a folder that this user may write to"
        return Check("arena folder", Status.FAILURE, f"{place.folder}: {place.problem}", expected, fix)
    if not place.in_memory:
        fix = "mount a tmpfs there, or name one by arena_dir= (or CKPTLESS_ARENA_DIR): mirroring to a disk is slower"
        return Check("arena folder", Status.WARNING, f"{found}, on a disk", expected, fix)
    return Check("arena folder", Status.OK, found, expected)


def check_arena_room(job: Job, place: Place) -> Check:
    """Whether all slots of all replicas on this machine fit."""
    found = f"{decimal(place.free_bytes)} free in {place.folder}"
    if job.state is None:
        fits = place.free_bytes // max(1, job.replicated(_ADAM + FLOAT_BYTES))
        fix = "give --parameters or --model to have it compared"
        found += f": enough for about {_short(fits)} parameters with Adam"
        return Check("room for arenas", Status.OK, found, f"enough for the model: {fix}")
    # The slots of the first version, which has no optimizer state yet, are there until those of the next are made.
    needed = job.replicated(job.state.bytes) + job.replicated(job.state.weight_bytes)
    expected = (
        f"{decimal(needed)}: two slots for each of {1 + job.kept_copies} copies of {decimal(job.state.bytes)}"
        f"{f', divided over {job.nodes} machines' if job.nodes > 1 else ''}, and those of the first step beside them"
    )
    if needed <= place.free_bytes:
        return Check("room for arenas", Status.OK, f"{found}, {decimal(needed)} needed", expected)
    fix = f"{MAKE_ROOM}; in Docker that is `--shm-size {-(-needed // 10**9)}g`"
    if place.in_memory:
        found += ": slots will be memory of the agent, and end with it; under torchrun the run is refused"
        return Check("room for arenas", Status.WARNING, found, expected, fix)
    return Check("room for arenas", Status.FAILURE, found, expected, fix)


def check_placement(job: Job) -> Check:
    """Whether there are as many failure domains as copies need."""
    expected = f"{job.copies + 1} failure domains for copies={job.copies}"
    try:
        placement = place(job.domains, job.copies, kind=job.failure_domain)
    except OptionsError as error:
        count = len(set(job.domains))
        return Check("copies", Status.FAILURE, str(error), expected, f"set copies={count - 1}, or add machines")
    if job.copies and not placement.copies:
        expected += ", or one whose loss is not covered"
    return Check("copies", Status.OK, placement.reason, expected)


def check_durable_folder(job: Job, folder: Path) -> Check:
    """Whether durable states can be written to a folder, and fit."""
    name, expected = "durable folder", "an empty, missing or earlier folder of durable states, open to this user alone"
    try:
        DurableFolder(folder).require_ours()
    except OptionsError as error:
        return Check(name, Status.FAILURE, str(error), expected, "name another folder by durable_dir=")
    there = _nearest_folder(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        fix = f"name a folder that this user can make: {there} belongs to another one or is read-only"
        return Check(name, Status.FAILURE, f"{there} cannot be written to", expected, fix)
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize
    found = f"{decimal(free)} free in {there}"
    if job.state is None:
        return Check(name, Status.OK, found, expected)
    needed = DURABLE_STATES * job.state.bytes
    expected = f"{decimal(needed)}: two states that are kept and one on its way"
    if needed <= free:
        return Check(name, Status.OK, f"{found}, {decimal(needed)} needed", expected)
    return Check(
        name, Status.FAILURE, found, expected, "name a larger file system by durable_dir=, or set durable_keep=1"
    )


def check_room(job: Job, place: Place, durable_dir: Path | None) -> list[Check]:
    """All checks of room, with what is found here."""
    checks = [check_placement(job), check_arena_folder(place)]
    if not place.problem:
        checks.append(check_arena_room(job, place))
    if durable_dir is not None:
        checks.append(check_durable_folder(job, durable_dir))
    return checks


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
