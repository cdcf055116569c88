"""Networks whose parameters are divided among processes (FSDP2): from parts to whole tensors, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(network: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in network.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this process may have a part. To be called by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one of which this process may have a part. To be called by all processes."""
    if isinstance(target, DTensor):
        here = value.to(target.device, target.dtype)
        target.copy_(distribute_tensor(here, target.device_mesh, target.placements))
    else:
        target.copy_(value)


@contextmanager
def averaged_copy(ema: EMAModel, copy: Any, device: torch.device) -> Iterator[Any]:
    """A network that is whole, with the averaged weights of one that is not, in the process that has such a copy.

    To be entered by all processes; those without a copy get None.
    """
    for shadow, parameter in zip(ema.shadow_params, repeat(None) if copy is None else copy.parameters(), strict=False):
        found = whole(shadow)
        if parameter is not None:
            parameter.data.copy_(found)
    if copy is not None:
        copy.to(device).eval()
    yield copy
    if copy is not None:
        copy.cpu()
