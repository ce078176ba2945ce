"""The failure domain of each rank's node, derived from the layout of the run or configured per node."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_ckptless.environment import FAILURE_DOMAIN, FAILURE_DOMAINS_FILE
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.failure_domains import (
    Domains,
    domains_of,
    is_given,
    missing_name_error,
    name_in_environment,
    name_in_file,
    place_in,
)
from lightning_ckptless.replica.transport import Transport, gather_json


def find_domains(
    level: str, nodes: Sequence[str], transport: Transport, mesh: tuple[int, int] | None = None
) -> Domains:
    """The failure domain of each rank. All ranks call it together.

    Args:
        level: unit that fails as a whole.
        nodes: name of each rank's node.
        transport: connects all ranks.
        mesh: ranks in each dimension of the device mesh; None without a mesh.

    Raises:
        OptionsError: on all ranks, if the domain of any node is unknown.
    """
    if not is_given(level):
        return domains_of(level, nodes, mesh=mesh)
    mine = {"name": "", "problem": ""}
    try:
        mine["name"] = own_domain(level, nodes[transport.rank])
    except OptionsError as error:
        mine["problem"] = str(error)
    received = gather_json(transport, mine)
    if problem := next((each["problem"] for each in received if each["problem"]), ""):
        raise OptionsError(problem)
    return domains_of(level, nodes, given=[each["name"] for each in received])


def keeps_within_a_node(options: CkptlessOptions, ranks: int, mesh: tuple[int, int] | None) -> bool:
    """Whether ranks of one node keep each other's shards.

    Args:
        options: the user's settings.
        ranks: number of ranks, which are all on one node.
        mesh: ranks in each dimension of the device mesh; None without a mesh.

    Raises:
        OptionsError: replicas cannot be placed.
    """
    level = options.failure_domain
    # A domain that the user names contains whole nodes.
    return not is_given(level) and place_in(domains_of(level, ("",) * ranks, mesh=mesh), options.copies).copies > 0


def own_domain(level: str, node: str, env: Mapping[str, str] = os.environ) -> str:
    """The configured domain of this node; its environment takes precedence over the file.

    Args:
        level: level of the domain.
        node: name of this node in the run.
        env: environment variables.

    Raises:
        OptionsError: no domain is configured, or it cannot be read.
    """
    if text := env.get(FAILURE_DOMAIN):
        return name_in_environment(level, text, FAILURE_DOMAIN)
    host = socket.gethostname()
    if not (path := env.get(FAILURE_DOMAINS_FILE)):
        raise missing_name_error(level, host, FAILURE_DOMAIN, FAILURE_DOMAINS_FILE)
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionsError(
            f"failure_domain={level!r}: {FAILURE_DOMAINS_FILE}={path!r} cannot be read on host {host}: {error}: "
            "store it where all nodes can read it"
        ) from error
    names = tuple(dict.fromkeys((node, host, host.partition(".")[0])))
    return name_in_file(level, lines, path, names, FAILURE_DOMAINS_FILE)
