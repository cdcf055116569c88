from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch._subclasses import FakeTensorMode

from ldm_vae.errors import ModelError
from ldm_vae.models.autoencoder import ARCHITECTURES, PatchAutoencoderKL
from ldm_vae.models.interface import encode_moments, is_variational, last_layer, stride_of
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.patch_network import Stage
from ldm_vae.models.reconstruction import reconstruct

SMALL: list[dict[str, Any]] = [
    {"patch_size": 4, "block_out_channels": (8,), "encoder_layers_per_block": (1,), "decoder_layers_per_block": (2,)},
    {"patch_size": 4, "block_out_channels": (8, 8)},
    {
        "patch_size": 2,
        "block_out_channels": (8, 8, 8),
        "encoder_layers_per_block": (1, 0, 1),
        "decoder_layers_per_block": (2, 1, 0),
    },
    {"patch_size": 2, "block_out_channels": (8, 8), "pool": 2},
    {"patch_size": 4, "block_out_channels": (8, 8), "block": "separable"},
    {"patch_size": 4, "block_out_channels": (8, 8), "block": "separable", "stem_kernel_size": 3},
    {
        "patch_size": 8,
        "block_out_channels": (8,),
        "encoder_layers_per_block": (2,),
        "decoder_layers_per_block": (3,),
        "block": "separable",
    },
    {"patch_size": 2, "block_out_channels": (8,), "encoder_layers_per_block": (1,), "decoder_layers_per_block": (3,)}
    | {"pool": 4},
]


