"""Whether the history fits, before training starts."""

from __future__ import annotations

import pytest
import torch

from lightning_ckptless.errors import ArenaError
from lightning_ckptless.trainer.commit.history_space import expected_growth, require_history_fits


def test_the_refusal_contains_the_arithmetic() -> None:
    require_history_fits([10_000_000] * 4, 3.0, 8, 1_200_000_000)
    require_history_fits([10_000_000] * 4, 3.0, 0, 0)
    with pytest.raises(ArenaError) as caught:
        require_history_fits([10_000_000] * 4, 3.0, 9, 1_200_000_000)
    assert str(caught.value) == (
        "history=9 does not fit: 2 + 9 slots x 120.0 MB (one version of the 4 replicas on this node) = 1.3 GB, but "
        "1.2 GB are free: set history=8 or less, keep fewer copies, or enlarge the memory of the arenas"
    )


@pytest.mark.parametrize(
    ("make", "growth"),
    [
        (lambda p: torch.optim.AdamW(p, 1e-3), 3.0),
        (lambda p: torch.optim.SGD(p, 1e-3), 1.0),
        (lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9), 2.0),
        (torch.optim.LBFGS, 1.0),
    ],
)
def test_optimizer_state_is_estimated_by_the_kind_of_optimizer(make: object, growth: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(100, 10))]
    assert callable(make)
    assert expected_growth([make(parameters)], 4000) == growth
