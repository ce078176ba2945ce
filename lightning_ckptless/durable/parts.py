"""The parts of a durable state that is written by several nodes, each writing the shards of its own ranks.

    <durable_dir>/
        .step-0000000120.of-3-1f9c.parts/     for generation 3 and one layout; every node writes into it
            __0_0.distcp, __1_0.distcp        files of torch.distributed.checkpoint, one per shard
            part-0000.json                    the shards of one node; written after they are synced to disk
        step-0000000120/                      the same folder, renamed when the first node has found all parts

Nodes do not coordinate and do not wait for each other: each writes the same versions, and the first node completes a
state when all its parts exist. A state that a node has missed never becomes visible.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_ckptless.durable.capture import ShardCopy
from lightning_ckptless.durable.folder import SHARD_FACTS, ShardFacts, write_synced
from lightning_ckptless.durable.places import PLACES, Place, to_json
from lightning_ckptless.durable.store import write_shards
from lightning_ckptless.errors import DurableError
from lightning_ckptless.formats.schema import MOST_RANKS, SchemaError, record, table, text
from lightning_ckptless.formats.sealed import seal, unseal
from lightning_ckptless.protocol.durable_schedule import state_name, version_of
from lightning_ckptless.protocol.versions import Snapshot, Version
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.system.private_files import require_private_files

_NAME = re.compile(r"\.(step-[\w-]+)\.of-(\d+)-(\w+)\.parts")
_PART = "part-"
_KIND = "part"
FORMAT = 2


@dataclass(frozen=True)
class Part:
    """The part of a state that one node has written.

    Args:
        facts: facts by shard.
        places: places of the pieces by shard.
    """

    facts: dict[int, ShardFacts]
    places: dict[int, Sequence[Place]]

    def to_bytes(self) -> bytes:
        """Serialize the part as a sealed record."""
        return seal(_KIND, FORMAT, {
            "facts": {str(shard): asdict(facts) for shard, facts in self.facts.items()},
            "places": {str(shard): to_json(places) for shard, places in self.places.items()},
        })  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> Part:
        """Read a part file.

        Raises:
            DurableError: the file is damaged.
        """
        try:
            part: Part = unseal(path.read_bytes(), _KIND, FORMAT, _SCHEMA)
        except (OSError, SchemaError) as error:
            raise DurableError(f"{path}: {error}") from error
        return part


def _shard(value: Any, path: str) -> int:
    return int(text(r"\d{1,6}")(value, path))


_SCHEMA = record(Part, facts=table(_shard, SHARD_FACTS, most=MOST_RANKS), places=table(_shard, PLACES, most=MOST_RANKS))


class Parts:
    """The folder of one incomplete state.

    Args:
        durable_dir: folder of all states.
        snapshot: snapshot of the state.
    """

    def __init__(self, durable_dir: Path, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        name = f".{state_name(snapshot.version)}.of-{snapshot.generation}-{snapshot.layout[:12]}.parts"
        self.path = durable_dir / name

    def write(self, layout: Layout, shards: Mapping[int, ShardCopy]) -> None:
        """Write this node's shards, then its part file.

        Raises:
            OSError, RuntimeError: the files cannot be written.
        """
        self.path.mkdir(mode=0o700, exist_ok=True)
        require_private_files(self.path)
        places = write_shards(layout, shards, self.path)
        facts = {s: ShardFacts(copy.bulk.numel(), len(copy.blob), copy.checksum) for s, copy in shards.items()}
        name = f"{_PART}{min(shards):04d}.json"
        write_synced(self.path / f".{name}", Part(facts, places).to_bytes())
        (self.path / f".{name}").rename(self.path / name)

    def missing(self) -> tuple[int, ...]:
        """Return the shards that no node has written yet."""
        written = self.read().facts
        return tuple(shard for shard in range(self.snapshot.world_size) if shard not in written)

    def read(self) -> Part:
        """Read and merge all existing parts.

        Raises:
            DurableError: another user may have written to the folder, or a part is damaged.
        """
        merged = Part({}, {})
        if not os.path.lexists(self.path):
            return merged
        try:
            require_private_files(self.path)
        except PermissionError as error:
            raise DurableError(str(error)) from error
        for path in sorted(self.path.glob(f"{_PART}*.json")):
            part = Part.read(path)
            merged.facts.update(part.facts)
            merged.places.update(part.places)
        return merged

    def remove_part_files(self) -> None:
        """Remove the part files, which a complete state does not need."""
        for path in self.path.glob(f"{_PART}*.json"):
            path.unlink()

    def remove(self) -> None:
        """Remove all parts."""
        shutil.rmtree(self.path, ignore_errors=True)


def remove_parts_up_to(durable_dir: Path, version: Version) -> None:
    """Remove the parts of states that will never be completed, since a newer one is complete."""
    for path in durable_dir.glob(".step-*.parts"):
        named = _NAME.fullmatch(path.name)
        found = named and version_of(named[1])
        if found is not None and found <= version:
            shutil.rmtree(path, ignore_errors=True)
