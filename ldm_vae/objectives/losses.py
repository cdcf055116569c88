"""What the VAE and its discriminator minimise, as plain functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.nn import functional

ReconstructionLoss = Literal["l1", "l2", "charbonnier"]


def reconstruction_loss(
    reconstruction: Tensor, images: Tensor, kind: ReconstructionLoss | Literal["cross-entropy"]
) -> Tensor:
    """Mean over all values of images (B, C, H, W) in [-1, 1]; Charbonnier is sqrt(d^2 + 1e-6) (Lai et al. 2017).

    Cross-entropy, in nats, is that of log-odds in place of a reconstruction, where images are 1 (true) and -1.
    """
    reconstruction, images = reconstruction.float(), images.float()
    difference = reconstruction - images
    match kind:
        case "l1":
            return difference.abs().mean()
        case "l2":
            return difference.square().mean()
        case "charbonnier":
            return (difference.square() + 1e-6).sqrt().mean()
        case "cross-entropy":
            truth = (1 + images) / 2
            return functional.binary_cross_entropy_with_logits(reconstruction, truth, reduction="none").mean()


def resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images or latents (B, C, H, W) -> (B, C, *size), bilinear, antialiased."""
    if tuple(size) == tuple(images.shape[-2:]):
        return images
    return functional.interpolate(images, tuple(size), mode="bilinear", antialias=True)


def kl_per_pixel(posterior: DiagonalGaussianDistribution, num_pixels: int) -> Tensor:
    r"""KL(posterior || N(0, 1)) in nats per pixel, of each image: (B,) (Kingma & Welling 2014, appendix B).

    One pixel is one (y, x) place, whatever its channels: `num_pixels` is H * W of the image. Stable Diffusion's code
    sums the KL over the latents and the error over all C * H * W values of an image, so its weight of 1e-6 beside
    a *summed* error is 1e-6 / C of ours beside a *mean* error: 3.3e-7 for colour images. Divided by ln 2, this is
    the rate in bits per pixel of an ideal code for samples of the posterior.
    """
    return posterior.kl() / num_pixels


def kl_bits_per_channel(posterior: DiagonalGaussianDistribution) -> Tensor:
    """KL in bits per latent value, for each latent channel: (c,)."""
    nats = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)  # (B, c, h, w)
    return nats.mean(dim=(0, 2, 3)) / math.log(2)


def l1_sparsity(latents: Tensor) -> Tensor:
    """Mean magnitude over root mean square of an image's latents (B, c, h, w), mean over the batch: 1 if all are equal.

    L1 over L2, as in Hoyer 2004 ("Non-negative matrix factorization with sparseness constraints", section 3.1): L1
    alone also falls when all latents shrink and the weights behind them grow, which makes nothing sparse.
    """
    values = latents.float().flatten(1)  # (B, n)
    return (values.abs().mean(dim=1) / (values.square().mean(dim=1) + 1e-12).sqrt()).mean()


def kl_sparsity(activations: Tensor, target: float) -> Tensor:
    """KL in nats between the target activation rate and that of each image, mean over the batch.

    Of Bernoulli variables (Ng 2011, "Sparse autoencoder", section 3); the rate is taken over an image's latents
    (B, c, h, w) in 0..1 instead of over the data, so that splitting a batch changes nothing.
    """
    rate = activations.float().flatten(1).mean(dim=1).clamp(1e-6, 1 - 1e-6)  # (B,)
    return (target * torch.log(target / rate) + (1 - target) * torch.log((1 - target) / (1 - rate))).mean()


def adversarial_penalty(logits: Tensor, kind: str) -> Tensor:
    """Mean over logits that ought to be low: relu(1 + x) for the hinge, -log(1 - sigmoid(x)) otherwise."""
    x = logits.float()
    return functional.relu(1 + x).mean() if kind == "hinge" else functional.softplus(x).mean()


def generator_loss(fake_logits: Tensor, kind: str) -> Tensor:
    """hinge: -mean(logits) (Lim & Ye 2017). non-saturating: -mean(log D(fake)) (Goodfellow et al. 2014, section 3)."""
    return -fake_logits.float().mean() if kind == "hinge" else adversarial_penalty(-fake_logits, kind)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str) -> Tensor:
    """Half the sum over real and fake (the half is VQGAN's).

    hinge: relu(1 - real), relu(1 + fake) (Lim & Ye 2017, eq. 7). non-saturating: -log D(real), -log(1 - D(fake))
    (Goodfellow et al. 2014, eq. 1).
    """
    return 0.5 * (adversarial_penalty(-real_logits, kind) + adversarial_penalty(fake_logits, kind))


def discriminator_accuracy(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The share of patches that the discriminator gets right: 0.5 is chance."""
    return 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())


def adaptive_weight(other_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """|d(other terms)| / |d(adversarial term)| at the decoder's last layer (Esser et al. 2021, eq. 7), at most 1e4.

    Both gradients are those of the whole global batch: a weight from part of a batch would make the step depend on how
    the batch is split.
    """
    return (other_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(max=1e4)
