"""Muon's steps are torch's, of convolutions as of matrices, and everything else is AdamW's."""

from __future__ import annotations

import torch
from torch import nn

from ldm_vae.runs.muon import muon_of, orthogonalised

OPTIONS = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}


def gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def test_singular_values_become_nearly_one() -> None:
    for shape in [(24, 60), (60, 24), (32, 32)]:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        values = torch.linalg.svdvals(orthogonalised(matrix))
        assert values.max() < 1.25
        assert values[:-2].min() > 0.5  # the least of a square matrix is near 0


def test_a_matrix_takes_the_steps_of_torch_s_muon() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(40, 24, bias=False), nn.Linear(40, 24, bias=False)
    theirs.load_state_dict(ours.state_dict())
    muon = muon_of(ours, 0.01, outer=(), **OPTIONS)
    reference = torch.optim.Muon(
        theirs.parameters(), 0.01, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    start = ours.weight.detach().clone()
    for seed in range(4):
        gradients(ours, seed)
        gradients(theirs, seed)
        muon.step()
        reference.step()
    moved = (ours.weight - start).norm()
    assert (ours.weight - theirs.weight).norm() < 0.02 * moved  # torch iterates in bfloat16


def test_a_convolution_is_a_matrix_and_the_outer_layers_biases_and_norms_are_adamw_s() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 3, 3))
    network = network.to(memory_format=torch.channels_last)
    copy = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 3, 3))
    copy.load_state_dict(network.state_dict())
    flat = nn.Linear(72, 8, bias=False)
    flat.weight.data.copy_(network[2].weight.flatten(1))
    muon = muon_of(network, 0.01, outer=(network[0], network[3]), **OPTIONS)
    adamw = torch.optim.AdamW(copy.parameters(), 0.01, **OPTIONS)
    matrix = muon_of(flat, 0.01, outer=(), **OPTIONS)
    for seed in range(3):
        gradients(network, seed)
        gradients(copy, seed)
        flat.weight.grad = copy[2].weight.grad.flatten(1)
        for optimizer in (muon, adamw, matrix):
            optimizer.step()
    torch.testing.assert_close(network[2].weight.flatten(1), flat.weight)
    for (name, ours), theirs in zip(network.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (name != "2.weight")
