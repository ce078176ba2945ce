"""Exports a state to a file: finds the requested version, copies it, and converts it to the requested format."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_ckptless.cli.export_source import Source
from lightning_ckptless.cli.survey.reader import arenas_of
from lightning_ckptless.durable.capture import Captured, CopyBuffers, capture, newest_committed
from lightning_ckptless.durable.checkpoint import (
    host_state_of,
    lightning_checkpoint,
    model_state,
    recipe_in,
    tensors_of,
)
from lightning_ckptless.durable.folder import DurableFolder, Manifest, ShardFacts, write_manifest
from lightning_ckptless.durable.host_state_pickle import PICKLE_MODULE
from lightning_ckptless.durable.safetensors import write_safetensors
from lightning_ckptless.durable.store import load_state, require_space, state_bytes, write_state
from lightning_ckptless.errors import ArenaError, DurableError, OptionsError
from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.replica.arena import Arena

_SUFFIX = {"lightning": ".ckpt", "dcp": "", "safetensors": ".safetensors"}
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class _Choice:
    """A state that can be exported.

    Args:
        version: version of the state.
        run_id: run that wrote it.
        origin: checkpoint file that the run started from.
        where: where it is stored, as text.
        size_bytes: size of its tensors.
        get: loads it into memory; takes a callback that is called with the number of bytes loaded.
    """

    version: Version
    run_id: str
    origin: str | None
    where: str
    size_bytes: int
    get: Callable[[Callable[[int], None]], Captured]


def write_export(source: Source, step: int | None, kind: str, output: Path | None, *, force: bool) -> str:
    """Export a state.

    Args:
        source: where to look for the state.
        step: optimizer step; None for the newest.
        kind: `lightning`, `dcp` or `safetensors`.
        output: file or folder; None for a name made of run and step.
        force: overwrite an existing output.

    Returns:
        A sentence that describes what was written.

    Raises:
        OptionsError: the output exists, or the step is not available.
        DurableError: there is no complete version, or it cannot be read or written.
    """
    if output is not None:
        _require_free(output, force=force)
    choice = _choose(source, step)
    target = output or Path(f"{choice.run_id}-step-{choice.version.optimizer_step}{_SUFFIX[kind]}")
    _require_free(target, force=force)
    with _progress() as bar:
        task = bar.add_task(f"reading {choice.version}", total=choice.size_bytes)
        captured = choice.get(lambda done: bar.advance(task, done))
        bar.update(task, completed=choice.size_bytes)
        writing = bar.add_task(f"writing {target}", total=None)
        _write(captured, choice, kind, target, lambda done: bar.advance(writing, done))
    size_bytes = _size(target)
    return f"{target}: {captured.snapshot.version} of run {choice.run_id}, {decimal(size_bytes)}, from {choice.where}"


def _require_free(target: Path, *, force: bool) -> None:
    if target.exists() and not force:
        raise OptionsError(f"{target} already exists: choose another name, or use --force to overwrite it")
    if not target.absolute().parent.is_dir():
        raise OptionsError(f"{target}: the folder {target.absolute().parent} does not exist")


# ------------------------------------------------------------------ finding


def _choose(source: Source, step: int | None) -> _Choice:
    choices = [*_in_arenas(source, step), *_durable(source)]
    matching = [choice for choice in choices if step in (None, choice.version.optimizer_step)]
    if matching:
        # Arenas come first in the list: of two equal versions, the one in memory is faster to read.
        return max(enumerate(matching), key=lambda entry: (entry[1].version, -entry[0]))[1]
    if not choices:
        raise DurableError(f"{source.name}: nothing to export: {_why_nothing(source)}")
    available = ", ".join(str(choice.version) for choice in sorted(choices, key=lambda choice: choice.version))
    raise OptionsError(f"{source.name}: step {step} is not available (any more); available: {available}")


def _in_arenas(source: Source, step: int | None) -> Iterator[_Choice]:
    arenas = _arenas(source)
    for at in _wanted(arenas, step):
        found = newest_committed(arenas, at=at)
        if isinstance(found, Complete):
            yield _Choice(
                version=found.snapshot.version,
                run_id=arenas[0].run_id,
                origin=arenas[0].notes().origin or None,
                where="shared memory",
                size_bytes=sum(kept[0].bulk_bytes for kept in found.replicas),
                get=lambda progress, at=at: _capture(arenas, at, progress),  # type: ignore[misc]
            )


def _wanted(arenas: list[Arena], step: int | None) -> list[Version | None]:
    """Return the versions to look for: the newest, or both of a step, after and before validation."""
    if not arenas:
        return []
    return [None] if step is None else [Version(step, True), Version(step, False), None]


def _capture(arenas: list[Arena], at: Version | None, progress: Callable[[int], None]) -> Captured:
    captured = capture(arenas, CopyBuffers(), at=at)
    progress(sum(shard.bulk.numel() for shard in captured.shards))
    return captured


def _arenas(source: Source) -> list[Arena]:
    """Return the arenas on this host of the run's newest `fit`."""
    if source.run is None:
        return []
    arenas = []
    for info in arenas_of(source.run.run_id, source.arena_dir or source.run.arena_dir):
        try:
            arenas.append(Arena.attach(info.path))
        except ArenaError:
            # Removed in the meantime: the run has just ended.
            continue
    newest = max((arena.run_id for arena in arenas), key=lambda name: (len(name), name), default="")
    return [arena for arena in arenas if arena.run_id == newest]


