"""Reads and writes a durable state on disk, in the format of torch.distributed.checkpoint.

Tensors have the names of the layout: `parameter/<name>`, `optimizer/<index>/<parameter>/<key>`, and `rank<r>/...` for
tensors that are private to a rank. The host state of a rank is the entry `rank<r>/host_state`, as bytes. `dcp.load`
reads selected tensors. We read complete shards byte for byte, so that the checksum computed when the rank staged the
shard protects it end to end, in the arena and on disk.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from lightning_ckptless.durable.capture import Captured, ShardCopy
from lightning_ckptless.durable.folder import Manifest, write_synced
from lightning_ckptless.durable.places import Place, Places, places_of, read_places, write_places
from lightning_ckptless.durable.recipe import NAME as RECIPE_NAME
from lightning_ckptless.durable.recipe import read_recipe
from lightning_ckptless.errors import DurableError
from lightning_ckptless.formats.schema import SchemaError
from lightning_ckptless.replica.checksum import bytes_of, matches
from lightning_ckptless.replica.layout.layout import Layout, private_name, slot_views, write_item

_LAYOUT = "layout.json"
_BYTES_PER_ENTRY = 2048
"""Upper bound for the overhead of a piece."""

_CANNOT_READ = (
    OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, AssertionError, ImportError,
    pickle.UnpicklingError,
)  # fmt: skip
"""Errors that torch's reader raises for damaged files."""


def state_bytes(captured: Captured) -> int:
    """Return an upper bound for the bytes that a state takes on disk."""
    shards = sum(shard.bulk.numel() + len(shard.blob) for shard in captured.shards)
    return shards + _BYTES_PER_ENTRY * (len(captured.layout.chunks) + len(captured.shards) + 8)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Check that a state fits before it is written.

    Raises:
        DurableError: it does not fit.
    """
    disk = os.statvfs(folder)
    free_bytes = disk.f_bavail * disk.f_frsize
    if needed_bytes > free_bytes:
        raise DurableError(
            f"{folder}: {needed_bytes / 1e6:.1f} MB needed, {free_bytes / 1e6:.1f} MB free: free some space, use "
            "another durable_dir, or keep fewer states (durable_keep)"
        )


def write_state(captured: Captured, folder: Path) -> int:
    """Write a state without its manifest to an empty folder and sync it to disk.

    Args:
        captured: version to write.
        folder: empty folder.

    Returns:
        Number of bytes written.

    Raises:
        OSError, RuntimeError: the files cannot be written.
    """
    places = write_shards(captured.layout, dict(enumerate(captured.shards)), folder)
    return finish_state(captured.layout, places, captured.recipe, folder)


def write_shards(layout: Layout, shards: Mapping[int, ShardCopy], folder: Path) -> dict[int, Sequence[Place]]:
    """Write some shards of a state and sync them to disk.

    Args:
        layout: layout of the state.
        shards: shards by index.
        folder: folder of the state.

    Returns:
        The places of the pieces, by shard.

    Raises:
        OSError, RuntimeError: the files cannot be written.
    """
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(is_coordinator=True)
    plans = writer.prepare_global_plan([_plan(layout, shard) for shard in range(layout.world_size)])
    places: dict[int, Sequence[Place]] = {}
    for shard, copy in shards.items():
        writer.prepare_local_plan(plans[shard])
        places[shard] = places_of(writer.write_data(plans[shard], _ShardPlanner(layout, shard, copy)).wait())
    return places


def finish_state(layout: Layout, places: Mapping[int, Sequence[Place]], recipe: bytes, folder: Path) -> int:
    """Write the files that are common to all shards, except the manifest, and sync them to disk.

    Args:
        layout: layout of the state.
        places: places of all shards, returned by `write_shards`.
        recipe: sealed recipe for a Lightning checkpoint; empty for none.
        folder: folder of the state.

    Returns:
        Size of the state in bytes.

    Raises:
        OSError, RuntimeError: the files cannot be written.
    """
    metadata = replace(layout.metadata, state_dict_metadata=dict(layout.metadata.state_dict_metadata))
    for shard in range(layout.world_size):
        metadata.state_dict_metadata[host_state_name(shard)] = BytesStorageMetadata()
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(is_coordinator=True)
    everything = [place for shard in range(layout.world_size) for place in places[shard]]
    writer.finish(metadata, [[place.to_result() for place in everything]])
    write_places(folder, everything)
    write_synced(folder / _LAYOUT, layout.to_bytes())
    if recipe:
        write_synced(folder / RECIPE_NAME, recipe)
    return sum(path.stat().st_size for path in folder.iterdir())


def host_state_name(rank: int) -> str:
    """Return the entry name of a rank's host state."""
    return private_name(rank, "host_state")


