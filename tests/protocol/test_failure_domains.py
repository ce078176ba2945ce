"""Failure domains by name, and the errors for missing or malformed names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.failure_domains import (
    Domains,
    domains_of,
    is_given,
    mesh_groups,
    name_in_environment,
    name_in_file,
    place_in,
)

FILE = ["# cabling of May", "", "node01 rack1", "node02  rack=rack1,row=north  # moved", "node03.example rack2"]


def in_file(*hosts: str, level: str = "rack", lines: list[str] = FILE) -> str:
    return name_in_file(level, lines, "/etc/racks", hosts, "RACKS")


def test_node_and_rank_levels_need_no_names() -> None:
    assert domains_of("node", ["a", "a", "b"]) == Domains(("a", "a", "b"), "node")
    assert domains_of("rank", ["a", "a", "b"]) == Domains(("rank0", "rank1", "rank2"), "rank")
    assert [is_given(level) for level in ("node", "rank", "tensor_parallel", "rack")] == [False, False, False, True]


def test_nodes_of_one_rack_keep_no_copies_for_each_other() -> None:
    nodes = ["a", "a", "b", "b", "c", "c", "d", "d"]
    placement = place_in(domains_of("rack", nodes, given=[f"r{rank // 4}" for rank in range(8)]), 1)
    assert placement.holders == ((4,), (5,), (6,), (7,), (0,), (1,), (2,), (3,))
    assert placement.reason == (
        "8 shards, 2 copies each over 2 racks in groups of 2: survives any rack loss, 2 at once with probability 0.000"
    )


def test_with_a_single_rack_copies_are_placed_over_nodes() -> None:
    placement = place_in(domains_of("rack", ["a", "b"], given=["r0", "r0"]), 1)
    assert placement.holders == ((1,), (0,))
    assert "over 2 nodes" in placement.reason
    assert placement.reason.endswith("; all 2 nodes are in rack r0, whose loss is not covered; node losses are")


def test_too_few_racks_are_refused() -> None:
    with pytest.raises(OptionsError, match=r"copies=2 needs 3 racks .* but the 3 ranks are on 2: set copies=1"):
        place_in(domains_of("rack", ["a", "b", "c"], given=["r0", "r0", "r1"]), 2)


def test_a_node_in_two_racks_is_refused() -> None:
    with pytest.raises(OptionsError, match=r"rank 2 reports that node a is in rack 'r1', another rank .* reports 'r0'"):
        domains_of("rack", ["a", "b", "a"], given=["r0", "r0", "r1"])


# ---------------------------------------------------------------------- the mesh


def test_groups_of_a_mesh() -> None:
    assert mesh_groups((2, 3), "tensor_parallel") == ((0, 1, 2), (3, 4, 5))
    assert mesh_groups((2, 3), "data_parallel") == ((0, 3), (1, 4), (2, 5))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.sampled_from(["data_parallel", "tensor_parallel"]))
def test_a_copy_is_never_kept_in_the_group_or_on_the_nodes_of_its_writer(
    data: int, tensor: int, per_node: int, level: str
) -> None:
    nodes = [f"n{rank // per_node}" for rank in range(data * tensor)]
    domains = domains_of(level, nodes, mesh=(data, tensor))
    groups = mesh_groups((data, tensor), level)
    placement = place_in(domains, min(1, len(set(domains.names)) - 1))
    for shard, holders in enumerate(placement.holders):
        (group,) = [group for group in groups if shard in group]
        touched = {nodes[rank] for rank in group}
        assert not touched & {nodes[holder] for holder in holders}


def test_a_mesh_level_without_a_mesh_is_refused() -> None:
    with pytest.raises(OptionsError, match="failure_domain='tensor_parallel' needs a device mesh"):
        domains_of("tensor_parallel", ["a", "b"])


# ---------------------------------------------------------------------- names given by the user


@pytest.mark.parametrize(
    ("text", "level", "expected"),
    [
        ("rack7", "rack", "rack7"),
        ("rack=r7,row=b", "row", "b"),
        (" rack = r7 ", "rack", "r7"),
        ("/s0/s4", "leaf", "/s0/s4"),
    ],
)
def test_a_name_in_the_environment(text: str, level: str, expected: str) -> None:
    assert name_in_environment(level, text, "WHERE") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row=b", r"WHERE='row=b': names row but no rack: add rack=NAME"),
        ("a b", r"WHERE='a b': invalid rack name 'a b': expected letters"),
        ("rack=", r"invalid rack name ''"),
    ],
)
def test_an_invalid_name_in_the_environment_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        name_in_environment("rack", text, "WHERE")


def test_names_in_a_file() -> None:
    assert in_file("node01") == "rack1"
    assert in_file("node02") == "rack1"
    assert in_file("node02", level="row", lines=FILE[3:4]) == "north"
    assert in_file("node03-17", "node03.example", "node03") == "rack2"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["node01"], r"/etc/racks, line 1: 'node01': expected a host and its rack, e\.g\. 'host17 rack7'"),
        (["", "node01 rack1 row3"], r"/etc/racks, line 2: "),
        (["node01 row=b"], r"/etc/racks, line 1: names row but no rack"),
        (["node01 r1", "node01 r1", "node01 r2"], r"line 3: host node01 is in rack 'r2' here but in 'r1' on line 1"),
    ],
)
def test_a_malformed_file_is_refused_with_the_line_number(lines: list[str], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        in_file("node01", lines=lines)


def test_the_error_for_an_unknown_host_shows_the_line_to_add() -> None:
    with pytest.raises(OptionsError) as caught:
        in_file("node09-123", "node09.example", "node09")
    assert str(caught.value) == (
        "failure_domain='rack': host node09-123 is not listed in /etc/racks (nor as node09.example, node09), the file "
        "that RACKS names; it lists 3 hosts (node01, node02, node03.example): add the line 'node09 NAME_OF_ITS_RACK'"
    )
