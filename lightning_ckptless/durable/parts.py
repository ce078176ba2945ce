"""The parts of a durable state that several nodes write, each the shards of its own ranks.

    <durable_dir>/
        .step-0000000120.of-3-1f9c.parts/     of generation 3 and one layout; every node writes into it
            __0_0.distcp, __1_0.distcp        torch.distributed.checkpoint's: one file per shard
            part-0000.json                    which shards a node has written: there when they are on the disk
        step-0000000120/                      the same folder, when the first node has found all parts

Nobody is asked when a state is due, and nobody waits: each node writes the same versions, and the first one puts a
state together when its parts are there. A state that a node has missed is never seen by anybody.
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
FORMAT = 1


@dataclass(frozen=True)
class Part:
    """What one node has written of a state.

    Args:
        facts: of each shard.
        places: where the pieces of each lie.
    """

    facts: dict[int, ShardFacts]
    places: dict[int, Sequence[Place]]

    def to_bytes(self) -> bytes:
        """As a sealed record."""
        return seal(_KIND, FORMAT, {
            "facts": {str(shard): asdict(facts) for shard, facts in self.facts.items()},
            "places": {str(shard): to_json(places) for shard, places in self.places.items()},
        })  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> Part:
        """What a node has said.

        Raises:
            DurableError: it is damaged.
        """
        try:
            part: Part = unseal(path.read_bytes(), _KIND, FORMAT, _SCHEMA)
        except (OSError, SchemaError) as error:
            raise DurableError(f"{path}: {error}") from error
        return part


def _shard(value: Any, place: str) -> int:
    return int(text(r"\d{1,6}")(value, place))


_SCHEMA = record(Part, facts=table(_shard, SHARD_FACTS, most=MOST_RANKS), places=table(_shard, PLACES, most=MOST_RANKS))


class Parts:
    """The folder of one state on its way.

    Args:
        durable_dir: folder of all states.
        snapshot: of the state.
    """

    def __init__(self, durable_dir: Path, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        name = f".{state_name(snapshot.version)}.of-{snapshot.generation}-{snapshot.layout[:12]}.parts"
        self.path = durable_dir / name

    def write(self, layout: Layout, shards: Mapping[int, ShardCopy]) -> None:
        """Write this node's shards; the word that they are there comes last.

        Raises:
            OSError, RuntimeError: they cannot be written.
        """
        self.path.mkdir(mode=0o700, exist_ok=True)
        require_private_files(self.path)
        places = write_shards(layout, shards, self.path)
        facts = {s: ShardFacts(copy.bulk.numel(), len(copy.blob), copy.checksum) for s, copy in shards.items()}
        name = f"{_PART}{min(shards):04d}.json"
        write_synced(self.path / f".{name}", Part(facts, places).to_bytes())
        (self.path / f".{name}").rename(self.path / name)

    def missing(self) -> tuple[int, ...]:
        """Shards that nobody has written yet."""
        there = self.read().facts
        return tuple(shard for shard in range(self.snapshot.world_size) if shard not in there)

    def read(self) -> Part:
        """All parts that are there, as one.

        Raises:
            DurableError: another user may have written to the folder, or a part is damaged.
        """
        whole = Part({}, {})
        if not os.path.lexists(self.path):
            return whole
        try:
            require_private_files(self.path)
        except PermissionError as error:
            raise DurableError(str(error)) from error
        for path in sorted(self.path.glob(f"{_PART}*.json")):
            part = Part.read(path)
            whole.facts.update(part.facts)
            whole.places.update(part.places)
        return whole

    def forget_words(self) -> None:
        """Remove what readers of the state have no use for."""
        for path in self.path.glob(f"{_PART}*.json"):
            path.unlink()

    def remove(self) -> None:
        """Remove all parts."""
        shutil.rmtree(self.path, ignore_errors=True)


def remove_parts_up_to(durable_dir: Path, version: Version) -> None:
    """Remove the parts of states that will not be completed any more: a newer one is."""
    for path in durable_dir.glob(".step-*.parts"):
        named = _NAME.fullmatch(path.name)
        found = named and version_of(named[1])
        if found is not None and found <= version:
            shutil.rmtree(path, ignore_errors=True)