def tiny_kl() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_presets_have_the_stride_and_channels_of_their_name(name: str) -> None:
    with FakeTensorMode():  # shapes alone
        vae = PatchAutoencoderKL(**ARCHITECTURES[name])
        images = torch.zeros(2, 3, 64, 64)
        latents = vae.encode(images).latent_dist.mean
        assert vae.decode(latents).sample.shape == images.shape
    if name[1].isdigit():  # f8c4 and the like
        stride, channels = name.split("-")[0][1:].split("c")
        assert latents.shape == (2, int(channels), 64 // int(stride), 64 // int(stride))
    if name.endswith("-large"):
        assert sum(p.numel() for p in vae.parameters()) == pytest.approx(83.65e6, rel=0.05)  # SD's VAE


@pytest.mark.parametrize("keywords", SMALL)
def test_the_receptive_field_is_finite_and_what_the_model_says(keywords: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(in_channels=1, latent_channels=2, **keywords).double()
    for parameter in vae.parameters():
        parameter.data = parameter.abs() + 0.01  # positive weights: no influence cancels or dies in a ReLU
    stride = vae.spatial_compression_ratio
    side = (2 * vae.encoder_halo // stride + 5) * stride
    images = torch.rand(1, 1, side, side, dtype=torch.double, requires_grad=True)
    cell = side // stride // 2
    vae.encode(images).latent_dist.mean[0, :, cell, cell].sum().backward()
    touched = images.grad[0, 0].nonzero()
    first, last = cell * stride - vae.encoder_halo, (cell + 1) * stride - 1 + vae.encoder_halo
    assert touched.min(dim=0).values.tolist() == [first, first]
    assert touched.max(dim=0).values.tolist() == [last, last]

    count = 2 * vae.decoder_halo + 5
    latents = torch.rand(1, 2, count, count, dtype=torch.double, requires_grad=True)
    middle = count // 2
    block = vae.decode(latents).sample[0, 0, middle * stride :, middle * stride :][:stride, :stride]
    block.sum().backward()
    touched = latents.grad[0].abs().sum(dim=0).nonzero()
    assert touched.min(dim=0).values.tolist() == [middle - vae.decoder_halo] * 2
    assert touched.max(dim=0).values.tolist() == [middle + vae.decoder_halo] * 2


def test_a_plain_autoencoder_has_no_noise_and_no_kl() -> None:
    vae = PatchAutoencoderKL(block_out_channels=(8, 8), deterministic=True)
    posterior = vae.encode(torch.rand(2, 3, 16, 16)).latent_dist
    assert torch.equal(posterior.sample(), posterior.mean)
    assert not is_variational(vae)
    assert is_variational(PatchAutoencoderKL(block_out_channels=(8, 8)))


@pytest.mark.parametrize(("activation", "low", "high"), [("relu", 0.0, math.inf), ("sigmoid", 0.0, 1.0)])
def test_sparse_latents_are_in_their_range_and_nothing_else_changes(activation: str, low: float, high: float) -> None:
    torch.manual_seed(0)
    plain = PatchAutoencoderKL(block_out_channels=(8, 8))
    sparse = PatchAutoencoderKL(block_out_channels=(8, 8), latent_activation=activation)
    sparse.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 16, 16)
    wanted, found = (v.encode(images).latent_dist for v in (plain, sparse))
    assert ((found.mean >= low) & (found.mean <= high)).all()
    expected = wanted.mean.clamp(min=0) if activation == "relu" else 1 / (1 + torch.exp(-wanted.mean))
    torch.testing.assert_close(found.mean, expected)
    assert torch.equal(found.logvar, wanted.logvar)
    with pytest.raises(ValueError, match="latent_activation swish"):
        PatchAutoencoderKL(latent_activation="swish")


def test_an_image_of_the_strides_side_is_one_vector() -> None:
    vae = PatchAutoencoderKL(latent_channels=5, block_out_channels=(8, 8), pool=4)
    assert stride_of(vae) == 32
    latents = vae.encode(torch.rand(2, 3, 32, 32)).latent_dist.mean
    assert latents.shape == (2, 5, 1, 1)
    assert vae.decode(latents).sample.shape == (2, 3, 32, 32)


def test_a_noise_level_counts_where_it_is_told_and_an_unknown_one_is_none() -> None:
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(block_out_channels=(8, 8), noise_level=50.0)
    images = torch.rand(3, 3, 16, 16)
    none = vae.encode(images).latent_dist.mean
    level = torch.tensor([-1.0, 0.0, 30.0])
    assert torch.equal(
        vae.encode(images, noise_level=level).latent_dist.mean, none
    )  # until it has learnt what it means
    torch.nn.init.normal_(vae.encoder.level.weight)
    mixed = vae.encode(images, noise_level=level).latent_dist.mean
    torch.testing.assert_close(mixed[0], none[0])
    assert (mixed[1] - none[1]).abs().max() > 1e-3  # no noise is something to know, too
    assert (mixed[2] - none[2]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="takes no noise level"):
        PatchAutoencoderKL(block_out_channels=(8, 8)).encode(images, noise_level=torch.zeros(3))


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_a_saved_model_loads_with_equal_output(channels: int, tmp_path: Path) -> None:
    vae = PatchAutoencoderKL(in_channels=channels, latents_mean=(0.5,) * 4, latents_std=(2.0,) * 4).eval()
    vae.save_pretrained(tmp_path / "vae")
    assert [p.name for p in tmp_path.rglob("*.bin")] == []
    images = torch.rand(2, channels, 32, 48) * 2 - 1
    for path in (tmp_path, tmp_path / "vae"):  # a run directory, or the model's folder
        again = load_autoencoder(str(path))
        assert isinstance(again, PatchAutoencoderKL)
        assert torch.equal(again(images).sample, vae(images).sample)
        assert tuple(again.config.latents_std) == (2.0,) * 4


def test_any_diffusers_autoencoder_loads_and_reconstructs_any_size(tmp_path: Path) -> None:
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    for name, vae in {"kl": tiny_kl(), "tiny": tiny}.items():
        vae.save_pretrained(tmp_path / name)
        loaded = load_autoencoder(str(tmp_path / name))
        images = torch.rand(1, 3, 21, 34) * 2 - 1
        assert reconstruct(loaded, images).shape == images.shape
        whole = images[..., :20, :32]
        encoded = vae.eval().encode(whole)
        mean = encoded.latent_dist.mean if name == "kl" else encoded.latents
        assert torch.allclose(reconstruct(loaded, whole), vae.decode(mean).sample, atol=1e-6)
        assert last_layer(loaded).shape[0] == 3
        assert stride_of(loaded) == 2
        assert encode_moments(loaded, whole).shape[1] == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such model"),
        (lambda path: path.mkdir(), "no readable config.json"),
        (lambda path: diffusers.UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",)).save_pretrained(path), "not an autoencoder"),
        (lambda path: (PatchAutoencoderKL().save_pretrained(path),
            (path / "diffusion_pytorch_model.safetensors").write_bytes(b"damage")), "cannot load PatchAutoencoderKL"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_one_clear_error(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "model")
    with pytest.raises(ModelError, match=message):
        load_autoencoder(str(tmp_path / "model"))


def test_a_wrong_size_or_channel_count_says_what_would_fit() -> None:
    vae = PatchAutoencoderKL(block_out_channels=(8, 8))
    with pytest.raises(ValueError, match="image size 250x64 is not a multiple of 8: try 248x64"):
        vae.encode(torch.zeros(1, 3, 250, 64))
    with pytest.raises(ValueError, match="images have 1 channels, the model takes 3"):
        vae.encode(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match="same length"):
        PatchAutoencoderKL(block_out_channels=(8, 8, 8))
    with pytest.raises(ValueError, match="power of two"):
        PatchAutoencoderKL(patch_size=3)
    with pytest.raises(ValueError, match="must be odd"):
        PatchAutoencoderKL(stem_kernel_size=2)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(block_out_channels=(8, 16))
    images = torch.rand(2, 3, 32, 32) * 2 - 1

    calls = []
    for module in vae.modules():
        for block in module.blocks if isinstance(module, Stage) else []:
            block.register_forward_pre_hook(lambda *_: calls.append("forward"))

    def gradients() -> list[torch.Tensor]:
        vae.zero_grad()
        vae(images).sample.square().mean().backward()
        return [p.grad.clone() for p in vae.parameters() if p.grad is not None]

    plain, once = gradients(), len(calls)
    vae.enable_gradient_checkpointing()
    assert vae.is_gradient_checkpointing
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.equal(a, b)
    assert len(calls) == once + 2 * once > 0  # computed again in the backward pass


def test_a_compiled_model_gives_the_same_reconstruction() -> None:
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(block_out_channels=(8, 8)).eval()
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        plain = vae(images).sample
        vae.compile_repeated_blocks()
        assert any(module._compiled_call_impl is not None for module in vae.modules())
        assert torch.allclose(vae(images).sample, plain, atol=1e-5)
