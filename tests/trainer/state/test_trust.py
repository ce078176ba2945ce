"""Host state with untrusted classes is rejected when it leaves the node's memory and when it arrives."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ckptless.durable.capture import Captured, ShardCopy
from lightning_ckptless.durable.folder import Manifest, ShardFacts, write_manifest
from lightning_ckptless.durable.store import write_state
from lightning_ckptless.errors import ArenaError, OptionsError
from lightning_ckptless.formats.packing import pack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.placement import place
from lightning_ckptless.protocol.versions import Complete, Snapshot, Version
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.replica.arena_space import is_in_memory
from lightning_ckptless.replica.checksum import bytes_of, digest
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.restore import Fetched
from lightning_ckptless.replica.transport import SoloTransport
from lightning_ckptless.trainer.commit.durable import DurableRung
from lightning_ckptless.trainer.session.identity import Identity
from lightning_ckptless.trainer.session.member_set import MemberSet
from lightning_ckptless.trainer.state.trust import OutgoingCheck, host_state_of

NAME = "tests.trainer.state.test_trust.Cursor"


class Cursor:
    def __init__(self) -> None:
        self.at = 3


class Runs:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Create an arena in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        made = Arena.create(Path(folder), "run", "a", Owner.of(os.getpid()))
        yield made
        made.close()


def members_of(nodes: str, arena: Arena, trusted: frozenset[str] = frozenset()) -> MemberSet:
    return MemberSet(SoloTransport(), arena, tuple(nodes), place(list(nodes), len(nodes) - 1), 1, (), trusted)


def state() -> Packed:
    return pack({"state": {"callbacks": [{"state": {}}, {"state": {"cursor": Cursor()}}]}})


def test_a_state_in_the_memory_of_one_node_may_contain_anything(arena: Arena) -> None:
    assert OutgoingCheck(CkptlessOptions(), members_of("a", arena)).where == ""
    packed = state()
    assert OutgoingCheck(CkptlessOptions(), members_of("a", arena)).checked(packed) is packed


@pytest.mark.parametrize(
    ("nodes", "options", "where"),
    [
        ("a", {"durable_every_n_steps": 5}, "the host state is written to durable states"),
        ("a", {"durable_every_s": 5.0}, "the host state is written to durable states"),
        ("ab", {}, "other nodes hold replicas of the host state"),
    ],
)
def test_an_untrusted_class_in_an_outgoing_state_is_named_with_its_path(
    nodes: str, options: dict[str, Any], where: str, arena: Arena
) -> None:
    check = OutgoingCheck(CkptlessOptions(**options), members_of(nodes, arena))
    with pytest.raises(OptionsError) as found:
        check.checked(state())
    message = str(found.value)
    assert message.startswith(f"rank 0: state.callbacks.1.state.cursor: it has a {NAME}, ")
    assert where in message and message.endswith(f"trusted_classes=['{NAME}']")
    trusting = OutgoingCheck(CkptlessOptions(**options, trusted_classes=[NAME]), members_of(nodes, arena))
    assert trusting.checked(state()) == state()


def test_a_state_that_is_packed_later_is_checked_then(arena: Arena) -> None:
    later = OutgoingCheck(CkptlessOptions(durable_every_n_steps=1), members_of("a", arena)).checked(state)
    assert callable(later)
    with pytest.raises(OptionsError, match=NAME):
        later()


def test_a_class_that_appears_later_is_detected(arena: Arena) -> None:
    check = OutgoingCheck(CkptlessOptions(durable_every_n_steps=1), members_of("a", arena))
    check.checked(pack({"state": 1}))

    class Holder:
        """Its class is new to this process, unlike the class that it unpickles as."""

        def __reduce__(self) -> Any:
            return Cursor, ()

    with pytest.raises(OptionsError, match=NAME):
        check.checked(pack({"state": Holder()}))


@pytest.mark.parametrize("value", ["mylab.Cursor", [3], ["Cursor"], ["a b.C"]])
def test_class_names_must_be_dotted(value: Any) -> None:
    with pytest.raises(OptionsError, match="trusted_classes="):
        CkptlessOptions(trusted_classes=value)


def test_a_state_from_a_peer_is_checked(arena: Arena, tmp_path: Path) -> None:
    def fetched(data: bytes, *received: int) -> Fetched:
        return Fetched({}, {0: data}, frozenset(received), 0, {})

    members = members_of("a", arena)
    assert host_state_of(0, fetched(state()), members)["state"]["callbacks"][1]["state"]["cursor"].at == 3
    with pytest.raises(OptionsError, match=f"the host state of rank 0: it has a {NAME}"):
        host_state_of(0, fetched(state(), 0), members)
    assert host_state_of(0, fetched(state(), 0), members_of("a", arena, frozenset({NAME})))["state"]
    with pytest.raises(OptionsError, match=r"posix\.mkdir"):
        host_state_of(0, fetched(pickle.dumps(Runs(tmp_path / "made")), 0), members)
    with pytest.raises(ArenaError, match="damaged"):
        host_state_of(0, fetched(bytes(state())[:-9], 0), members)
    assert not (tmp_path / "made").exists()


def test_in_memory_file_systems_are_recognized(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    device = os.stat(tmp_path).st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /x rw shared:1 - KIND none rw\n"
    for kind, is_memory in (("tmpfs", True), ("ext4", False)):
        mounts.write_text(f"30 1 0:99999 / / rw - tmpfs none rw\n{line.replace('KIND', kind)}")
        assert is_in_memory(tmp_path, mounts) is is_memory
    assert not is_in_memory(tmp_path, tmp_path / "missing")
    assert is_in_memory(Path("/dev/shm"))


# ---------------------------------------------------------------------- durable states


def write_durable(rung: DurableRung, step: int, blob: bytes) -> Path:
    """Write a durable state of one rank as a writer does."""
    layout = plan_layout([describe({"weight": torch.ones(8)}, replicated=True)])
    bulk = torch.zeros(layout.bulk_bytes(0), dtype=torch.uint8)
    copy = ShardCopy(bulk, blob, digest("xxh3", (bytes_of(bulk), blob)))
    captured = Captured(Snapshot(Version(step, True), 1, 1, layout.digest), layout, (copy,), b"")
    rung.folder.prepare()
    part = rung.folder.begin(captured.snapshot.version)
    write_state(captured, part)
    facts = (ShardFacts(bulk.numel(), len(blob), copy.checksum),)
    write_manifest(part, Manifest("run", captured.snapshot, facts, None, None, 1.0))
    return rung.folder.complete(part, captured.snapshot.version)


def resume_from(rung: DurableRung, members: MemberSet) -> tuple[list[str], int]:
    """Return why states were skipped, and the step of the state that is used."""
    reasons: list[str] = []
    for state in rung.states(members.transport):
        found = rung.bring(state, members)
        if isinstance(found, Complete):
            return reasons, found.snapshot.version.optimizer_step
        reasons.append(found)
    return reasons, 0


def test_untrusted_or_corrupt_durable_states_are_skipped_one_by_one(
    arena: Arena, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = CkptlessOptions(durable_dir=tmp_path / "durable")
    rung = DurableRung(Identity("run", "node0", 1, own_agent=True, run_root=tmp_path), 0, options)
    write_durable(rung, 10, pack({"state": 1}))
    write_durable(rung, 20, state())
    write_durable(rung, 30, pickle.dumps(Runs(tmp_path / "made")))
    torn = write_durable(rung, 40, pack({"state": 2}))
    relabelled = write_durable(rung, 50, pack({"state": 3})) / "state.json"
    (torn / "places.json").write_bytes((torn / "places.json").read_bytes()[:-40])
    relabelled.write_text(relabelled.read_text().replace('"optimizer_step": 50', '"optimizer_step": 58'))
    reasons, step = resume_from(rung, members_of("a", arena))
    assert step == 10
    assert [name in reason for name, reason in zip(("places.json", "posix.mkdir", NAME), reasons, strict=True)] == [
        True
    ] * 3
    assert "step-0000000050 is ignored" in caplog.text and "its digest does not match" in caplog.text
    assert not (tmp_path / "made").exists()
    reasons, step = resume_from(rung, members_of("a", arena, frozenset({NAME})))
    assert (len(reasons), step) == (2, 20)