def _durable(source: Source) -> Iterator[_Choice]:
    if source.state is not None:
        yield _from_state(source.state, Manifest.read(source.state))
    elif source.durable is not None:
        for path, manifest in DurableFolder(source.durable).states():
            yield _from_state(path, manifest)


def _from_state(path: Path, manifest: Manifest) -> _Choice:
    return _Choice(
        version=manifest.snapshot.version,
        run_id=manifest.run_id,
        origin=manifest.origin,
        where=f"the durable state {path}",
        size_bytes=sum(shard.bulk_bytes for shard in manifest.shards),
        get=lambda progress: load_state(path, manifest, progress),
    )


def _why_nothing(source: Source) -> str:
    if source.run is None:
        return "there is no complete durable state"
    if not (arenas := _arenas(source)):
        return "its arenas no longer exist, and it has written no durable state"
    return newest_committed(arenas).reason


# ------------------------------------------------------------------ writing


def _write(captured: Captured, choice: _Choice, kind: str, target: Path, progress: Callable[[int], None]) -> None:
    """Write to a temporary name and rename, so that readers never see a partial file."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        require_space(target.absolute().parent, state_bytes(captured))
        if kind == "dcp":
            part.mkdir()
            write_state(captured, part)
            write_manifest(part, _manifest(captured, choice))
        else:
            with part.open("wb") as file:
                _write_file(captured, choice, kind, file, progress)
                file.flush()
                os.fsync(file.fileno())
        _remove(target)
        part.rename(target)
    except (OSError, RuntimeError) as error:
        if isinstance(error, DurableError):
            raise
        raise DurableError(f"{target}: cannot write: {error}") from error
    finally:
        _remove(part)


def _write_file(
    captured: Captured, choice: _Choice, kind: str, file: BinaryIO, progress: Callable[[int], None]
) -> None:
    counted: Any = _Counted(file, progress)
    if kind == "lightning":
        torch.save(lightning_checkpoint(captured), counted, pickle_module=PICKLE_MODULE)
        return
    recipe = recipe_in(captured)
    state = model_state(recipe, host_state_of(captured), tensors_of(captured))
    weights = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    facts = {"format": "pt", "run": choice.run_id, "step": str(captured.snapshot.version.optimizer_step)}
    write_safetensors(weights, facts, counted)


class _Counted:
    """A file that reports how many bytes were written."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None]) -> None:
        self._file = file
        self._progress = progress

    def write(self, data: Any) -> int:
        """Write all data in chunks and report each."""
        view = memoryview(data).cast("B")
        for at in range(0, len(view), _CHUNK_BYTES):
            self._progress(self._file.write(view[at : at + _CHUNK_BYTES]))
        return len(view)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()


def _manifest(captured: Captured, choice: _Choice) -> Manifest:
    shards = tuple(ShardFacts(s.bulk.numel(), len(s.blob), s.checksum) for s in captured.shards)
    return Manifest(choice.run_id, captured.snapshot, shards, choice.origin, None, time.time())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    # On stderr, so that stdout has only the result line, which scripts may parse.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        yield bar
