"""The arena of a failed start."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Arena, Owner, Stamp
from lightning_ckptless.replica.arena_notes import ArenaNotes
from lightning_ckptless.trainer.session.arenas import discard_if_empty


def test_an_arena_is_discarded_only_while_it_is_empty(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path, "run", "node", Owner.of(os.getpid()))
    arena.write_notes(ArenaNotes(generation=1))
    discard_if_empty(arena)
    assert list(tmp_path.iterdir()) == []

    arena = Arena.create(tmp_path, "run", "node", Owner.of(os.getpid()))
    slot, _ = arena.slots(0, 0, 16, layout="layout")
    stamp = Stamp(Version(1, True), 1, 1, "layout", 0, 0)
    slot.begin(stamp)
    slot.bulk.copy_(torch.arange(16).to(torch.uint8))
    slot.seal(stamp, b"small", "")
    slot.commit()
    discard_if_empty(arena)
    assert [replica.version for replica in arena.inventory()] == [Version(1, True)]
    arena.close()
