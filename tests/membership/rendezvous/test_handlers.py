"""Agents rendezvous through data, and only processes that should reach their stores can."""

from __future__ import annotations

import os
import pickle
import random
import socket
import threading
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousParameters, RendezvousStateError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

from lightning_ckptless.errors import LaunchError
from lightning_ckptless.internals.rendezvous_internals import rendezvous_state_from_json, rendezvous_state_to_json
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.membership.rendezvous.handlers import (
    Changes,
    DataBackend,
    address_of,
    listener_on,
    listening_store,
    one_machine,
    several_machines,
)
from tests.membership.conftest import script
from tests.membership.test_two_nodes import node_of_two
from tests.outsider import needs_another_user, run_as_another_user

KEY = "torch.rendezvous.run"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def planted(proof: Path) -> str:
    """A rendezvous state as an intruder writes it."""
    return b64encode(pickle.dumps(Payload(proof))).decode()


def state_with_everything() -> _RendezvousState:
    state, now = _RendezvousState(), datetime.now(UTC)
    first, second, third = (_NodeDesc(f"host{number}", number, 0) for number in range(3))
    state.round, state.complete, state.deadline = 3, True, now
    state.participants, state.last_heartbeats = {second: 0, first: 1}, {first: now, third: now}
    state.wait_list, state.redundancy_list = {third}, {first, third}
    return state


# ------------------------------------------------------------------ data, not code


@pytest.mark.parametrize("state", [_RendezvousState(), state_with_everything()])
def test_the_state_of_a_rendezvous_survives_as_data(state: _RendezvousState) -> None:
    read = pickle.loads(rendezvous_state_from_json(rendezvous_state_to_json(pickle.dumps(state))))
    assert vars(read) == vars(state)
    assert [*read.participants] == [*state.participants]


def test_a_damaged_state_is_refused_or_read_but_raises_nothing_else() -> None:
    text, rng = rendezvous_state_to_json(pickle.dumps(state_with_everything())), random.Random(0)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(text)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            rendezvous_state_from_json(bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))]))
        except ValueError:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize("text", [b"", b"null", b"[" * 100_000, b"{}", b'{"round": 1e999}', b'{"round": "1"}'])
def test_an_invalid_state_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"state|Expecting|JSON"):
        rendezvous_state_from_json(text)


def backend_in(store: Any) -> DataBackend:
    return DataBackend(C10dRendezvousBackend(store, "run"), Changes(store, "run"))


def test_a_change_of_the_nodes_is_announced_and_a_sign_of_life_is_not() -> None:
    store = HashStore()
    here, there = backend_in(store), backend_in(store)
    assert there.has_changed() and not there.has_changed()
    state = state_with_everything()
    written = here.set_state(pickle.dumps(state))
    assert written is not None and there.has_changed() and not there.has_changed()
    state.last_heartbeats = dict.fromkeys(state.last_heartbeats, datetime.now(UTC))
    written = here.set_state(pickle.dumps(state), written[1])
    assert written is not None and written[2] and not there.has_changed()
    state.wait_list = set()
    assert here.set_state(pickle.dumps(state), written[1]) and there.has_changed()


def test_a_pickle_in_the_store_is_not_loaded(tmp_path: Path) -> None:
    store, proof = HashStore(), tmp_path / "proof"
    backend = backend_in(store)
    assert backend.get_state() is None
    store.set(KEY, planted(proof))
    with pytest.raises(RendezvousStateError, match="not written by an agent of this version"):
        backend.get_state()
    with pytest.raises(RendezvousStateError):
        backend.set_state(pickle.dumps(_RendezvousState()))
    assert not proof.exists()


def test_a_state_is_replaced_only_with_the_latest_token() -> None:
    backend = backend_in(HashStore())
    first = backend.set_state(pickle.dumps(_RendezvousState()))
    assert first is not None and first[2]
    newer = state_with_everything()
    second = backend.set_state(pickle.dumps(newer), first[1])
    assert second is not None and second[2] and vars(pickle.loads(second[0])) == vars(newer)
    late = backend.set_state(pickle.dumps(_RendezvousState()), first[1])
    assert late is not None and not late[2] and vars(pickle.loads(late[0])) == vars(newer)


