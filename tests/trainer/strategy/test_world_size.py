"""The number of ranks, by the trainer's request and the launcher's range of nodes."""

from __future__ import annotations

import pytest

from lightning_ckptless import environment
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.trainer.strategy.world_size import require_ranks


def check(found: int, nnodes: str | None = None) -> None:
    """Check against four nodes of two ranks."""
    require_ranks(nodes=4, per_node=2, found=found, env={} if nnodes is None else {environment.NNODES: nnodes})


@pytest.mark.parametrize(("found", "nnodes"), [(8, None), (8, "4"), (8, "1:4"), (6, "1:4"), (2, "1:4"), (6, "3:4")])
def test_the_requested_number_or_a_number_within_the_range_is_accepted(found: int, nnodes: str | None) -> None:
    check(found, nnodes)


@pytest.mark.parametrize(
    ("found", "nnodes", "text"),
    [
        (6, None, "asks for 8 ranks, the agents started 6"),
        (4, "2", "asks for 8 ranks, the agents started 4"),
        (4, "3:4", "asks for 8 ranks, the agents started 4"),
        (5, "1:4", "asks for 8 ranks, the agents started 5"),
        (16, "8", "asks for 8 ranks, the agents started 16"),
        (4, "1:2", "--nnodes 1:2 differ"),
        (8, "many", "'many': expected a number of nodes, or MIN:MAX"),
    ],
)
def test_inconsistent_numbers_are_refused(found: int, nnodes: str | None, text: str) -> None:
    with pytest.raises(OptionsError, match=text):
        check(found, nnodes)
