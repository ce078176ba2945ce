"""The number of ranks: as many as the trainer asks for, or fewer if the launcher accepts fewer nodes.

Apart from the strategies, because it compares numbers and needs no trainer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from lightning_ckptless import environment
from lightning_ckptless.errors import OptionsError


def require_ranks(*, nodes: int, per_node: int, found: int, env: Mapping[str, str] = os.environ) -> None:
    """Compare the number of ranks that the trainer asks for with the number that the agents started.

    Args:
        nodes: `Trainer(num_nodes=...)`.
        per_node: `Trainer(devices=...)`.
        found: number of ranks that were started.
        env: environment variables of this process.

    Raises:
        OptionsError: the numbers are inconsistent.
    """
    asked = nodes * per_node
    low, high = range_of_nodes(nodes, env)
    if high * per_node != asked and low != high:
        raise OptionsError(
            f"Trainer(num_nodes={nodes}) and --nnodes {low}:{high} differ: num_nodes is the number of nodes when all "
            f"are present; set num_nodes={high}"
        )
    if found == asked or (low != high and low * per_node <= found < asked and found % per_node == 0):
        return
    raise OptionsError(
        f"Trainer(num_nodes={nodes}, devices={per_node}) asks for {asked} ranks, the agents started {found}: start "
        f"with --nproc-per-node {per_node} --nnodes {nodes}, or --nnodes MIN:{nodes} to continue with fewer"
    )


def range_of_nodes(nodes: int, env: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the fewest and the most nodes that the launcher accepts.

    Args:
        nodes: the number to use if the launcher does not provide it.
        env: environment variables of this process.

    Raises:
        OptionsError: the launcher's numbers cannot be parsed.
    """
    least, _, most = env.get(environment.NNODES, "").partition(":")
    try:
        return int(least or nodes), int(most or least or nodes)
    except ValueError as error:
        raise OptionsError(
            f"{environment.NNODES}={env[environment.NNODES]!r}: expected a number of nodes, or MIN:MAX"
        ) from error
