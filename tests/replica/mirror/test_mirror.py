"""Rounds of the mirror: committed, aborted, interrupted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_ckptless.errors import LayoutMismatchError, TransportError
from lightning_ckptless.protocol.placement import place
from lightning_ckptless.protocol.versions import SlotState, Version
from lightning_ckptless.replica import checksum
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.mirror.mirror import COMPARED_ROUNDS, Mirror
from lightning_ckptless.replica.mirror.moment import Moment
from lightning_ckptless.replica.transport import SoloTransport, Transport
from tests.replica.world import MakeWorld, State, StopError, stop_at, wait_for

# ------------------------------------------------------------------ rounds that are committed


@pytest.mark.parametrize(("world_size", "copies"), [(2, 1), (3, 1), (3, 2), (4, 1)])
def test_every_rank_commits_and_every_shard_has_its_copies(world: MakeWorld, world_size: int, copies: int) -> None:
    ranks = world(world_size, copies=copies).begin()
    for step in (1, 2, 3):
        ranks.submit(step)
        assert ranks.settle() == [Version(step, True)] * world_size
    replicas = [line for arena in ranks.arenas for line in arena.inventory()]
    kept = [replica for replica in replicas if replica.version == Version(3, True)]
    assert len(kept) == world_size * (copies + 1) and {line.state for line in kept} == {SlotState.COMMITTED}
    assert ranks.values() == {3.0}
    for lost in range(world_size):
        assert ranks.newest(without=[lost]) == 3 and ranks.values(without=[lost]) == {3.0}


def test_a_world_of_one_commits(arena: Arena) -> None:
    tensors = {"weight": torch.arange(1000.0)}
    mirror = Mirror(
        arena=arena,
        layout=plan_layout([describe(tensors, replicated=True)]),
        placement=place(["node0"], 0),
        transport=SoloTransport(),
        generation=1,
    )
    mirror.submit(Version(1, True), tensors, b"")
    assert mirror.settle() == Version(1, True) and mirror.committed == Version(1, True)
    mirror.close()


def test_the_two_slots_alternate(world: MakeWorld) -> None:
    ranks = world(2).begin()
    for step in (1, 2, 3, 4):
        ranks.submit(step)
    ranks.settle()
    held = sorted({line.version.optimizer_step for line in ranks.arenas[0].inventory()})
    assert held == [3, 4]


@pytest.mark.parametrize("verifies", [True, False])
def test_stats_count_what_was_done(world: MakeWorld, verifies: bool) -> None:
    ranks = world(2).begin(verifies=verifies)
    for step in (1, 2):
        ranks.submit(step)
    ranks.settle()
    stats = ranks.mirrors[0].stats
    own_bytes = ranks.layout().bulk_bytes(0)
    # A holder has all but the private tensor.
    sent_bytes = 9 * 4 if verifies else own_bytes
    assert (stats.rounds, stats.committed, stats.aborted, stats.torn) == (2, 2, 0, 0)
    assert stats.staged_bytes == 2 * own_bytes and stats.sent_bytes == 2 * (sent_bytes + len(b"blob 0 1"))
    assert stats.last_round_s >= stats.last_stage_s > 0


@pytest.mark.parametrize("algorithm", ["xxh3", "crc32", "none"])
@pytest.mark.parametrize("staging", ["overlap", "blocking", "device"])
def test_every_option_commits(world: MakeWorld, algorithm: str, staging: str) -> None:
    ranks = world(2).begin(checksum=algorithm, staging=staging)
    ranks.submit(1)
    assert ranks.settle() == [Version(1, True)] * 2 and ranks.values() == {1.0}


def test_several_threads_read_a_version_for_its_checksum(world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "PIECE_BYTES", 64)
    ranks = world(2).begin(threads=2)
    ranks.submit(1)
    assert ranks.settle() == [Version(1, True)] * 2 and ranks.values() == {1.0}
    kept = {replica.checksum.partition(":")[0] for arena in ranks.arenas for replica in arena.inventory()}
    assert kept == {"xxh3*64"}


# ------------------------------------------------------------------ what may change when


def test_blocking_names_may_change_immediately(world: MakeWorld) -> None:
    gate = threading.Event()
    ranks = world(2).begin(probes=dict.fromkeys(range(2), wait_for(gate)))
    states = [ranks.tensors(1) for _ in range(2)]
    for rank, state in enumerate(states):
        ranks.mirrors[rank].bind(["bias"])
        ranks.mirrors[rank].submit(Version(1, True), state, f"blob {rank} 1".encode(), blocking_names=["mean"])
        state["mean"].fill_(99)
        state["bias"].fill_(99)
    gate.set()
    assert ranks.settle() == [Version(1, True)] * 2
    assert ranks.values() == {1.0} and ranks.mirrors[0].stats.torn == 0


def test_all_tensors_may_change_once_staged(world: MakeWorld) -> None:
    ranks = world(2).begin()
    states = [ranks.tensors(1) for _ in range(2)]
    for rank, state in enumerate(states):
        ranks.mirrors[rank].submit(Version(1, True), state, f"blob {rank} 1".encode())
    for rank, state in enumerate(states):
        ranks.mirrors[rank].wait_staged()
        for tensor in state.values():
            tensor.fill_(99)
    assert ranks.settle() == [Version(1, True)] * 2 and ranks.values() == {1.0}


def test_a_version_is_staged_once_its_tensors_may_change(world: MakeWorld) -> None:
    gate = threading.Event()
    ranks = world(2).begin(probes=dict.fromkeys(range(2), wait_for(gate)))
    mirror = ranks.mirrors[0]
    found = [mirror.is_staged]
    for step in range(1, COMPARED_ROUNDS + 2):
        gate.clear()
        ranks.submit(step)
        found.append(mirror.is_staged)
        gate.set()
        ranks.settle()
        found.append(mirror.is_staged)
        mirror.wait_staged()
        found.append(mirror.is_staged)
    # The first copies are still to be compared with the tensors.
    assert found == [True, *[False, False, True] * COMPARED_ROUNDS, False, True, True]


def test_a_tensor_modified_while_it_is_copied_aborts_the_round_on_all_ranks(
    world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    states: list[State] = []

    def write(moment: str, version: Version) -> None:
        if moment == "stage" and version.optimizer_step == 2:
            states[0]["weight"].add_(1)

    ranks = world(2).begin(probes={0: write})
    ranks.submit(1)
    ranks.settle()
    states += [ranks.tensors(2), ranks.tensors(2)]
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            ranks.mirrors[rank].submit(Version(2, True), states[rank], b"")
        assert ranks.settle() == [Version(1, True)] * 2
    assert "rank 0: weight changed while step 2 was copied" in caplog.text
    assert [mirror.stats.torn for mirror in ranks.mirrors] == [1, 0]
    assert [mirror.stats.aborted for mirror in ranks.mirrors] == [1, 1]
    assert ranks.newest() == 1 and ranks.values() == {1.0}
    ranks.submit(3)  # copied whole before submit returns from now on, so a write comes too late to tear it
    assert ranks.settle() == [Version(3, True)] * 2 and ranks.values() == {3.0}


def test_a_tensor_whose_memory_stays_but_not_its_shape_aborts_the_round_and_is_refused_after_it(
    world: MakeWorld,
) -> None:
    ranks = world(2).begin()
    states = [ranks.tensors(1) for _ in range(2)]
    for step in (1, 2):
        for rank in range(2):
            ranks.mirrors[rank].submit(Version(step, True), states[rank], b"")
        assert ranks.settle() == [Version(1, True)] * 2
        states[0]["weight"].data = states[0]["weight"].data.view(100, 200)
    assert ranks.mirrors[0].stats.torn == 1
    with pytest.raises(LayoutMismatchError, match=r"weight is torch.float32\[100, 200\]"):
        ranks.mirrors[0].submit(Version(3, True), states[0], b"")


def test_a_write_that_torch_does_not_count_is_found_whenever_it_happens(
    world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = world(2).begin()
    states = [ranks.tensors(1) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            ranks.mirrors[rank].submit(Version(1, True), states[rank], b"")
        ranks.settle()
        states[0]["weight"].data.add_(1)
        for mirror in ranks.mirrors:
            mirror.wait_staged()
    assert "rank 0: weight changed between step 1 and the next optimizer step" in caplog.text
    assert [mirror._blocking for mirror in ranks.mirrors] == [True, False]


@pytest.mark.parametrize("value", [float("nan"), -0.0])
def test_a_copy_is_compared_by_its_bits(world: MakeWorld, caplog: pytest.LogCaptureFixture, value: float) -> None:
    ranks = world(2).begin()
    states = [ranks.tensors(1) for _ in range(2)]
    for rank in range(2):
        states[rank]["weight"].fill_(value)
        ranks.mirrors[rank].submit(Version(1, True), states[rank], b"")
        ranks.mirrors[rank].wait_staged()
    ranks.settle()
    assert not caplog.text


def test_moved_tensors_are_mirrored(world: MakeWorld) -> None:
    ranks = world(2).begin()
    for step in (1, 2, 3):
        ranks.submit(step, ranks.tensors(step))
    assert ranks.settle() == [Version(3, True)] * 2 and ranks.values() == {3.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("weight"), "'weight' of the layout is missing"),
        (lambda state: state.update(weight=torch.zeros(200, 101)), r"weight is torch.float32\[200, 101\]"),
        (lambda state: state.update(weight=torch.zeros(200, 100, dtype=torch.half)), r"weight is torch.float16"),
    ],
)
def test_another_state_than_planned_is_refused(
    world: MakeWorld, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    ranks = world(2).begin()
    state = ranks.tensors(1)
    change(state)
    with pytest.raises(LayoutMismatchError, match=message):
        ranks.submit(1, state, ranks=[0])


# ------------------------------------------------------------------ rounds that are not


def test_a_skipped_round_aborts_on_all_ranks(world: MakeWorld) -> None:
    ranks = world(3).begin()
    ranks.submit(1)
    ranks.settle()
    ranks.mirrors[1].skip(Version(2, True))
    ranks.submit(2, ranks=[0, 2])
    assert ranks.settle() == [Version(1, True)] * 3
    assert [mirror.stats.aborted for mirror in ranks.mirrors] == [1, 1, 1] and ranks.mirrors[1].stats.skipped == 1
    assert ranks.newest() == 1
    ranks.submit(3)
    assert ranks.settle() == [Version(3, True)] * 3 and ranks.values() == {3.0}


def test_skipping_does_not_wait(world: MakeWorld) -> None:
    gate = threading.Event()
    ranks = world(2).begin(probes={0: wait_for(gate, moment="send")})
    ranks.submit(1)
    assert ranks.mirrors[0].busy
    for mirror in ranks.mirrors:
        mirror.skip(Version(2, True))
        mirror.wait_staged()
    gate.set()
    assert ranks.settle() == [Version(1, True)] * 2
    assert not ranks.mirrors[0].busy


@pytest.mark.parametrize("moment", ["stage", "send", "agree"])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_lost_during_a_round_leaves_the_previous_version(world: MakeWorld, moment: str, victim: int) -> None:
    ranks = world(3).begin(probes={victim: stop_at(moment, step=2)})
    ranks.submit(1)
    ranks.settle()
    ranks.submit(2)
    with pytest.raises(StopError):
        ranks.mirrors[victim].settle()
    assert ranks.fail(victim) == [Version(1, True)] * 2
    left = ranks.newest(without=[victim])
    assert left == 1 or (left == 2 and moment == "agree")  # before the vote all copies are in place: as good, and newer
    assert ranks.values(without=[victim]) == {left}
    assert ranks.newest() is not None


def test_an_error_in_the_mirror_thread_is_raised_by_every_later_call(world: MakeWorld) -> None:
    ranks = world(2).begin(probes={0: stop_at("stage")})
    ranks.submit(1)
    mirror = ranks.mirrors[0]
    for call in (mirror.wait_staged, mirror.settle, lambda: mirror.skip(Version(2, True)), lambda: ranks.submit(2)):
        with pytest.raises(StopError):
            call()
    assert not mirror.is_staged


def test_settle_times_out(world: MakeWorld) -> None:
    ranks = world(2).begin()
    ranks.submit(1, ranks=[0])
    with pytest.raises(TransportError, match=r"rank 0: step 1 was not committed within 0.01 s"):
        ranks.mirrors[0].settle(0.01)


def test_close_abandons_a_mirror_that_waits_for_a_peer(world: MakeWorld) -> None:
    ranks = world(2).begin()
    ranks.submit(1, ranks=[0])
    ranks.mirrors[0].close(timeout_s=0.01)
    assert ranks.mirrors[0].busy


def test_ranks_at_different_versions_get_an_error(world: MakeWorld) -> None:
    ranks = world(2).begin()
    ranks.submit(1, ranks=[0])
    ranks.submit(2, ranks=[1])
    with pytest.raises(TransportError, match=r"rank 0: rank 1 sends .*optimizer_step=2.*expected .*optimizer_step=1"):
        ranks.mirrors[0].settle()


# ------------------------------------------------------------------ later generations and other layouts


def test_a_new_generation_does_not_overwrite_what_it_restored(world: MakeWorld) -> None:
    ranks = world(2).begin(probes={0: stop_at("send", step=4)})
    for step in (1, 2, 3, 4):
        ranks.submit(step)
    with pytest.raises(StopError):
        ranks.mirrors[0].settle()
    ranks.begin(committed=Version(3, True), probes={1: stop_at("stage", step=4)})
    assert ranks.newest() == 3
    ranks.submit(4)
    with pytest.raises(StopError):
        ranks.mirrors[1].settle()
    ranks.begin(committed=Version(3, True))
    assert ranks.newest() == 3 and ranks.values() == {3.0}
    ranks.submit(4)
    assert ranks.settle() == [Version(4, True)] * 2 and ranks.values() == {4.0}


def test_a_rank_with_an_empty_arena_joins(world: MakeWorld, tmp_path: Path, owner: Owner) -> None:
    ranks = world(2).begin()
    ranks.submit(1)
    ranks.settle()
    ranks.close()
    ranks.arenas[1].remove()
    ranks.arenas[1] = Arena.create(tmp_path, "run", "node1", owner)
    ranks.begin(committed=Version(1, True))
    assert ranks.newest() == 1
    ranks.submit(2)
    assert ranks.settle() == [Version(2, True)] * 2
    assert ranks.newest(without=[0]) == ranks.newest(without=[1]) == 2


def test_a_new_layout_keeps_the_old_version_until_its_own_is_committed(world: MakeWorld) -> None:
    ranks = world(2).begin()
    ranks.submit(1)
    ranks.settle()
    ranks.close()

    def grown(step: float) -> State:
        return ranks.tensors(step) | {"exp_avg": torch.full((300,), float(step))}

    layout = ranks.layout(grown(0))
    for arena in ranks.arenas:
        arena.write_layout(layout)
    ranks.begin(committed=Version(1, True), layout=layout, probes={0: stop_at("stage")})
    ranks.submit(2, grown(2))
    with pytest.raises(StopError):
        ranks.mirrors[0].settle()
    assert ranks.newest() == 1
    ranks.begin(committed=Version(1, True), layout=layout)
    ranks.submit(2, grown(2))
    assert ranks.settle() == [Version(2, True)] * 2 and ranks.values() == {2.0}
    for arena in ranks.arenas:
        assert {line.layout for line in arena.inventory()} == {layout.digest}


# ------------------------------------------------------------------ jobs between rounds


class _Job:
    """Votes over the transport of the rounds, and notes what is committed then."""

    def __init__(self, mirror: Mirror, transport: Transport) -> None:
        self.mirror, self.transport = mirror, transport
        self.committed: Version | None = None
        self.ended = Moment()

    def run(self) -> None:
        assert self.transport.agree(True)
        self.committed = self.mirror.committed
        self.ended.reach()

    def fail(self, error: BaseException) -> None:
        self.ended.reach(error)


def test_a_job_runs_between_two_rounds(world: MakeWorld) -> None:
    ranks = world(2).begin()
    jobs = [_Job(mirror, transport) for mirror, transport in zip(ranks.mirrors, ranks.transports, strict=True)]
    ranks.submit(1)
    for mirror, job in zip(ranks.mirrors, jobs, strict=True):
        mirror.then(job)
    ranks.submit(2)
    ranks.settle()
    assert [job.committed for job in jobs] == [Version(1, True)] * 2
    for job in jobs:
        job.ended.wait(20)


def test_the_transport_is_free_once_the_last_job_is_over(world: MakeWorld) -> None:
    ranks = world(2).begin()
    ranks.submit(1)
    jobs = [_Job(mirror, transport) for mirror, transport in zip(ranks.mirrors, ranks.transports, strict=True)]
    for mirror, job in zip(ranks.mirrors, jobs, strict=True):
        mirror.then(job)
    assert ranks.settle() == [Version(1, True)] * 2
    assert all(job.ended.is_reached for job in jobs)


def test_a_job_that_fails_ends_the_mirror(world: MakeWorld) -> None:
    ranks = world(2).begin()
    ranks.transports[1].close()
    mirror = ranks.mirrors[0]
    job, next_job = _Job(mirror, ranks.transports[0]), _Job(mirror, ranks.transports[0])
    mirror.then(job)
    with pytest.raises(TransportError):
        job.ended.wait(20)
    with pytest.raises(TransportError):
        mirror.settle()
    with pytest.raises(TransportError):
        mirror.then(next_job)
    assert next_job.committed is None
