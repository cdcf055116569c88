"""Muon: momentum whose matrices are orthogonalised before they are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial of Jordan et al. 2024: five times, it takes singular values to between 0.7 and 1.2."""
ITERATIONS = 5
MOMENTUM = 0.95


def orthogonalised(matrix: Tensor) -> Tensor:
    """Nearly U V^T of a matrix U S V^T, by Newton and Schulz's iteration, in the matrix's precision."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class Muon(torch.optim.AdamW):
    """Muon for matrices (Jordan et al. 2024), and AdamW for all other parameters, with one learning rate.

    A convolution counts as the matrix (outputs, inputs * kernel). Steps of a matrix have the size that AdamW's usually
    have (Liu et al. 2025, equation 4), so that learning rates are of the same kind; a few times higher ones are stable.
    `torch.optim.Muon` takes no convolutions, and iterates in bfloat16, which a CPU may have to emulate.

    Args:
        matrices: weights of two or more dimensions; of hidden layers, by rule.
        others: the other parameters.
        keywords: AdamW's.
    """

    def __init__(self, matrices: Iterable[Tensor], others: Iterable[Tensor], lr: float, **keywords: Any) -> None:
        super().__init__([{"params": list(matrices)}, {"params": list(others)}], lr, **keywords)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        matrices, others = self.param_groups
        for weight in matrices["params"]:
            momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            update = orthogonalised(weight.grad.lerp(momentum, MOMENTUM).flatten(1))
            weight.sub_(update.view_as(weight), alpha=0.2 * max(update.shape) ** 0.5 * matrices["lr"])
        self.param_groups = [others]
        try:
            return super().step(closure)
        finally:
            self.param_groups = [matrices, others]


def muon_of(network: nn.Module, lr: float, *, outer: Iterable[nn.Module], **keywords: Any) -> Muon:
    """For a network's hidden convolutions and linear layers; the `outer` ones, its first and last, are AdamW's."""
    outer = set(outer)
    hidden = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in outer]
    matrices = {m.weight for m in hidden}
    return Muon(matrices, [p for p in network.parameters() if p not in matrices], lr, **keywords)
