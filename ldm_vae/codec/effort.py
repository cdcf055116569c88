"""What an encoder can do for longer: gradient steps on a picture's latents, with the same decoder and tables.

The encoder's latents are a guess, learned from many pictures, of what is best for this one. From there, Adam lowers
D + lambda R: the distortion after decoding, and the rate by the tables' own code lengths. Latents are rounded softly
meanwhile, and harder from step to step (as in Agustsson & Theis 2020, "Universally quantized neural compression").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ldm_vae.codec.bitstream import TUNINGS, Box, Header
from ldm_vae.codec.contexts import nats_of, rate_slopes
from ldm_vae.codec.distortion import DISTORTIONS
from ldm_vae.codec.network import grown
from ldm_vae.codec.separable import SeparableAutoencoder
from ldm_vae.codec.tables import Floats, Tables
from ldm_vae.codec.tiles import window
from ldm_vae.data.images import Pixels, values_of
from ldm_vae.data.large import let_go
from ldm_vae.models.patch_network import PatchNetwork

ITERATIONS = (0, 3, 10, 50)
"""Of each effort."""
LEARNING_RATES = (0.0, 0.04, 0.02, 0.005)
"""In steps of the quantiser, at the beginning of each effort; they fall to 0."""
SOFTEST, HARDEST = 3.0, 20.0
"""What the slope of soft rounding comes from, see `rounded_softly`: at the beginning, and at the end."""
COARSER = 1.25
"""Times the step: what a coarser file loses and saves gives lambda."""


class Refiner:
    """Refines the latents of pictures at one step.

    Args:
        vae: any diffusers autoencoder, or a SeparableAutoencoder.
        tables: fitted for it.
        tuning: whose distortion is lowered.
    """

    def __init__(self, vae: Any, tables: Tables, step: int, tuning: str) -> None:
        self.vae = in_torch(vae)
        self.tuning, self.contexts = tuning, tables.contexts_of(step)
        self.like = next(self.vae.parameters())  # type and device
        self.channels = torch.tensor(tables.channels, device=self.like.device)
        self.means = torch.from_numpy(tables.means).to(self.like)[:, None, None]
        self.steps = torch.from_numpy(tables.channel_steps(step)).to(self.like)[:, None, None]

    def values_of(self, latents: Floats) -> Tensor:
        """Latents (c, h, w) -> those that are coded, (C, h, w), in steps of the quantiser."""
        coded = torch.from_numpy(latents).to(self.like)[self.channels]
        return (coded - self.means[self.channels]) / self.steps

    def latents_of(self, values: Tensor) -> Tensor:
        """The way back."""
        latents = self.means.expand(-1, *values.shape[1:])
        return latents.index_copy(0, self.channels, self.means[self.channels] + values * self.steps)

    def distortion(self, values: Tensor, target: Tensor) -> Tensor:
        decoded = self.vae.decode(self.latents_of(values)[None]).sample
        return DISTORTIONS[self.tuning](decoded, target, torch.ones(1, device=target.device))

    def refine(self, latents: Floats, image: Floats, effort: int) -> Floats:
        """Latents (c, h, w), and the image (C, H, W) that they stand for -> better ones, float32."""
        values, target = self.values_of(latents), torch.from_numpy(image).to(self.like)[None]
        exchange = self.rate_of_exchange(values, target)
        if exchange > 0:  # or else there is nothing to save
            values = self.descend(values, target, exchange, effort)
        refined: Floats = self.latents_of(values).float().cpu().numpy()
        return refined

    @torch.no_grad()
    def rate_of_exchange(self, values: Tensor, target: Tensor) -> float:
        """Lambda: the distortion that a nat is worth, as between this step and a coarser one."""
        fine, coarse = torch.round(values), torch.round(values / COARSER)
        lost = self.distortion(coarse * COARSER, target) - self.distortion(fine, target)
        saved = nats_of(fine.int().cpu().numpy(), self.contexts) - nats_of(coarse.int().cpu().numpy(), self.contexts)
        return float(lost) / saved if saved > 0 else 0.0

    def descend(self, values: Tensor, target: Tensor, exchange: float, effort: int) -> Tensor:
        values = values.clone().requires_grad_()
        adam = torch.optim.Adam([values], betas=(0.9, 0.95), eps=1e-4)
        for i in range(ITERATIONS[effort]):
            done = i / ITERATIONS[effort]
            soft = rounded_softly(values, SOFTEST + (HARDEST - SOFTEST) * done)
            distortion = self.distortion(soft, target) / exchange
            (gradient,) = torch.autograd.grad(distortion, values)
            slopes = rate_slopes(values.detach().cpu().numpy(), self.contexts)
            values.grad = gradient + torch.from_numpy(slopes).to(gradient)
            adam.param_groups[0]["lr"] = LEARNING_RATES[effort] * (1 - done)
            adam.step()
        return values.detach()


def rounded_softly(values: Tensor, hardness: float) -> Tensor:
    """A tanh from each integer to the next, the more of a stair the harder it is.

    Its slope is kept within 0.1 and 2 in the backward pass: what lies at an integer still moves.
    """
    middle = torch.floor(values.detach()) + 0.5
    offset = values.detach() - middle
    curve, scale = torch.tanh(hardness * offset), 2 * math.tanh(hardness / 2)
    slope = (hardness * (1 - curve.square()) / scale).clamp(0.1, 2.0)
    return middle + curve / scale + slope * (values - values.detach())


def refined_latents(codec: Any, pixels: Pixels, header: Header, effort: int) -> Iterator[Floats]:
    """A picture's latents (c, h, w) in each tile, float32, by a LatentCodec; refined with what lies around the tile."""
    network, whole = codec.network, (0, 0, *header.latent_size)
    refiner = Refiner(codec.vae, codec.tables, header.step, TUNINGS[codec.tuning])

    def refined(box: Box) -> Floats:
        return refiner.refine(network.encode(pixels, box), values_of(network.pixels_at(pixels, box)), effort)

    at_once = None if network.finite else refined(whole)
    for box in header.tile_boxes:
        around = grown(box, network.decoder_halo, header.latent_size) if network.finite else whole
        yield window(refined(around) if at_once is None else at_once, around, box)
        let_go(pixels)


def in_torch(vae: Any) -> Any:
    """An autoencoder that has gradients."""
    if not isinstance(vae, SeparableAutoencoder):
        return vae
    network = PatchNetwork(**vae.config)
    network.load_state_dict({name: torch.from_numpy(values) for name, values in vae.weights.items()})
    return network.requires_grad_(False)
