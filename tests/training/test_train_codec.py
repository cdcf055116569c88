"""The codec's trainer: its step, its runs, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from diffusers.training_utils import EMAModel

from ldm_vae.codec.distortion import masked_error
from ldm_vae.data.loader import Batch
from ldm_vae.errors import ConfigError
from ldm_vae.models.autoencoder import ARCHITECTURES, PatchAutoencoderKL
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.objectives import autoencoding
from ldm_vae.objectives.rate import STEERING, TrainableCodec, steering
from ldm_vae.runs.config import parse_config
from tests.processes import flags, kill_at, metrics, run_until_killed, state
from training.train_codec import PRESETS, CodecState, Config, codec_step, codec_terms, main

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
NOISE = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
STEPS = torch.tensor([0.5, 1.0, 2.0, 4.0])
CONFIG = Config(rate_weight=0.01)


def make_state(config: Config) -> CodecState:
    torch.manual_seed(0)
    bare = TrainableCodec(PatchAutoencoderKL(block_out_channels=(8, 16)))
    return CodecState(
        network=bare,
        bare=bare,
        ema=EMAModel(bare.vae.parameters(), decay=0.9),
        optimizers={"vae": torch.optim.AdamW(bare.parameters(), weight_decay=0.0)},
        rate_weight=torch.tensor(config.rate_weight),
    )


def micro_batches(count: int) -> Iterator[Batch]:
    for images, positions in zip(IMAGES.chunk(count), torch.arange(len(IMAGES)).chunk(count), strict=True):
        yield Batch(images=images, positions=positions.tolist(), bad_images={})


def test_the_deviation_is_that_of_a_step_of_one_whatever_the_image_and_stays_so() -> None:
    state = make_state(CONFIG)
    logvar = state.bare(IMAGES, NOISE, STEPS)[1].chunk(2, dim=1)[1]
    assert torch.allclose(logvar, torch.tensor(1 / 12).log())
    before = state.bare.vae.encoder.conv_out.weight[4:].clone()
    for _ in range(3):
        codec_step(micro_batches(1), state, CONFIG, learning_rate=0.1, accelerator=Accelerator())
    assert torch.equal(state.bare.vae.encoder.conv_out.weight[4:], before)
    assert (before == 0).all()


def test_errors_are_divided_by_the_step_and_rates_multiplied_with_it() -> None:
    state = make_state(CONFIG)
    reconstruction, _, nats = state.bare(IMAGES, NOISE, STEPS)
    terms = codec_terms(IMAGES, reconstruction, nats, STEPS, torch.tensor(0.01), CONFIG)
    errors = (reconstruction - IMAGES).square().mean(dim=(1, 2, 3))
    assert terms["l2"].item() == pytest.approx((errors / STEPS).mean().item(), rel=1e-5)
    assert terms["rate"].item() == pytest.approx(0.01 * (nats * STEPS).mean().item(), rel=1e-5)
    assert state.bare.vae.encoder.conv_out.weight.grad is None
    terms = codec_terms(IMAGES, reconstruction, nats, STEPS, torch.tensor(0.01), replace(CONFIG, tune="visual"))
    assert torch.allclose(terms["masked"], masked_error(reconstruction, IMAGES, 1 / STEPS))
    terms["masked"].backward()
    assert float(state.bare.vae.encoder.conv_out.weight.grad[:4].abs().sum()) > 0


def test_the_rates_weight_is_steered_to_its_target() -> None:
    for target, sign in ((1e-3, 1), (1e3, -1)):
        config = replace(CONFIG, target_bpp=target)
        state = make_state(config)
        for _ in range(3):
            codec_step(micro_batches(1), state, config, learning_rate=1e-4, accelerator=Accelerator())
        assert float(state.rate_weight) == pytest.approx(0.01 * math.exp(sign * 3 * STEERING))


def test_a_step_does_not_depend_on_how_its_batch_is_split() -> None:
    results = []
    for count in (1, 2, 4):
        GradientState._reset_state()
        config = replace(CONFIG, gradient_accumulation_steps=count, target_bpp=0.1)
        state = make_state(config)
        accelerator = Accelerator(gradient_accumulation_steps=count)
        for _ in range(2):
            codec_step(micro_batches(count), state, config, learning_rate=1e-4, accelerator=accelerator)
        results.append((state.rate_weight.clone(), [p.detach().clone() for p in state.bare.parameters()]))
    for weight, parameters in results[1:]:
        assert float(weight) == pytest.approx(float(results[0][0]), rel=1e-6)
        for a, b in zip(parameters, results[0][1], strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def config_for(preset: str, output: Path, **changes: Any) -> Config:
    small = {"data": ("procedural:dead-leaves",), "output": output, "resolution": 32, "batch_size": 4, "steps": 3}
    quiet = {"num_workers": 0, "log_every": 1, "sample_every": 1000, "checkpoint_every": 1, "tracker": "none"}
    return replace(PRESETS[preset][1], **small | quiet | {"warmup_steps": 1, "mixed_precision": "no"} | changes)


def killed_in_the_third_step(config: Config) -> None:
    kill_at(3, autoencoding, "noise_at")
    main(config)


def test_a_run_logs_its_rate_resumes_and_is_where_another_tuning_starts(tmp_path: Path) -> None:
    config = config_for("f8c32", tmp_path / "first", latent_channels=8, sample_every=3)
    main(replace(config, output=tmp_path / "whole"))
    run_until_killed(killed_in_the_third_step, config)
    main(config)
    first, whole = (state(tmp_path / name, 3) for name in ("first", "whole"))
    assert all(torch.equal(first[name], whole[name]) for name in whole)
    lines = [m for m in metrics(config.output) if "rate" in m]
    assert [m["step"] for m in lines] == [1, 2, 3]
    assert lines[0]["rate_weight"] == pytest.approx(0.02)  # each line has the weight of its own step
    factor = float(steering(torch.tensor(lines[0]["bits_per_pixel"]), 0.5))
    assert lines[1]["rate_weight"] == pytest.approx(0.02 * factor, rel=1e-6)
    assert factor > 1
    assert not any(name.startswith("kl") for name in lines[0])
    vae = load_autoencoder(str(config.output))
    assert vae.config.latent_channels == 8
    assert tuple(vae.config.block_out_channels) == ARCHITECTURES["f8c32"]["block_out_channels"]
    files = next(m for m in metrics(config.output) if "file_psnr_1.4" in m)
    assert files["step"] == 3
    rates, psnrs = ([files[f"file_{name}_{q}"] for q in ("0.5", "1.4", "4")] for name in ("bits_per_pixel", "psnr"))
    assert rates == sorted(rates, reverse=True)
    assert psnrs == sorted(psnrs, reverse=True)
    again = config_for("f8c32", tmp_path / "again", init=str(config.output), tune="visual", steps=1)
    main(again)
    assert metrics(again.output)[0]["masked"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target-bpp", "0"], "--target-bpp is 0.0: it must be more than 0"),
        (["--rate-weight", "0"], "--rate-weight is 0.0: it must be more than 0"),
        (["--step-range", "4", "0.5"], "the lower number comes first"),
        (["--step-range", "0", "4"], "--step-range is"),
        (["--tune", "visual", "--resolution", "4"], "--tune visual needs crops of 8 pixels"),
        (["--init", "{tmp}/tiny"], "tiny is not a PatchAutoencoderKL with a posterior"),
        (["--init", "{tmp}/tiny", "--latent-channels", "4"], "--latent-channels makes a new network"),
        (["--perceptual", "none"], "perceptual"),
    ],
)
def test_what_cannot_be_trained_is_said(words: list[str], message: str, tmp_path: Path) -> None:
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")
    args = ["f8c32", *flags(config_for("f8c32", tmp_path / "run", warmup_steps=100), PRESETS["f8c32"][1])]
    args += [word.format(tmp=tmp_path) for word in words]
    with pytest.raises(ConfigError, match=message):
        main(parse_config(PRESETS, description="", args=args))
