"""Random damage to files: a reader returns the original contents or raises its documented error, and nothing else.

Each record is damaged in two ways: its bytes are changed, and its fields are changed under a correct digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ckptless.cli.survey.reader import RunReader
from lightning_ckptless.cli.survey.survey import survey_of
from lightning_ckptless.cli.view.timeline import timeline_of
from lightning_ckptless.durable.capture import Captured
from lightning_ckptless.durable.checkpoint import recipe_in
from lightning_ckptless.durable.folder import Manifest, ShardFacts
from lightning_ckptless.durable.parts import Part
from lightning_ckptless.durable.places import Place, read_places, write_places
from lightning_ckptless.durable.recipe import Recipe, seal_recipe
from lightning_ckptless.errors import ArenaError, CkptlessError, DurableError
from lightning_ckptless.formats.ledger_events import seal_line
from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import UntrustedError, admit
from lightning_ckptless.formats.schema import SchemaError
from lightning_ckptless.formats.sealed import seal
from lightning_ckptless.ledger import LEDGER_NAME, Ledger, read_ledger
from lightning_ckptless.protocol.durable_schedule import Share
from lightning_ckptless.protocol.retry_policy import RecoveryHistory
from lightning_ckptless.protocol.versions import SlotState, Snapshot, Version
from lightning_ckptless.replica import arena_metadata
from lightning_ckptless.replica.arena import find_arenas
from lightning_ckptless.replica.arena_metadata import ArenaMetadata
from lightning_ckptless.replica.arena_notes import (
    ArenaNotes,
    RankFolders,
    RecoveryRecord,
    read_note,
    read_notes,
    write_notes,
)
from lightning_ckptless.replica.arena_owner import Owner
from lightning_ckptless.replica.layout.layout import Layout, slot_views
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.slot import SlotHeader
from lightning_ckptless.replica.slot_stamp import Stamp
from tests.cli.ledgers import write_ledger
from tests.formats.mutations import MUTATIONS, changed, damaged

HALF = MUTATIONS // 2
SNAPSHOT = Snapshot(Version(10, True), 3, 2, "ab" * 32)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where ten thousand files are written faster."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def require_contained(
    read: Callable[[bytes], Any], versions: Iterable[bytes], allowed: type[Exception], expected: Any = None
) -> int:
    """Read damaged data and require that each read raises the allowed error or returns the expected value.

    Args:
        read: reader under test.
        versions: damaged copies of the data.
        allowed: error that may be raised.
        expected: value that may be returned; None for anything that the reader's schema allows.

    Returns:
        Number of copies that were refused.
    """
    refused = 0
    for data in versions:
        try:
            found = read(data)
        except allowed:
            refused += 1
        else:
            assert expected is None or found == expected, data
    return refused


def fields_of(sealed: bytes) -> dict[str, Any]:
    return {key: value for key, value in json.loads(sealed).items() if key not in ("format", "kind", "digest")}


def resealed(sealed: bytes, seed: int) -> Iterator[bytes]:
    """Yield the record with changed fields and a correct digest."""
    head = json.loads(sealed)
    return (seal(head["kind"], head["format"], fields) for fields in changed(fields_of(sealed), seed, HALF))


def through(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """Make a reader of bytes from a reader of a file."""

    def written(data: bytes) -> Any:
        path.write_bytes(data)
        return read(path)

    return written


def test_arena_metadata(memory: Path) -> None:
    folder = memory / f"{arena_metadata.FOLDER_PREFIX}run-node"
    folder.mkdir()
    facts = ArenaMetadata("run", "node0", Owner(os.getpid(), 1e9), 1.7e9, "last.ckpt")
    facts.write(folder)
    data = (folder / "arena.json").read_bytes()
    read = through(folder / "arena.json", lambda _: ArenaMetadata.read(folder))
    require_contained(read, damaged(data, 1, HALF), ArenaError, facts)

    def read_all(data: bytes) -> None:
        read(data).owner.alive()

    assert require_contained(read_all, resealed(data, 2), ArenaError) > HALF / 4
    for other in resealed(data, 3):
        (folder / "arena.json").write_bytes(other.replace(b"digest", b"unknown"))
        arena_metadata.living_owner(folder)
    assert find_arenas(memory) == ()


def test_arena_notes(memory: Path) -> None:
    folders = RankFolders("/a", "/b", (("ModelCheckpoint", None), ("SimpleProfiler", "/c")))
    examples = {
        "recoveries": ArenaNotes(recoveries=RecoveryRecord(RecoveryHistory(3, 1, (1.0, 2.5)), 7)),
        "folders": ArenaNotes(folders=(folders,)),
        "logger_identities": ArenaNotes(logger_identities=[{"kind": "CSVLogger", "identity": {"_version": 3}}]),
        "durable share": ArenaNotes(durable_share=Share((0, 1), 2, leads=True)),
        "data_hooks_0": ArenaNotes(data_hooks={0: {"train": "AAAA", "validation": None}}),
        "generation": ArenaNotes(generation=3),
    }
    for number, (name, notes) in enumerate(examples.items()):
        write_notes(memory, notes)
        assert read_notes(memory) == notes
        (path,) = memory.glob("note-*")
        data = path.read_bytes()
        some = list(damaged(data, number, HALF // len(examples) + 1))
        require_contained(partial(read_note, name=name), some, SchemaError, read_note(data, name))
        others = [*resealed(data, number)][: HALF // len(examples) + 1]
        require_contained(partial(read_note, name=name), others, SchemaError)
        path.write_bytes(some[0])
        assert read_notes(memory) == ArenaNotes()
        path.unlink()


def some_layout() -> Layout:
    tensors = {"weight": torch.zeros(30, 7), "bias": torch.zeros(7), "step": torch.zeros((), dtype=torch.int64)}
    return plan_layout([describe(tensors, replicated=True), describe(tensors, replicated=True)])


def test_layouts() -> None:
    layout = some_layout()
    data = layout.to_bytes()
    refused = require_contained(lambda d: Layout.from_bytes(d, layout.digest), damaged(data, 4, HALF), SchemaError)
    assert refused == HALF

    def use(data: bytes) -> None:
        found = Layout.from_bytes(data, hashlib.sha256(data).hexdigest())
        assert found.need and found.held_by(0) is not None and found.known_to(1) is not None
        for shard in range(min(found.world_size, 3)):
            if found.bulk_bytes(shard) < 1 << 20:
                slot_views(found, shard, torch.zeros(found.bulk_bytes(shard), dtype=torch.uint8))

    others = (json.dumps(fields).encode() for fields in changed(json.loads(data), 5, HALF))
    assert require_contained(use, others, SchemaError) > HALF / 2


def test_slot_headers() -> None:
    stamp = Stamp(SNAPSHOT.version, 3, 2, SNAPSHOT.layout, 1, 0)
    header = SlotHeader("run", stamp, SlotState.COMMITTED, 4096, 77, "xxh3:00ff")
    page = header.encode()
    length = len(page.rstrip(b"\0"))
    for data in damaged(page[:length], 6, HALF):
        assert SlotHeader.decode(data.ljust(len(page), b"\0")) in (None, header)
    fields = json.loads(page[16:length])
    refused = 0
    for other in changed(fields, 7, HALF):
        found = SlotHeader.decode(with_checksum(other))
        refused += found is None
        assert found is None or (found.stamp.shard < found.stamp.world_size and found.bulk_bytes >= 0)
    assert refused > HALF / 2


def with_checksum(fields: dict[str, Any]) -> bytes:
    """Return a header page with a correct checksum for arbitrary fields."""
    text = json.dumps(fields).encode()
    return struct.pack("<8sHHI", b"ckptless", 1, len(text) & 0xFFFF, zlib.crc32(text)) + text


def test_durable_manifests(memory: Path) -> None:
    state = memory / "step-0000000010"
    state.mkdir()
    shards = (ShardFacts(640, 77, "xxh3:00ff"), ShardFacts(64, 80, "xxh3:11ff"))
    identities = [{"kind": "CSVLogger", "identity": {"_version": 3}}]
    manifest = Manifest("run", SNAPSHOT, shards, None, identities, 1.7e9)
    data = manifest.to_bytes()
    read = through(state / "state.json", lambda _: Manifest.read(state))
    require_contained(read, damaged(data, 8, HALF), DurableError, manifest)

    def read_label(data: bytes) -> None:
        found = read(data)
        assert found.snapshot.version == SNAPSHOT.version, "a changed step was accepted"
        assert len(found.shards) == found.snapshot.world_size

    assert require_contained(read_label, resealed(data, 9), DurableError) > HALF / 2


def test_places_and_parts(memory: Path) -> None:
    places = [
        Place("weight", (0, 0), "__0_0.distcp", 0, 900),
        Place("rank0/host_state", None, "__0_0.distcp", 900, 77),
    ]
    write_places(memory, places)
    path = memory / "places.json"
    data, expected = path.read_bytes(), read_places(memory)
    read = through(path, lambda _: read_places(memory))
    require_contained(read, damaged(data, 10, HALF), DurableError, expected)
    require_contained(read, resealed(data, 11), DurableError)
    part = Part({0: ShardFacts(640, 77, "xxh3:00ff")}, {0: tuple(places)})
    require_contained(through(path, Part.read), damaged(part.to_bytes(), 12, HALF), DurableError, part)
    require_contained(through(path, Part.read), resealed(part.to_bytes(), 13), DurableError)


def test_recipes() -> None:
    recipe = Recipe("2.5", {"a": "b"}, {}, {}, [[["a"]]], ["c"], "p", None, {"lr": 0.1}, {}, None, ())
    packed = pack(recipe)
    data = seal_recipe(packed)

    def read(data: bytes) -> Recipe:
        return recipe_in(Captured(SNAPSHOT, some, (), data))

    some = some_layout()
    require_contained(read, damaged(data, 14, HALF), DurableError, recipe)
    require_contained(read, (seal_recipe(other) for other in damaged(packed, 15, HALF)), DurableError)


def test_host_states() -> None:
    value = {
        "counters": {"step": 7, "done": False}, "loss": torch.arange(3.0), "names": ["a", ("b", 2.5)],
        "inner": pack({"seen": {1, 2}}), "version": SNAPSHOT.version,
    }  # fmt: skip
    packed = pack(value)
    for data in damaged(packed, 16):
        try:
            admitted = admit(data)
        except UntrustedError:
            continue
        try:
            unpack(admitted)
        except (
            pickle.UnpicklingError, ValueError, TypeError, LookupError, AttributeError, EOFError, RuntimeError,
            MemoryError, OverflowError,
        ):  # fmt: skip
            continue


def test_ledgers(memory: Path) -> None:
    folder = write_ledger(memory)
    ledger = Ledger(folder / LEDGER_NAME, clock=lambda: 1012.0)
    ledger.record(
        "placement", generation=3, kind="node", copies=1, holders=[[1], [0]], domains=["a", "b"], nodes=["a", "b"],
        sizes_bytes=[640, 64], version="step 1",
    )  # fmt: skip
    ledger.record("durable_written", step=5, path="/d/step-0000000005")
    ledger.record("checkpoint", action="save", fit=0, path="/a.ckpt", existed=False, after_step=3, after_tail=True)
    lines = (folder / LEDGER_NAME).read_bytes().splitlines()
    whole = read_ledger(folder / LEDGER_NAME).events
    assert len(whole) == len(lines)
    each = HALF // len(lines) + 1
    for number, line in enumerate(lines):
        path = memory / "line"
        path.write_bytes(b"\n".join(data.replace(b"\n", b"") for data in damaged(line, number, each)))
        assert set(map(repr, read_ledger(path).events)) <= {repr(whole[number])}
    for number, line in enumerate(lines):
        for fields in changed({k: v for k, v in json.loads(line).items() if k not in ("format", "crc")}, number, each):
            lines_now = [*lines]
            lines_now[number] = seal_line(json.dumps(fields).encode())
            read_as_status_does(folder, lines_now, memory)


def read_as_status_does(folder: Path, lines: list[bytes], arenas: Path) -> None:
    """Read a ledger as `ckptless status` and `ckptless timeline` do."""
    (folder / LEDGER_NAME).write_bytes(b"\n".join(lines))
    events = read_ledger(folder / LEDGER_NAME).events
    try:
        asdict(survey_of(RunReader(folder, arenas, clock=lambda: 2000.0).read()))
        if events:
            timeline_of("run", events)
    except CkptlessError:
        pass