def test_an_agent_with_a_pickle_in_its_rendezvous_exits_with_the_reason(
    bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("torch.rendezvous.two", planted(tmp_path / "proof"))
    config = node_of_two("first", script(write("")), store.port, tmp_path)
    with pytest.raises(LaunchError, match="not written by an agent of this version"):
        run(config, parent=bare)
    assert not (tmp_path / "proof").exists()


# ------------------------------------------------------------------ who can reach it

# Waits for a file, so that the test can inspect a run from outside.
WAITS = """
    import time
    from pathlib import Path
    Path("started").touch()
    while not Path("enough").exists():
        time.sleep(0.005)
"""
# A demonstrated attack: a process that reaches the store of a rendezvous puts a pickle there.
STORE = """
import sys
from datetime import timedelta
from torch.distributed import TCPStore
"""
PLANTS = """
    payload, key, *ports = sys.argv[1:]
    for port in ports:
        TCPStore("127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=10)).set(key, payload)
    print(len(ports))
"""


def listening() -> set[tuple[str, int]]:
    """The addresses that this process listens on."""
    found = psutil.Process().net_connections("tcp")
    return {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}


@needs_another_user
def test_another_user_cannot_run_code_in_an_agent(bare: ForkServer, write: Callable[..., Path], tmp_path: Path) -> None:
    before, program, proof, pause = listening(), script(write(WAITS)), tmp_path / "proof", threading.Event()
    config = node_of_two("first", program, 0, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run, replace(config, nnodes="1", rdzv_endpoint="", rdzv_conf={}), parent=bare)
        while not (tmp_path / "started").exists() and not result.done():
            pause.wait(0.01)
        ports = [str(port) for _, port in listening() - before]
        try:
            assert run_as_another_user(STORE, PLANTS, planted(proof), "torch.rendezvous.two", *ports).strip() == "1"
            # An agent checks for waiting nodes every second.
            with pytest.raises(TimeoutError):
                result.result(timeout=2.5)
        finally:
            (tmp_path / "enough").touch()
        assert result.result(timeout=60).exit_code == 0
    assert not proof.exists()


def test_an_agent_on_one_machine_listens_on_loopback_only() -> None:
    before, handler = listening(), one_machine("run", 5, 3)
    assert listening() == before
    ports = set()
    for number in (1, 2):
        info = handler.next_rendezvous()
        assert (info.rank, info.world_size, handler.num_nodes_waiting()) == (0, 1, 0)
        store = info.bootstrap_store_info
        assert store is not None and listening() - before == {("127.0.0.1", store.master_port)}
        ports.add(store.master_port)
        assert isinstance(info.store, PrefixStore) and info.store.underlying_store.add("rounds", 1) == number
    assert len(ports) == 2
    handler.shutdown()
    assert handler.is_closed() and listening() == before
    with pytest.raises(RendezvousClosedError):
        handler.next_rendezvous()


def test_a_rendezvous_of_several_machines_listens_on_its_endpoint() -> None:
    before = listening()
    parameters = RendezvousParameters(
        "c10d", "127.0.0.2:0", "run", 1, 2, "127.0.0.3", is_host=True, last_call_timeout=1
    )
    handler = several_machines(parameters)
    assert {host for host, _ in listening() - before} == {"127.0.0.2"}
    ports = set()
    for _ in range(2):
        info = handler.next_rendezvous().bootstrap_store_info
        assert info is not None
        ports.add(info.master_port)
        assert {host for host, _ in listening() - before} == {"127.0.0.2", "127.0.0.3"}
    assert len(ports) == 2
    handler.shutdown()


def test_a_second_agent_on_a_machine_connects_to_the_store_of_the_first() -> None:
    first = listening_store("127.0.0.1", 0)
    handler = several_machines(RendezvousParameters("c10d", f"127.0.0.1:{first.port}", "run", 1, 1, "127.0.0.1"))
    assert first.check([KEY])
    handler.shutdown()


def looks_up(*addresses: str) -> Callable[..., list[Any]]:
    return lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]


@pytest.mark.parametrize(
    ("host", "addresses", "expected"),
    [
        ("10.0.0.1", ["10.0.0.1"], "10.0.0.1"),
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
        ("localhost", ["127.0.0.1"], "127.0.0.1"),
        ("node1", ["10.0.0.1", "10.0.0.1"], "10.0.0.1"),
        ("node1", ["10.0.0.1", "10.1.0.1"], None),
        ("node1", ["127.0.1.1"], None),
        ("node1", [], None),
    ],
)
def test_a_name_is_resolved_where_it_is_unambiguous(host: str, addresses: list[str], expected: str | None) -> None:
    found = address_of(host, looks_up(*addresses))
    assert (found and found[1][0]) == expected


def test_an_address_of_another_machine_names_no_interface() -> None:
    assert listener_on("192.0.2.1", 0) is None
    with listener_on("::1", 0) or pytest.skip("no IPv6 here") as listener:
        assert listener.getsockname()[0] == "::1"
