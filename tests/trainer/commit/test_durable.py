"""Durable states as seen by a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_ckptless import environment
from lightning_ckptless.configuration.variables import with_variables
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.placement import place
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.transport import SoloTransport
from lightning_ckptless.trainer.commit.durable import DurableRung
from lightning_ckptless.trainer.session.identity import Identity
from lightning_ckptless.trainer.session.member_set import MemberSet
from tests.replica.conftest import arena, owner

__all__ = ["arena", "owner"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("durable_every_n_steps", 0),
        ("durable_every_n_steps", 1.5),
        ("durable_every_s", 0.0),
        ("durable_every_s", -1.0),
        ("durable_every_s", float("nan")),
        ("durable_keep", 0),
    ],
)
def test_options_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(OptionsError, match=f"{name}="):
        CkptlessOptions(**{name: value})


def test_options_of_the_launcher_take_precedence_over_the_strategy() -> None:
    options = CkptlessOptions(durable_every_n_steps=7, durable_keep=3)
    assert with_variables(options, {}) is options
    env = {environment.DURABLE_EVERY_N_STEPS: "9", environment.DURABLE_EVERY_S: "1.5", environment.DURABLE_DIR: "/x"}
    changed = with_variables(options, env)
    assert (changed.durable_every_n_steps, changed.durable_every_s) == (9, 1.5)
    assert (changed.durable_dir, changed.durable_keep) == (Path("/x"), 3)
    with pytest.raises(OptionsError, match="CKPTLESS_DURABLE_EVERY_S='often': expected a number greater than 0"):
        with_variables(options, {environment.DURABLE_EVERY_S: "often"})


def identity(folder: Path) -> Identity:
    return Identity("run", "node0", 1, own_agent=True, run_root=folder)


def test_each_fit_has_its_own_folder(tmp_path: Path) -> None:
    options = CkptlessOptions(durable_dir=tmp_path / "states")
    assert DurableRung(identity(tmp_path), 0, options).folder.path == tmp_path / "states"
    assert DurableRung(identity(tmp_path), 2, options).folder.path == tmp_path / "states.2"
    assert DurableRung(identity(tmp_path), 0, CkptlessOptions()).folder.path == tmp_path / "run" / "durable"


def members_of(nodes: str, copies: int, arena: Arena) -> MemberSet:
    return MemberSet(SoloTransport(), arena, tuple(nodes), place(list(nodes), copies), 1, ())


@pytest.mark.parametrize(("nodes", "copies", "shards"), [("aabb", 1, 4), ("aabbcc", 1, 2), ("aabbcc", 2, 6)])
def test_a_single_node_writes_all_shards_if_it_holds_all(
    nodes: str, copies: int, shards: int, arena: Arena, tmp_path: Path
) -> None:
    rung = DurableRung(identity(tmp_path), 0, CkptlessOptions(durable_every_n_steps=6, mirror_every_n_steps=4))
    rung.assign_writer(members_of(nodes, copies, arena))
    share = arena.notes().durable_share
    assert share is not None
    assert (len(share.shards), share.leads, share.every_n_steps) == (
        shards, True, None if shards == len(nodes) else 12,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [CkptlessOptions(durable_every_s=1.0), CkptlessOptions(durable_every_n_steps=5, mirror_every_n_steps="auto")],
)
def test_several_writers_require_a_schedule_in_steps(options: CkptlessOptions, arena: Arena, tmp_path: Path) -> None:
    rung = DurableRung(identity(tmp_path), 0, options)
    rung.assign_writer(members_of("aabb", 1, arena))
    with pytest.raises(
        OptionsError, match="with copies=1 no node holds all 6 shards, so 3 nodes write each durable state"
    ):
        rung.assign_writer(members_of("aabbcc", 1, arena))
