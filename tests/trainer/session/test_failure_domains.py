"""Finding a node's failure domain in its environment or a file."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.failure_domains import Domains
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_notes import ArenaNotes
from lightning_ckptless.replica.transport import LoopbackTransport, SoloTransport
from lightning_ckptless.trainer.session.failure_domains import find_domains, keeps_within_a_node, own_domain
from lightning_ckptless.trainer.session.member_set import GenerationFile, MemberSet, form_member_set
from tests.replica.conftest import arena, owner

__all__ = ["arena", "owner"]


def test_the_environment_takes_precedence_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "racks"
    path.write_text(f"{socket.gethostname()} rack2\n")
    env = {"CKPTLESS_FAILURE_DOMAINS_FILE": str(path)}
    assert own_domain("rack", "some-node", env) == "rack2"
    assert own_domain("rack", "some-node", env | {"CKPTLESS_FAILURE_DOMAIN": "rack1"}) == "rack1"


def test_a_file_may_use_the_runs_name_of_a_node(tmp_path: Path) -> None:
    path = tmp_path / "racks"
    path.write_text(f"{socket.gethostname()} rack2\nsome-node rack3\n")
    assert own_domain("rack", "some-node", {"CKPTLESS_FAILURE_DOMAINS_FILE": str(path)}) == "rack3"


def test_the_error_for_an_unknown_domain_says_how_to_configure_it() -> None:
    with pytest.raises(OptionsError) as caught:
        own_domain("rack", "some-node", {})
    assert str(caught.value) == (
        f"failure_domain='rack': the rack of host {socket.gethostname()} is not known: set "
        "CKPTLESS_FAILURE_DOMAIN=NAME on every node, or CKPTLESS_FAILURE_DOMAINS_FILE=FILE with a line 'HOST NAME' for "
        "every host; 'node' and 'rank' need neither"
    )


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"CKPTLESS_FAILURE_DOMAINS_FILE='.*/gone' cannot be read on host"):
        own_domain("rack", "some-node", {"CKPTLESS_FAILURE_DOMAINS_FILE": str(tmp_path / "gone")})


def on_all_ranks(nodes: list[str]) -> list[Domains | str]:
    """The domains that each rank finds, or the error that it raises."""

    def find(transport: LoopbackTransport) -> Domains | str:
        try:
            return find_domains("rack", nodes, transport)
        except OptionsError as error:
            return str(error)

    transports = LoopbackTransport.world(len(nodes), timeout_s=20.0)
    with ThreadPoolExecutor(len(nodes)) as pool:
        found = list(pool.map(find, transports))
    for transport in transports:
        transport.close()
    return found


def test_all_ranks_find_the_same_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "racks").write_text("n0 r0\nn1 r0\nn2 r1\n")
    monkeypatch.setenv("CKPTLESS_FAILURE_DOMAINS_FILE", str(tmp_path / "racks"))
    assert on_all_ranks(["n0", "n1", "n2"]) == [Domains(("r0", "r0", "r1"), "rack")] * 3


def test_an_unknown_domain_on_one_rank_is_an_error_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "racks").write_text("n0 r0\nn1 r0\n")
    monkeypatch.setenv("CKPTLESS_FAILURE_DOMAINS_FILE", str(tmp_path / "racks"))
    (message,) = set(on_all_ranks(["n0", "n1", "n2"]))
    assert "host n2 is not listed in" in str(message)


def test_the_member_set_uses_the_failure_domain_option(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CKPTLESS_FAILURE_DOMAIN", "r7")
    record = tmp_path / "generation"

    def form(domain: str, mesh: tuple[int, int] | None = None) -> MemberSet:
        options = CkptlessOptions(failure_domain=domain)
        return form_member_set(SoloTransport(), arena, ("n0",), options, 1, count=GenerationFile(record), mesh=mesh)

    members = form("rack")
    assert members.placement.domains == ("r7",)
    with pytest.raises(OptionsError, match="needs a device mesh"):
        form("tensor_parallel")
    mesh = form("tensor_parallel", mesh=(1, 1))
    assert mesh.placement.kind == "tensor_parallel group"


def test_generation_numbers_do_not_repeat_after_all_arenas_are_lost(arena: Arena, tmp_path: Path) -> None:
    record = tmp_path / "run" / "generation"
    count = GenerationFile(record)

    def form() -> int:
        members = form_member_set(SoloTransport(), arena, ("n0",), CkptlessOptions(), 1, count=count, after=1)
        return members.generation

    assert [form(), form()] == [2, 3]
    arena.write_notes(ArenaNotes(generation=0))
    assert form() == 4
    record.write_text("damaged")
    assert form() == 5


@pytest.mark.parametrize(
    ("level", "copies", "mesh", "expected"),
    [
        ("node", 1, None, False),
        ("rack", 1, None, False),
        ("rank", 1, None, True),
        ("rank", 0, None, False),
        ("tensor_parallel", 1, (2, 2), False),
    ],
)
def test_ranks_of_one_node_keep_each_others_shards_if_each_fails_alone(
    level: str, copies: int, mesh: tuple[int, int] | None, *, expected: bool
) -> None:
    options = CkptlessOptions(failure_domain=level, copies=copies)
    assert keeps_within_a_node(options, 4, mesh) == expected
