"""What makes an autoencoder compressible: variants of its training at equal time, judged by the codec's own files.

python benchmarks/ablation_codec.py --train ../shared/data/photos-train --val ../shared/data/photos-val --output DIR

Each variant trains for --seconds on random crops, then the codec's tables are fitted to training images, and held-out
photos are compressed at every quality. Bjøntegaard differences against JPEG (4:2:0, optimised) on the same photos, over
0.15 to 0.6 bits per pixel. Evaluated: the averaged weights.
"""

from __future__ import annotations

import io
import json
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_msssim
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.fitting import fit_tables
from ldm_vae.codec.search import psnr_of
from ldm_vae.config import parse_flags
from ldm_vae.data.conversion import to_images
from ldm_vae.data.images import Pixels
from ldm_vae.data.sources import open_source
from ldm_vae.errors import one_line_errors
from ldm_vae.files import check_writable, write_json
from ldm_vae.metrics import bjontegaard_rate, ssimulacra2
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.pretrained import encode_moments, posterior_of
from ldm_vae.models.prior import STEP_LOGVAR, CausalPrior
from ldm_vae.objectives import losses
from ldm_vae.timing import describe_machine

SSIM_SCALES = (0.0448, 0.2856, 0.3001)
MEASURES = {"psnr": psnr_of, "ssimulacra2": ssimulacra2}
QUALITIES = (0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)
BASE: dict[str, Any] = {
    "latent_channels": 32,
    "patch_size": 4,
    "block_out_channels": (64, 128),
    "encoder_layers_per_block": (0, 1),
    "decoder_layers_per_block": (1, 2),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train."""

    prior: str = "causal"
    """normal: Gaussian posterior and KL to N(0, 1); factorised, causal: uniform noise and the prior's rate."""
    qualities: tuple[float, float] = (1.0, 1.0)
    weight: float = 0.008
    """Times nats per pixel, beside the mean squared error on [-1, 1]."""
    crop: int = 64
    batch_size: int = 16
    learning_rate: float = 1e-3
    network: dict[str, Any] = field(default_factory=dict)
    quality_channel: bool = False
    """The decoder gets log2 of the quality as one more channel."""
    coarse_weight: float = 0.0
    """Times the squared errors of smaller images, by scale."""
    ssim_weight: float = 0.0
    """Times 1 - SSIM (Wang et al. 2004) of the channels' mean at 1, 1/2 and 1/4 of the size, weighted as by MS-SSIM."""
    rounded: bool = False
    """The decoder gets rounded latents, the gradient passes straight through (Minnen & Singh 2020, section 3.3)."""


ALL: dict[str, Any] = {"qualities": (0.5, 4.0)}
LINEAR = {"linear_path": True}
VARIANTS = {
    "gaussian, normal prior": Variant(prior="normal"),
    "uniform, factorised": Variant(prior="factorised"),
    "uniform, causal": Variant(),
    "uniform, causal, quality .5-4": Variant(**ALL),
    "quality .5-4, crops of 128": Variant(**ALL, crop=128, batch_size=4),
    "quality .5-4, learning rate 2e-3": Variant(**ALL, learning_rate=2e-3),
    "quality .5-4, linear path": Variant(**ALL, network=LINEAR),
    "linear path, learning rate 5e-4": Variant(**ALL, learning_rate=5e-4, network=LINEAR),
    "linear path, learning rate 2e-3": Variant(**ALL, learning_rate=2e-3, network=LINEAR),
    "linear path, 64 channels": Variant(**ALL, network=LINEAR | {"latent_channels": 64}),
    "linear path, wider": Variant(**ALL, network=LINEAR | {"block_out_channels": (96, 192)}),
    "linear path, deeper": Variant(
        **ALL, network=LINEAR | {"encoder_layers_per_block": (1, 2), "decoder_layers_per_block": (1, 4)}
    ),
    "linear path, quality .7-2.8": Variant(qualities=(0.7, 2.8), network=LINEAR),
    "linear path, half the rate": Variant(**ALL, weight=0.024, network=LINEAR),
    "linear path, decoder knows the quality": Variant(
        **ALL, network=LINEAR | {"latent_channels": 33}, quality_channel=True
    ),
    "linear path, decoder sees rounded": Variant(**ALL, network=LINEAR, rounded=True),
    "rounded, half the rate, 64 channels": Variant(
        **ALL, weight=0.024, rounded=True, network=LINEAR | {"latent_channels": 64}
    ),
    "rounded, half the rate, 64 channels, wider": Variant(
        **ALL, weight=0.024, rounded=True, network=LINEAR | {"latent_channels": 64, "block_out_channels": (96, 192)}
    ),
    "rounded, half the rate": Variant(**ALL, weight=0.024, rounded=True, network=LINEAR),
    "rounded, coarse errors": Variant(**ALL, weight=0.15, rounded=True, network=LINEAR, coarse_weight=2.0),
    "rounded, SSIM": Variant(**ALL, weight=0.08, rounded=True, network=LINEAR, ssim_weight=0.2),
    "linear path, gaussian, normal prior": Variant(prior="normal", network=LINEAR),
    "linear path, factorised": Variant(**ALL, prior="factorised", network=LINEAR),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the ablation."""

    train: Path
    val: Path
    output: Path
    seconds: float = 300.0
    variants: tuple[str, ...] = ()
    """Names, all unless given."""
    model: str | None = None
    """Judge this trained codec (run or model folder) instead, at each of --dead-zones."""
    dead_zones: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2)
    """By how many steps more than half a one a latent must be away from a multiple to become the next outer one."""
    num_val: int = 24
    num_fit: int = 100
    seed: int = 0


class Trainee(torch.nn.Module):
    """A VAE, and the prior that it is trained with."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.vae = PatchAutoencoderKL(**BASE | variant.network)
        self.channels = self.vae.config.latent_channels
        self.prior = None
        if variant.prior != "normal":
            self.prior = CausalPrior(self.channels, neighbours=variant.prior == "causal")
            with torch.no_grad():  # the deviation is the same everywhere, and never trained
                self.vae.encoder.conv_out.weight[self.channels :] = 0
                self.vae.encoder.conv_out.bias[self.channels :] = STEP_LOGVAR
                if variant.quality_channel:  # the last channel's mean is 0
                    for last in (self.vae.encoder.conv_out, self.vae.encoder.linear.conv):
                        last.weight[self.channels - 1] = 0
                        last.bias[self.channels - 1] = 0

    def forward(self, images: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction, and nats per pixel (B,)."""
        moments = encode_moments(self.vae, images).float()
        mean = moments[:, : self.channels]
        num_pixels = images.shape[2] * images.shape[3]
        if self.prior is None:
            posterior = posterior_of(moments)
            latents = mean + posterior.std * torch.randn_like(mean)
            nats = losses.kl_per_pixel(posterior, num_pixels)
        else:
            step = quality[:, None, None, None]
            latents = mean + step * (torch.rand_like(mean) - 0.5)
            nats = self.prior(latents / step, quality)
            if self.variant.rounded:
                latents = mean + (step * (mean / step).round() - mean).detach()
            if self.variant.quality_channel:
                level = step.log2().expand(-1, 1, *latents.shape[2:])
                latents = torch.cat([latents[:, :-1], level], dim=1)
                nats = nats[:, :-1]
            nats = nats.sum(dim=(1, 2, 3)) / num_pixels
        return self.vae.decode(latents).sample, nats


class QualityCodec(LatentCodec):
    """Its last latent channel is log2 of the quality."""

    def dequantise(self, symbols: np.ndarray[Any, Any], quality: int) -> np.ndarray[Any, Any]:
        latents = super().dequantise(symbols, quality)
        latents[-1] = math.log2(quality / 256)
        return latents


class DeadZoneCodec(LatentCodec):
    """Rounds towards 0 a little more often than to the nearest: a worse picture in fewer bits."""

    dead_zone = 0.0

    def quantise(self, latents: np.ndarray[Any, Any], quality: int) -> np.ndarray[Any, Any]:
        chosen = list(self.tables.channels)
        steps, means = self.tables.steps(quality)[:, None, None], self.tables.means[chosen, None, None]
        exact = (latents[chosen] - means) / steps
        return (np.sign(exact) * np.floor(np.abs(exact) + 0.5 - self.dead_zone)).astype(np.int32)


def crops(photos: list[Pixels], variant: Variant, rng: np.random.Generator) -> Tensor:
    batch = []
    for _ in range(variant.batch_size):
        photo = photos[rng.integers(len(photos))]
        y, x = (int(rng.integers(n - variant.crop + 1)) for n in photo.shape[:2])
        crop = photo[y : y + variant.crop, x : x + variant.crop]
        batch.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return to_images(np.stack(batch)).to(memory_format=torch.channels_last)


def coarse_errors(difference: Tensor) -> Tensor:
    """`losses.coarse_loss`, of each image (B,)."""
    return torch.stack([losses.coarse_loss(d[None], torch.zeros_like(d[None]), "l2") for d in difference])


def dissimilarity(reconstruction: Tensor, images: Tensor) -> Tensor:
    """1 - SSIM, the weighted mean over scales, of each image (B,)."""
    pair = [(x.mean(dim=1, keepdim=True) + 1) / 2 for x in (reconstruction, images)]
    found = []
    for _ in SSIM_SCALES:
        found.append(1 - pytorch_msssim.ssim(*pair, data_range=1, size_average=False))
        pair = [functional.avg_pool2d(x, 2) for x in pair]
    weights = torch.tensor(SSIM_SCALES)
    return weights @ torch.stack(found) / weights.sum()


def train(variant: Variant, photos: list[Pixels], seconds: float, seed: int) -> tuple[PatchAutoencoderKL, int]:
    """The averaged network after `seconds`, and its steps; the learning rate follows a cosine of the time."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    trainee = Trainee(variant).to(memory_format=torch.channels_last).train()
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, variant.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    ema = EMAModel(trainee.vae.parameters(), decay=0.998, foreach=True)
    low, high = (math.log(q) for q in variant.qualities)
    began, steps = time.perf_counter(), 0
    while (share := (time.perf_counter() - began) / seconds) < 1:
        images = crops(photos, variant, rng)
        quality = torch.from_numpy(np.exp(rng.uniform(low, high, size=len(images)))).float()
        with torch.autocast("cpu", torch.bfloat16):
            reconstruction, nats = trainee(images, quality)
        error = (reconstruction.float() - images).square().mean(dim=(1, 2, 3))
        if variant.ssim_weight:
            error = error + variant.ssim_weight * dissimilarity(reconstruction.float(), images)
        if variant.coarse_weight:
            error = error + variant.coarse_weight * coarse_errors(reconstruction.float() - images)
        loss = (error / quality + variant.weight * quality * nats).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = variant.learning_rate * min(1, (steps + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.step()
        ema.step(trainee.vae.parameters())
        steps += 1
        if steps % 500 == 0:
            bits = float(nats.mean()) / math.log(2)
            print(f"  {steps} {share:.0%}: mse {float(error.mean()):.5f}, {bits:.3f} bits per pixel", flush=True)
    ema.copy_to(trainee.vae.parameters())
    return trainee.vae.eval(), steps


def curve_of(codec: LatentCodec, photos: list[Pixels]) -> dict[str, list[float]]:
    """Mean bits per pixel of whole files, mean PSNR and SSIMULACRA2 at each quality."""
    curve: dict[str, list[float]] = {"bpp": [], "psnr": [], "ssimulacra2": []}
    for quality in QUALITIES:
        files = [codec.compress(p, quality=quality) for p in photos]
        curve["bpp"].append(float(np.mean([8 * len(f) / p[:, :, 0].size for f, p in zip(files, photos, strict=True)])))
        decoded = [codec.decompress_picture(f).pixels for f in files]
        for name, measure in MEASURES.items():
            curve[name].append(float(np.mean([measure(p, d) for p, d in zip(photos, decoded, strict=True)])))
    return curve


def jpeg_curve(photos: list[Pixels]) -> dict[str, list[float]]:
    curve: dict[str, list[float]] = {"bpp": [], "psnr": [], "ssimulacra2": []}
    for quality in (5, 8, 12, 17, 23, 30, 40, 50, 60, 70):
        rates, decoded = [], []
        for photo in photos:
            file = io.BytesIO()
            Image.fromarray(photo).save(file, "JPEG", quality=quality, optimize=True, subsampling=2)
            rates.append(8 * len(file.getvalue()) / photo[:, :, 0].size)
            decoded.append(np.asarray(Image.open(file)))
        curve["bpp"].append(float(np.mean(rates)))
        for name, measure in MEASURES.items():
            curve[name].append(float(np.mean([measure(p, d) for p, d in zip(photos, decoded, strict=True)])))
    return curve


def main(config: Config) -> None:
    check_writable(config.output)
    source, val = open_source(str(config.train)), open_source(str(config.val))
    photos = [source[i].pixels for i in range(len(source))]
    held_out = [val[i].pixels for i in range(0, len(val), max(len(val) // config.num_val, 1))][: config.num_val]
    jpeg = jpeg_curve(held_out)
    file = config.output / "ablation_codec.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []

    def add(name: str, codec: LatentCodec, steps: int | None) -> None:
        curve = curve_of(codec, held_out)
        gain, perceived = (
            bjontegaard_rate(curve["bpp"], curve[m], jpeg["bpp"], jpeg[m], between=(0.15, 0.6)) for m in MEASURES
        )
        points = "  ".join(f"{r:.3f}:{p:.2f}" for r, p in zip(curve["bpp"], curve["psnr"], strict=True))
        both = f"{gain:+.1f} % (PSNR), {perceived:+.1f} % (SSIMULACRA2)"
        print(f"  {len(codec.tables.channels)} channels, against JPEG {both}; {points}", flush=True)
        found = {"rate_against_jpeg": gain, "rate_against_jpeg_ssimulacra2": perceived}
        rows.append({"variant": name, "steps": steps, **found, **curve})
        write_json(file, {"machine": describe_machine(torch.device("cpu")), "seconds": config.seconds, "rows": rows})

    if config.model is not None:
        for zone in config.dead_zones:
            print(f"dead zone {zone:g}", flush=True)
            rounding = DeadZoneCodec.from_pretrained(config.model)
            rounding.dead_zone = zone
            add(f"{config.model}, dead zone {zone:g}", rounding, None)
        return
    for name in config.variants or VARIANTS:
        print(name, flush=True)
        vae, steps = train(VARIANTS[name], photos, config.seconds, config.seed)
        make = QualityCodec if VARIANTS[name].quality_channel else LatentCodec
        codec = make(vae, fit_tables(vae, source, num_images=config.num_fit, qualities=QUALITIES))
        vae.save_pretrained(config.output / re.sub(r"[^a-z0-9.]+", "-", name))
        add(name, codec, steps)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="What makes an autoencoder compressible."))