def read_layout(state: Path) -> Layout:
    """Read the layout of a state.

    Raises:
        DurableError: the file is missing or damaged.
    """
    manifest = Manifest.read(state)
    try:
        layout = Layout.from_bytes((state / _LAYOUT).read_bytes(), manifest.snapshot.layout)
    except (OSError, SchemaError) as error:
        raise DurableError(f"{state / _LAYOUT}: {error}") from error
    if layout.world_size != manifest.snapshot.world_size:
        raise DurableError(
            f"{state / _LAYOUT}: expected {manifest.snapshot.world_size} ranks, found {layout.world_size}"
        )
    return layout


def read_shard(state: Path, manifest: Manifest, layout: Layout, places: Places, shard: int) -> ShardCopy:
    """Read one shard of a state, byte for byte as it was staged.

    Args:
        state: folder of the state.
        manifest: manifest of the state.
        layout: layout of the state.
        places: places of its pieces.
        shard: index of the shard.

    Raises:
        DurableError: the shard cannot be read or is damaged.
    """
    facts = manifest.shards[shard]
    if facts.bulk_bytes != (expected := layout.bulk_bytes(shard)):
        raise DurableError(f"{state}: shard {shard} has {facts.bulk_bytes} bytes, expected {expected}")
    # The padding between the pieces is zero, as in a slot, since the checksum covers it.
    copy = ShardCopy(torch.zeros(facts.bulk_bytes, dtype=torch.uint8), b"", facts.checksum)
    try:
        blob = _read_piece(state, places[MetadataIndex(host_state_name(shard))])
        for index, view in _views(layout, shard, copy.bulk).items():
            piece = io.BytesIO(_read_piece(state, places[index]))
            view.copy_(torch.load(piece, map_location="cpu", weights_only=True).view(view.shape))
    except _CANNOT_READ as error:
        raise DurableError(f"{state}: cannot read shard {shard}: {error!r}") from error
    if len(blob) != facts.blob_bytes or not matches(facts.checksum, (bytes_of(copy.bulk), blob)):
        raise DurableError(f"{state}: shard {shard} is damaged: its checksum does not match")
    return ShardCopy(copy.bulk, blob, facts.checksum)


def load_state(state: Path, manifest: Manifest, progress: Callable[[int], None] = lambda _bytes: None) -> Captured:
    """Load a complete state into memory.

    Args:
        state: folder of the state.
        manifest: manifest of the state.
        progress: called with the number of bytes of each shard.

    Raises:
        DurableError: the state cannot be read or is damaged.
    """
    layout, places, shards = read_layout(state), read_places(state), list[ShardCopy]()
    for shard in range(layout.world_size):
        shards.append(read_shard(state, manifest, layout, places, shard))
        progress(shards[-1].bulk.numel())
    return Captured(manifest.snapshot, layout, tuple(shards), read_recipe(state))


def _plan(layout: Layout, shard: int) -> SavePlan:
    host_state = WriteItem(index=MetadataIndex(host_state_name(shard)), type=WriteItemType.BYTE_IO)
    return SavePlan([host_state, *map(write_item, layout.of(shard))])


def _read_piece(state: Path, place: Place) -> bytes:
    with (state / place.file).open("rb") as file:
        if place.at + place.length > os.fstat(file.fileno()).st_size:
            raise EOFError(f"{place.file} is too short")
        file.seek(place.at)
        return file.read(place.length)


class _ShardPlanner(DefaultSavePlanner):
    """Passes the pieces of a shard to torch's writer."""

    def __init__(self, layout: Layout, shard: int, copy: ShardCopy) -> None:
        super().__init__(flatten_state_dict=False)
        self._views = _views(layout, shard, copy.bulk)
        self._blob = copy.blob

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return a view of a piece, or the host state."""
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(self._blob)
        return self._views[write_item.index]


def _views(layout: Layout, shard: int, bulk: torch.Tensor) -> dict[MetadataIndex, torch.Tensor]:
    items = [write_item(chunk) for chunk in layout.of(shard)]
    return {item.index: view for item, view in zip(items, slot_views(layout, shard, bulk), strict=True)}
