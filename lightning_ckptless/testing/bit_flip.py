"""Flipping a bit of a tensor, as silent data corruption does: nothing but the value changes.

Apart from `fault_injector`, because it is used without one by the benchmark of the audit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

import torch

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.fault_script import Fault

MOST_NAMED = 3


def flip(fault: Fault, tensors: Mapping[str, torch.Tensor]) -> None:
    """Flip the bit of a fault.

    Args:
        fault: a `flip` fault.
        tensors: the tensors of this rank, by name.

    Raises:
        OptionsError: there is no such tensor, element or bit.
    """
    require_tensor(fault, tensors)
    # torch counts no write through `.data`, like it counts none of faulty memory.
    tensor = tensors[fault.tensor].data
    if fault.element >= tensor.numel() or fault.bit >= 8 * tensor.element_size():
        raise OptionsError(
            f"{fault}: {fault.tensor} has {tensor.numel()} elements of {8 * tensor.element_size()} bits on this rank"
        )
    place = torch.unravel_index(torch.tensor(fault.element), tensor.shape) if tensor.dim() else ()
    value = tensor[place].reshape(1).clone().cpu()
    value.view(torch.uint8)[fault.bit // 8] ^= 1 << fault.bit % 8
    tensor[place] = value[0].to(tensor.device)


def require_tensor(fault: Fault, names: Iterable[str]) -> None:
    """Refuse a flip in a tensor that does not exist.

    Raises:
        OptionsError: it does not; names the closest ones.
    """
    known = list(names)
    if fault.tensor not in known:
        near = get_close_matches(fault.tensor, known, n=MOST_NAMED) or known[:MOST_NAMED]
        raise OptionsError(f"{fault}: there is no tensor {fault.tensor!r}; the closest are {', '.join(near)}")
