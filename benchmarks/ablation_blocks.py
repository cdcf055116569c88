"""Which block, patch and balance: equal wall time for each, L1 + KL on 64x64 crops. Evidence for docs/decisions/001.

python benchmarks/ablation_blocks.py --train ../shared/data/photos-train --val ../shared/data/photos-val --output DIR
The choice is made on `held-out`, every 15th training photo; `val` is only reported.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional

from ldm_vae.models.autoencoder import PatchAutoencoderKL, ResidualBlock


class ChannelRMSNorm(nn.Module):
    """Divides each position by the root mean square of its channels (RMSNorm, Zhang & Sennrich 2019, eq. 4).

    It never looks beyond one position, so the receptive field stays finite.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=1, keepdim=True) + 1e-6)  # (B, 1, H, W)
        return x * scale.to(x.dtype) * self.weight[:, None, None].to(x.dtype)


def block_with(
    norm: Callable[[int], nn.Module] = ChannelRMSNorm, activation: Callable[[Tensor], Tensor] = functional.silu
) -> type[nn.Module]:
    """The library's residual block with a norm or another activation."""

    class Variant(ResidualBlock):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.norm = norm(channels)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv2(activation(self.conv1(activation(self.norm(x)))))

    return Variant


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, then a two-layer perceptron a position (Liu et al. 2022)."""

    radius = 3

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = ChannelRMSNorm(channels)
        self.wide = nn.Conv2d(channels, 4 * channels, 1)
        self.narrow = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(functional.gelu(self.wide(self.norm(self.depthwise(x)))))


RMS_SILU = block_with()
P4 = {"patch_size": 4, "block_out_channels": (64, 128)}
BASE = P4 | {"encoder_layers_per_block": (1, 2), "decoder_layers_per_block": (1, 2)}
LIGHT = P4 | {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 2)}
# name: (block, keywords of the model, learning rate)
VARIANTS = {
    "base: patch 4 (64,128) enc (1,2) dec (1,2) rms silu": (RMS_SILU, BASE, 1e-3),
    "no norm": (block_with(nn.Identity), BASE, 1e-3),
    "group norm": (block_with(lambda c: nn.GroupNorm(8, c)), BASE, 1e-3),
    "relu": (block_with(activation=functional.relu), BASE, 1e-3),
    "no norm, relu": (ResidualBlock, BASE, 1e-3),
    "gelu": (block_with(activation=functional.gelu), BASE, 1e-3),
    "convnext": (ConvNeXtBlock, BASE, 1e-3),
    "patch 2 (32,64,128)": (
        RMS_SILU,
        {
            "patch_size": 2,
            "block_out_channels": (32, 64, 128),
            "encoder_layers_per_block": (1, 1, 1),
            "decoder_layers_per_block": (1, 1, 2),
        },
        1e-3,
    ),
    "enc (1,1) dec (1,2)": (RMS_SILU, LIGHT, 1e-3),
    "enc (1,1) dec (1,3)": (RMS_SILU, LIGHT | {"decoder_layers_per_block": (1, 3)}, 1e-3),
    "enc (1,1) dec (1,1)": (RMS_SILU, LIGHT | {"decoder_layers_per_block": (1, 1)}, 1e-3),
    "enc (0,2) dec (0,3) (64,160)": (
        RMS_SILU,
        {
            "patch_size": 4,
            "block_out_channels": (64, 160),
            "encoder_layers_per_block": (0, 2),
            "decoder_layers_per_block": (0, 3),
        },
        1e-3,
    ),
    "widths (48,96)": (RMS_SILU, BASE | {"block_out_channels": (48, 96)}, 1e-3),
    "widths (96,192)": (RMS_SILU, BASE | {"block_out_channels": (96, 192)}, 1e-3),
    "learning rate 2e-3": (RMS_SILU, BASE, 2e-3),
    "learning rate 5e-4": (RMS_SILU, BASE, 5e-4),
}
PLAIN = ResidualBlock
# The second round: the better ones of the first, at the better learning rate.
SECOND_ROUND = {
    "plain enc (1,1) dec (1,2)": (PLAIN, LIGHT, 2e-3),
    "plain enc (1,1) dec (1,2), learning rate 4e-3": (PLAIN, LIGHT, 4e-3),
    "plain enc (1,2) dec (1,2)": (PLAIN, BASE, 2e-3),
    "rms relu enc (1,1) dec (1,2)": (block_with(activation=functional.relu), LIGHT, 2e-3),
    "plain enc (1,1) dec (1,1)": (PLAIN, LIGHT | {"decoder_layers_per_block": (1, 1)}, 2e-3),
    "plain enc (1,1) dec (1,3)": (PLAIN, LIGHT | {"decoder_layers_per_block": (1, 3)}, 2e-3),
    "plain enc (1,1) dec (1,2) (64,160)": (PLAIN, LIGHT | {"block_out_channels": (64, 160)}, 2e-3),
    "plain enc (0,1) dec (1,2)": (PLAIN, LIGHT | {"encoder_layers_per_block": (0, 1)}, 2e-3),
    "plain enc (0,2) dec (1,2)": (PLAIN, LIGHT | {"encoder_layers_per_block": (0, 2)}, 2e-3),
    "plain patch 2 (32,64,128)": (PLAIN, VARIANTS["patch 2 (32,64,128)"][1], 2e-3),
}
VARIANTS |= SECOND_ROUND


def load(folder: Path, size: int) -> list[np.ndarray]:
    """Photos with the shorter side resized to `size`: uint8 (H, W, 3)."""
    photos = []
    for path in sorted(folder.rglob("*.jpg")):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        scale = size / min(image.size)
        image = image.resize([max(size, round(s * scale)) for s in image.size], Image.Resampling.BICUBIC)
        photos.append(np.asarray(image))
    return photos


def crops(photos: list[np.ndarray], rng: np.random.Generator, count: int, side: int) -> Tensor:
    out = np.empty((count, side, side, 3), np.uint8)
    for row in out:
        photo = photos[rng.integers(len(photos))]
        y, x = (rng.integers(s - side + 1) for s in photo.shape[:2])
        crop = photo[y : y + side, x : x + side]
        row[:] = crop[:, ::-1] if rng.random() < 0.5 else crop
    return torch.from_numpy(out).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W), channels last


@torch.no_grad()
def psnr(vae: PatchAutoencoderKL, photos: list[np.ndarray]) -> float:
    """Mean PSNR in dB of 256x256 centre crops through the posterior's mean, uint8 rounding first."""
    values = []
    for photo in photos:
        y, x = ((s - 256) // 2 for s in photo.shape[:2])
        pixels = torch.from_numpy(photo[y : y + 256, x : x + 256].copy()).permute(2, 0, 1)[None].float()
        out = vae(pixels / 127.5 - 1).sample
        error = (((out.clamp(-1, 1) + 1) * 127.5).round() - pixels).square().mean().item()
        values.append(10 * math.log10(255**2 / error))
    return sum(values) / len(values)


def train(vae: Any, photos: list[np.ndarray], rate: float, seconds: float, seed: int, kl_weight: float) -> int:
    """AdamW with warm-up and cosine decay over the wall time given; the number of steps that it took."""
    rng, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
        images = crops(photos, rng, 16, 64)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            reconstruction = vae.decode(posterior.sample(noise)).sample
        loss = (reconstruction.float() - images).abs().mean() + kl_weight * posterior.kl().float().mean() / 64**2
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("train", "val", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--kl-weight", type=float, default=1e-4)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    photos, val = load(args.train, 256), load(args.val, 256)
    held_out, photos = photos[::15], [p for i, p in enumerate(photos) if i % 15]
    print(f"{len(photos)} training photos, {len(held_out)} held out, {len(val)} of val", flush=True)
    rows = []
    for seed in args.seeds:
        for name in args.only:
            block, keywords, rate = VARIANTS[name]
            torch.manual_seed(seed)
            vae = type("Variant", (PatchAutoencoderKL,), {"block": block})(**keywords)
            vae.to(memory_format=torch.channels_last)
            steps = train(vae, photos, rate, args.seconds, seed, args.kl_weight)
            vae.eval()
            row = {
                "variant": name,
                "seed": seed,
                "parameters": sum(p.numel() for p in vae.parameters()),
                "images_per_second": 16 * steps / args.seconds,
                "held_out_psnr": psnr(vae, held_out),
                "val_psnr": psnr(vae, val),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            (args.output / "ablation_blocks.json").write_text(
                json.dumps({"seconds": args.seconds, "kl_weight": args.kl_weight, "rows": rows}, indent=1)
            )


if __name__ == "__main__":
    main()
