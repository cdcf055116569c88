"""A codec's network in NumPy: a PatchAutoencoderKL whose separable blocks are all at one resolution.

It computes what `PatchNetwork` does, to rounding, and needs no torch, whose import takes longer than the picture.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from threadpoolctl import ThreadpoolController

from ldm_vae.codec.loops import compiled
from ldm_vae.errors import ModelError
from ldm_vae.models.digest import digest_of
from ldm_vae.models.loading import find_saved

Floats = np.ndarray[Any, Any]
Matrix = tuple[Floats, Floats]
"""A 1x1 convolution: a matrix (in, out) and a bias (out,)."""

DEFAULTS = {
    "in_channels": 3,
    "out_channels": None,
    "latent_channels": 4,
    "patch_size": 4,
    "block_out_channels": [64, 128],
    "encoder_layers_per_block": [0, 1],
    "decoder_layers_per_block": [1, 2],
    "block": "residual",
    "stem_kernel_size": None,
    "linear_path": False,
    "pool": 1,
    "deterministic": False,
    "latent_activation": "none",
    "noise_level": None,
    "finds_blemishes": False,
}
"""Of `PatchNetwork`."""
ROWS = 1024
"""Positions that go through two 1x1 convolutions together: what lies between them stays in the processor's cache."""


class SeparableAutoencoder:
    """As `network.Network` takes it. See `TorchAutoencoder` for the attributes.

    Args:
        config: of the PatchAutoencoderKL.
        weights: float32 tensors by name.
        workers: threads for one image.
    """

    finite, tile = True, 128

    def __init__(self, config: dict[str, Any], weights: dict[str, Floats], workers: int = 1) -> None:
        self.workers, self.weights = workers, weights
        self.config = DEFAULTS | {name: value for name, value in config.items() if name in DEFAULTS}
        self.channels, self.latent_channels = self.config["in_channels"], self.config["latent_channels"]
        self.stride = self.config["patch_size"]
        self.encoder_halo, self.decoder_halo = (
            self.config[f"{side}_layers_per_block"][0] for side in ("encoder", "decoder")
        )
        changed = {name: value for name, value in self.config.items() if value != DEFAULTS[name]}
        tensors = ((n, "torch.float32", a.shape, a.tobytes()) for n, a in sorted(weights.items()))
        self.fingerprint = digest_of(str(config["_class_name"]), changed, tensors)
        self.encoder, self.decoder = Half("encoder.", weights), Half("decoder.", weights)

    def encode(self, values: Floats) -> Floats:
        """An image (C, H, W) in [-1, 1] -> the posterior's mean (c, h, w), float32."""
        f, (channels, height, width) = self.stride, values.shape
        patches = values.reshape(channels, height // f, f, width // f, f).transpose(1, 3, 0, 2, 4)
        mean = self.encoder(
            np.ascontiguousarray(patches).reshape(height // f, width // f, -1), self.latent_channels, self.workers
        )
        return np.moveaxis(mean, 2, 0)

    def decode(self, latents: Floats) -> Floats:
        """Latents (c, h, w) -> an image (C, H, W), about [-1, 1] and not clamped, float32."""
        f, (_, height, width) = self.stride, latents.shape
        patches = self.decoder(np.ascontiguousarray(np.moveaxis(latents, 0, 2)), self.channels * f**2, self.workers)
        image = patches.reshape(height, width, self.channels, f, f).transpose(2, 0, 3, 1, 4)
        return image.reshape(self.channels, height * f, width * f)


def load_separable(name: str, workers: int = 1) -> SeparableAutoencoder | None:
    """The autoencoder at RUN_OR_MODEL; None for one of another kind.

    Raises:
        ModelError: nothing there, or files that cannot be read.
    """
    folder, class_name = find_saved(name, "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    if class_name != "PatchAutoencoderKL" or not file.is_file():
        return None
    try:
        config = DEFAULTS | json.loads((folder / "config.json").read_text())
        blocks_at_one_resolution = config["block"] == "separable" and len(config["block_out_channels"]) == 1
        special = ("out_channels", "stem_kernel_size", "pool", "latent_activation", "noise_level")
        usual = all(config[n] == DEFAULTS[n] for n in special)
        if not blocks_at_one_resolution or not usual or config["finds_blemishes"]:
            return None
        weights = load_file(file)
        return SeparableAutoencoder(
            config, {n: np.ascontiguousarray(a, np.float32) for n, a in weights.items()}, workers
        )
    except Exception as error:  # damaged files raise many kinds
        raise ModelError(f"cannot load {class_name} from {name}: {type(error).__name__}: {error}") from None


class Half:
    """The encoder on patches or the decoder of latents: (h, w, C) -> (h, w, channels), both float32."""

    def __init__(self, name: str, weights: dict[str, Floats]) -> None:
        def convolution(part: str) -> Matrix:
            matrix = weights[f"{name}{part}.weight"][:, :, 0, 0].T
            return np.ascontiguousarray(matrix), weights[f"{name}{part}.bias"]

        self.first, self.last = convolution("conv_in"), convolution("conv_out")
        self.linear = convolution("linear.conv") if f"{name}linear.conv.weight" in weights else None
        self.blocks: list[tuple[Floats, Floats, Matrix, Matrix]] = []
        while (block := f"stages.0.blocks.{len(self.blocks)}") and f"{name}{block}.depthwise.weight" in weights:
            kernel = np.ascontiguousarray(weights[f"{name}{block}.depthwise.weight"][:, 0].transpose(1, 2, 0))
            bias = weights[f"{name}{block}.depthwise.bias"]
            self.blocks.append((kernel, bias, convolution(f"{block}.expand"), convolution(f"{block}.project")))

    def __call__(self, values: Floats, channels: int, workers: int) -> Floats:
        """`workers` threads share the rows; each waits for the others before a convolution that sees its neighbours."""
        height, width, inputs = values.shape
        h = np.empty((height, width, len(self.first[1])), np.float32)
        spread, output = np.empty_like(h), np.empty((height, width, channels), np.float32)
        rows = [slice(height * i // workers, height * (i + 1) // workers) for i in range(workers)]

        def begin(band: slice) -> None:
            np.matmul(values[band].reshape(-1, inputs), self.first[0], out=flat(h[band]))
            h[band] += self.first[1]

        def convolve(band: slice, kernel: Floats, bias: Floats) -> None:
            depthwise(h, kernel, bias, spread, band.start, band.stop)

        def mix(band: slice, expand: Matrix, project: Matrix) -> None:
            mixed, seen = flat(h[band]), flat(spread[band])
            for top in range(0, len(mixed), ROWS):
                wide = seen[top : top + ROWS] @ expand[0]
                add_and_rectify(wide, expand[1])
                add_both(mixed[top : top + ROWS], wide @ project[0], project[1])

        def finish(band: slice) -> None:
            np.maximum(h[band], 0, out=h[band])
            np.matmul(flat(h[band]), self.last[0][:, :channels], out=flat(output[band]))
            output[band] += self.last[1][:channels]
            if self.linear is not None:
                flat(output[band])[:] += values[band].reshape(-1, inputs) @ self.linear[0][:, :channels]
                output[band] += self.linear[1][:channels]

        with blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
            each = pool.map if workers > 1 else map
            list(each(begin, rows))
            for kernel, bias, expand, project in self.blocks:
                list(each(partial(convolve, kernel=kernel, bias=bias), rows))
                list(each(partial(mix, expand=expand, project=project), rows))
            list(each(finish, rows))
        return output


@cache
def blas() -> ThreadpoolController:
    """Limits the threads of matrix products: those would wait for each other, and for ever where a core is taken."""
    return ThreadpoolController()


def flat(x: Floats) -> Floats:
    """(h, w, C) -> (h * w, C): a view."""
    return x.reshape(-1, x.shape[2])


@compiled
def depthwise(x: Floats, kernel: Floats, bias: Floats, out: Floats, top: int, bottom: int) -> None:
    """A 3x3 convolution of each channel by itself, zeros around: (h, w, C) with (3, 3, C) -> rows of (h, w, C)."""
    height, width, channels = x.shape
    for i in range(top, bottom):
        for j in range(width):
            row = out[i, j]
            for c in range(channels):
                row[c] = bias[c]
            for y in range(max(i - 1, 0), min(i + 2, height)):
                for z in range(max(j - 1, 0), min(j + 2, width)):
                    values, weights = x[y, z], kernel[y - i + 1, z - j + 1]
                    for c in range(channels):
                        row[c] += values[c] * weights[c]


@compiled
def add_and_rectify(x: Floats, bias: Floats) -> None:
    """x (n, C) + bias (C,), and 0 where that is negative, in place."""
    for n in range(len(x)):
        for c in range(len(bias)):
            x[n, c] = max(x[n, c] + bias[c], np.float32(0))


@compiled
def add_both(x: Floats, y: Floats, bias: Floats) -> None:
    """x (n, C) + y (n, C) + bias (C,), in place."""
    for n in range(len(x)):
        for c in range(len(bias)):
            x[n, c] += y[n, c] + bias[c]
