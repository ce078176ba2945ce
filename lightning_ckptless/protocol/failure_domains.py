"""Failure domains: which ranks are lost together, for a named level.

| Level | A domain is | Known from |
|---|---|---|
| `node` | a node | the run |
| `rank` | a rank | the run |
| `tensor_parallel`, `data_parallel` | a group of the mesh, with all nodes that it spans | the strategy |
| any other, e.g. `rack` | all nodes with the same domain name | the environment of each node, or a file |

A node's domain is given either as a plain name, `rack7`, or as one name per level, `rack=rack7,row=north`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.placement import Placement, fail_together, place

MESH_LEVELS = ("data_parallel", "tensor_parallel")
"""Dimensions of a mesh of ranks, in the order of the mesh."""

_KNOWN = frozenset({"node", "rank", *MESH_LEVELS})
_NAME = re.compile(r"[\w.:/+-]+")
_MOST_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Domains:
    """The failure domain of each rank.

    Args:
        names: domain name of each rank.
        kind: noun for a domain in messages, e.g. `node`.
        remark: note for the user; empty if there is none.
    """

    names: tuple[str, ...]
    kind: str
    remark: str = ""


def is_given(level: str) -> bool:
    """Whether the user has to name each node's domain for a level."""
    return level not in _KNOWN


def domains_of(
    level: str, nodes: Sequence[str], *, given: Sequence[str] = (), mesh: tuple[int, int] | None = None
) -> Domains:
    """The failure domain of each rank.

    Args:
        level: level at which ranks are lost together.
        nodes: name of each rank's node.
        given: domain name of each rank's node, for a level whose domains the user names.
        mesh: size of each dimension of the mesh; None without a mesh.

    Raises:
        OptionsError: there is no such mesh, or ranks of one node have different domain names.
    """
    if level == "rank":
        return Domains(tuple(f"rank{rank}" for rank in range(len(nodes))), "rank")
    if level == "node":
        return Domains(tuple(nodes), "node")
    if level in MESH_LEVELS:
        if mesh is None:
            raise OptionsError(
                f"failure_domain={level!r} needs a device mesh, which only CkptlessModelParallelStrategy has: "
                "set failure_domain='node'"
            )
        return Domains(fail_together(nodes, mesh_groups(mesh, level)), f"{level} group")
    return _given_domains(level, nodes, given)


def _given_domains(level: str, nodes: Sequence[str], given: Sequence[str]) -> Domains:
    name_of: dict[str, str] = {}
    for rank, (node, name) in enumerate(zip(nodes, given, strict=True)):
        if name_of.setdefault(node, name) != name:
            raise OptionsError(
                f"rank {rank} reports that node {node} is in {level} {name!r}, another rank of the same node reports "
                f"{name_of[node]!r}: give all workers of a node the same name"
            )
    if len(set(given)) == 1 and len(name_of) > 1:
        # With a single domain at this level, placing over its nodes at least covers the loss of a node.
        remark = f"all {len(name_of)} nodes are in {level} {given[0]}, whose loss is not covered; node losses are"
        return Domains(tuple(nodes), "node", remark)
    return Domains(tuple(given), level)


def place_in(domains: Domains, copies: int) -> Placement:
    """Choose the holders of every shard over failure domains; see `place`.

    Args:
        domains: failure domain of each rank.
        copies: replicas of each shard in addition to the writer's own.

    Raises:
        OptionsError: there are several domains, but too few for this number of copies.
    """
    placement = place(domains.names, copies, kind=domains.kind)
    return replace(placement, reason=f"{placement.reason}; {domains.remark}") if domains.remark else placement


def mesh_groups(mesh: tuple[int, int], level: str) -> tuple[tuple[int, ...], ...]:
    """The ranks of each group of a row-major mesh.

    Args:
        mesh: size of each dimension.
        level: dimension along which the groups extend.
    """
    data, tensor = mesh
    if level == "tensor_parallel":
        return tuple(tuple(range(first, first + tensor)) for first in range(0, data * tensor, tensor))
    return tuple(tuple(range(first, data * tensor, tensor)) for first in range(tensor))


# ---------------------------------------------------------------------- names given by the user


def name_in_environment(level: str, text: str, variable: str) -> str:
    """The name of a node's domain from an environment variable.

    Args:
        level: level of the domain.
        text: value of the variable.
        variable: name of the variable.

    Raises:
        OptionsError: the text is not a valid name, or names only other levels.
    """
    return _name(level, text, f"{variable}={text!r}")


def name_in_file(level: str, lines: Iterable[str], path: str, hosts: Sequence[str], variable: str) -> str:
    """The name of a node's domain from a file with a host and its domain on each line; `#` starts a comment.

    Args:
        level: level of the domain.
        lines: lines of the file.
        path: path of the file.
        hosts: names of this node, the most specific first.
        variable: environment variable that names the file.

    Raises:
        OptionsError: a line is malformed, two lines contradict each other, or no line names the node.
    """
    found: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}"
        if len(words) != 2:
            raise OptionsError(f"{where}: {line.strip()!r}: expected a host and its {level}, e.g. 'host17 {level}7'")
        host, domain = words[0], _name(level, words[1], where)
        known, before = found.setdefault(host, (domain, number))
        if known != domain:
            raise OptionsError(
                f"{where}: host {host} is in {level} {domain!r} here but in {known!r} on line {before}: remove one"
            )
    for host in hosts:
        if host in found:
            return found[host][0]
    raise OptionsError(_unknown_host(level, path, hosts, found, variable))


def _unknown_host(level: str, path: str, hosts: Sequence[str], found: Mapping[str, object], variable: str) -> str:
    others = ", ".join(list(found)[:_MOST_SHOWN]) + (", ..." if len(found) > _MOST_SHOWN else "")
    also = f" (nor as {', '.join(hosts[1:])})" if len(hosts) > 1 else ""
    return (
        f"failure_domain={level!r}: host {hosts[0]} is not listed in {path}{also}, the file that {variable} names; it "
        f"lists {len(found)} hosts{f' ({others})' if found else ''}: add the line "
        f"'{hosts[-1]} NAME_OF_ITS_{level.upper()}'"
    )


def missing_name_error(level: str, host: str, variable: str, file_variable: str) -> OptionsError:
    """The error for a level whose domains the user has not named."""
    return OptionsError(
        f"failure_domain={level!r}: the {level} of host {host} is not known: set {variable}=NAME on every node, or "
        f"{file_variable}=FILE with a line 'HOST NAME' for every host; 'node' and 'rank' need neither"
    )


def _name(level: str, text: str, where: str) -> str:
    pairs = [pair.partition("=") for pair in text.strip().split(",")]
    if len(pairs) == 1 and not pairs[0][1]:
        name = pairs[0][0]
    else:
        by_level = {key.strip(): value.strip() for key, equals, value in pairs if equals}
        if level not in by_level:
            raise OptionsError(f"{where}: names {', '.join(by_level) or 'nothing'} but no {level}: add {level}=NAME")
        name = by_level[level]
    if not _NAME.fullmatch(name):
        raise OptionsError(f"{where}: invalid {level} name {name!r}: expected letters, digits and any of _.:/+-")
    return name
