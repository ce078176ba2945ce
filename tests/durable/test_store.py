"""A state on disk is read back byte for byte, can be read by torch, and is refused if damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader as dcp

from lightning_ckptless.durable.capture import Captured, ShardCopy
from lightning_ckptless.durable.folder import Manifest, write_manifest
from lightning_ckptless.durable.places import read_places
from lightning_ckptless.durable.store import load_state, read_shard, require_space, state_bytes, write_state
from lightning_ckptless.errors import DurableError
from lightning_ckptless.protocol.versions import Snapshot, Version
from lightning_ckptless.replica.checksum import bytes_of, digest
from lightning_ckptless.replica.layout.layout import private_name, slot_views
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from tests.durable.conftest import manifest_of
from tests.replica.conftest import state

__all__ = ["state"]


def stored(captured: Captured, folder: Path) -> tuple[Path, Manifest]:
    folder.mkdir()
    manifest = manifest_of(captured)
    write_state(captured, folder)
    write_manifest(folder, manifest)
    return folder, manifest


def captured_from(state: dict[str, torch.Tensor], world_size: int = 3) -> Captured:
    """Build a version with tensors of every kind; those named `half` and `flags` are private to each rank."""
    own = {"half", "flags"}
    shared = describe({n: t for n, t in state.items() if n not in own}, replicated=True)
    private = describe({n: t for n, t in state.items() if n in own}, replicated=False)
    layout = plan_layout([shared + private] * world_size)
    shards = []
    for shard in range(world_size):
        bulk = torch.zeros(layout.bulk_bytes(shard), dtype=torch.uint8)
        for chunk, view in zip(layout.of(shard), slot_views(layout, shard, bulk), strict=True):
            source = state[chunk.name.removeprefix(private_name(shard, ""))]
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                source = source.narrow(dim, offset, size)
            view.copy_(source)
        blob = b"x" * (1000 * shard)
        shards.append(ShardCopy(bulk, blob, digest("xxh3", (bytes_of(bulk), blob))))
    return Captured(Snapshot(Version(7, True), 2, world_size, layout.digest), layout, tuple(shards), b"recipe")


def test_every_kind_of_tensor_is_read_back_byte_for_byte(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    captured = captured_from(state)
    folder, manifest = stored(captured, tmp_path / "state")
    loaded = load_state(folder, Manifest.read(folder))
    assert loaded.snapshot == captured.snapshot == manifest.snapshot
    assert loaded.layout.digest == captured.layout.digest
    assert loaded.recipe == b"recipe"
    for copy, before in zip(loaded.shards, captured.shards, strict=True):
        assert torch.equal(copy.bulk, before.bulk)
        assert copy.blob == before.blob
    assert state_bytes(captured) >= sum(path.stat().st_size for path in folder.glob("__*"))


def test_torch_reads_the_state(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = stored(captured_from(state), tmp_path / "state")
    names = {name: name for name in state if name not in {"half", "flags"}} | {"half": "rank2/half"}
    wanted = {plan: torch.zeros_like(state[name]) for name, plan in names.items()}
    dcp.load(wanted, checkpoint_id=str(folder), no_dist=True)
    for name, plan in names.items():
        assert torch.equal(wanted[plan], state[name]), name


@pytest.mark.parametrize("file", ["__1_0.distcp", "places.json", "layout.json", "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_damage_is_an_error(file: str, damage: str, captured: Captured, tmp_path: Path) -> None:
    folder, _ = stored(captured, tmp_path / "state")
    path = folder / file
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        # The host state of the rank comes first in its file; other bytes may be padding.
        at = 3 if file.startswith("__") else len(data) // 2
        data[at] ^= 1
        path.write_bytes(data)
    elif damage == "short":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    with pytest.raises(DurableError):
        load_state(folder, Manifest.read(folder))


def test_the_pickle_written_for_torch_is_not_read(captured: Captured, tmp_path: Path) -> None:
    folder, _ = stored(captured, tmp_path / "state")
    (folder / ".metadata").write_bytes(b"cos\n_exit\n(I1\ntR.")
    assert load_state(folder, Manifest.read(folder)).snapshot == captured.snapshot


def test_a_shard_with_a_wrong_checksum_is_an_error(captured: Captured, tmp_path: Path) -> None:
    folder, manifest = stored(captured, tmp_path / "state")
    other = replace(manifest.shards[1], checksum=manifest.shards[0].checksum)
    wrong, places = replace(manifest, shards=(manifest.shards[0], other)), read_places(folder)
    with pytest.raises(DurableError, match="shard 1 is damaged"):
        read_shard(folder, wrong, captured.layout, places, 1)


def test_a_lack_of_space_is_reported_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(DurableError, match=r"1000000000.0 MB needed, .* MB free: free some space"):
        require_space(tmp_path, 10**15)
