"""Gradient truth: which term reaches which network, and that splitting a batch changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from diffusers.training_utils import EMAModel

from ldm_vae.data.loader import Batch
from ldm_vae.data.order import Stream, noise_at
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.discriminator import PatchDiscriminator
from ldm_vae.models.interface import last_layer
from ldm_vae.objectives import losses
from ldm_vae.objectives.autoencoding import TrainableVAE
from ldm_vae.objectives.perceptual import LPIPSLoss
from ldm_vae.objectives.vae import (
    VAEConfig,
    VAEState,
    discriminator_step,
    generator_step,
    latent_noise_at,
    reduction_at,
    vae_step,
)

RATES = {"vae": 1e-4, "discriminator": 1e-4}
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
NOISE = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def make_state(config: VAEConfig, spectral_norm: bool = False) -> VAEState:
    torch.manual_seed(0)
    bare = TrainableVAE(PatchAutoencoderKL(block_out_channels=(8, 16)))
    discriminator = PatchDiscriminator(base_channels=8, spectral_norm=spectral_norm)
    lpips = LPIPSLoss("squeeze", pretrained=False) if config.perceptual != "none" else None
    trained = [p for p in bare.parameters() if p.requires_grad]
    optimizers = {
        "vae": torch.optim.AdamW(trained, weight_decay=0.0),
        "discriminator": torch.optim.AdamW(discriminator.parameters(), weight_decay=0.0),
    }
    return VAEState(
        network=bare,
        discriminator=discriminator,
        perceptual=lpips,
        ema=EMAModel(bare.vae.parameters(), decay=0.9),
        optimizers=optimizers,
        adaptive_weight=torch.tensor(0.7),
        bare=bare,
    )


def micro_batches(images: torch.Tensor, count: int) -> Iterator[Batch]:
    for images_part, positions in zip(images.chunk(count), torch.arange(len(images)).chunk(count), strict=True):
        yield Batch(images=images_part, positions=positions.tolist(), bad_images={})


def gradient_size(module: torch.nn.Module) -> float:
    return sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None)


def test_lpips_alone_gives_the_decoder_a_gradient() -> None:
    config = VAEConfig(perceptual="random", kl_weight=0.0)
    state = make_state(config)
    done = generator_step(IMAGES, NOISE, state, config, adversarial=False, first=True, accelerator=Accelerator())
    done.terms["lpips_random"].backward()
    assert gradient_size(state.bare.vae.decoder) > 0
    assert gradient_size(state.bare.vae.encoder) > 0


def test_reduced_latents_must_decode_to_the_image_reduced_alike() -> None:
    config = VAEConfig(perceptual="none", adversarial="none", kl_weight=0.0, resolution=32, scale_equivariance=1.0)
    state = make_state(config)
    assert {reduction_at(config, step) for step in range(20)} == {0.5, 0.75}
    step = next(step for step in range(20) if reduction_at(config, step) == 0.5)
    done = generator_step(
        IMAGES, NOISE, state, config, adversarial=False, first=True, accelerator=Accelerator(), step=step
    )
    posterior = state.bare.vae.encode(IMAGES).latent_dist
    half = {"size": (2, 2), "mode": "bilinear", "antialias": True}
    latents = torch.nn.functional.interpolate(posterior.mean + posterior.std * NOISE, **half)
    images = torch.nn.functional.interpolate(IMAGES, **half | {"size": (16, 16)})
    assert torch.equal(done.images, images)
    assert done.terms["l1"].item() == pytest.approx(
        (state.bare.vae.decode(latents).sample - images).abs().mean().item()
    )


def test_the_decoder_is_given_latents_with_noise_of_their_own_scale() -> None:
    config = VAEConfig(perceptual="none", adversarial="none", kl_weight=0.0, train="robust-decoder")
    levels = [latent_noise_at(config, step) for step in range(1000)]
    assert min(levels) < 0.01
    assert 0.24 < max(levels) <= 0.25
    assert sum(levels) / 1000 == pytest.approx(0.125, abs=0.01)
    state = make_state(config)
    state.bare.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[0.5, 1.0, 2.0, 4.0])
    done = generator_step(IMAGES, NOISE, state, config, adversarial=False, first=True, accelerator=Accelerator())
    posterior = state.bare.vae.encode(IMAGES).latent_dist
    std = posterior.std + levels[0] * torch.tensor([0.5, 1.0, 2.0, 4.0]).view(1, 4, 1, 1)
    reconstruction = state.bare.vae.decode(posterior.mean + std * NOISE).sample
    assert done.terms["l1"].item() == pytest.approx((reconstruction - IMAGES).abs().mean().item())


def test_latents_are_reduced_as_often_as_asked_and_no_further_than_the_losses_can_judge() -> None:
    config = VAEConfig(perceptual="none", adversarial="none", resolution=64, scale_equivariance=0.4)
    drawn = [reduction_at(config, step) for step in range(1000)]
    assert drawn.count(1.0) == pytest.approx(600, abs=50)
    judged = replace(config, adversarial="hinge", resolution=40)  # the discriminator needs 24
    assert {reduction_at(judged, step) for step in range(100)} == {1.0, 0.75}
    for never in (
        replace(config, train="decoder"),
        replace(judged, resolution=24),
        replace(config, scale_equivariance=0),
    ):
        assert {reduction_at(never, step) for step in range(100)} == {1.0}


def test_each_term_is_weighed() -> None:
    config = VAEConfig(perceptual="random", perceptual_weight=0.3, kl_weight=0.02)
    state = make_state(config)
    done = generator_step(IMAGES, NOISE, state, config, adversarial=False, first=True, accelerator=Accelerator())
    assert state.perceptual is not None
    expected = {
        "l1": (done.reconstruction - IMAGES).abs().mean(),
        "lpips_random": 0.3 * state.perceptual(done.reconstruction, IMAGES),
        "kl": 0.02 * done.nats_per_pixel,
    }
    assert done.terms.keys() == expected.keys()
    for name, value in expected.items():
        assert done.terms[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_gradients_are_clipped_to_the_norm_that_was_given() -> None:
    config = VAEConfig(perceptual="random", disc_start=0, max_grad_norm=1e-3)
    state = make_state(config)
    assert state.discriminator is not None
    networks = {"vae": state.bare, "discriminator": state.discriminator}
    state.optimizers = {
        name: torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 1.0)
        for name, network in networks.items()
    }
    before = copy.deepcopy(networks)
    rates = {"vae": 1.0, "discriminator": 1.0}
    result = vae_step(micro_batches(IMAGES, 1), state, config, step=0, learning_rates=rates, accelerator=Accelerator())
    for name, network in networks.items():
        assert result.terms[f"{name}_grad_norm"] > 0.01  # as it was
        pairs = zip(network.parameters(), before[name].parameters(), strict=True)
        moved = torch.cat([(a - b).flatten() for a, b in pairs]).norm().item()
        assert moved == pytest.approx(1e-3, rel=1e-2), name


def test_each_network_has_no_gradient_from_the_others_step() -> None:
    config = VAEConfig(perceptual="random")
    state = make_state(config)
    assert state.discriminator is not None
    done = generator_step(IMAGES, NOISE, state, config, adversarial=True, first=True, accelerator=Accelerator())
    sum(done.terms.values()).backward()
    assert gradient_size(state.discriminator) == 0
    assert gradient_size(state.bare.vae) > 0
    state.bare.zero_grad()
    terms = discriminator_step(IMAGES, done.reconstruction, state.discriminator, config)
    terms["discriminator"].backward()
    assert gradient_size(state.discriminator) > 0
    assert gradient_size(state.bare) == 0
    assert all(p.requires_grad for p in state.discriminator.parameters())


def test_before_disc_start_the_discriminator_is_never_called_and_nothing_is_paid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = VAEConfig(perceptual="none", disc_start=3)
    state = make_state(config)
    before = copy.deepcopy(state.discriminator.state_dict())
    calls = []
    state.discriminator.register_forward_pre_hook(lambda *_: calls.append("forward"))
    real_grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append("grad") or real_grad(*a, **k))
    accelerator = Accelerator()
    for step in range(3):
        result = vae_step(
            micro_batches(IMAGES, 1), state, config, step=step, learning_rates=RATES, accelerator=accelerator
        )
        assert "adversarial" not in result.terms
    assert calls == []
    assert all(torch.equal(before[k], v) for k, v in state.discriminator.state_dict().items())
    vae_step(micro_batches(IMAGES, 1), state, config, step=3, learning_rates=RATES, accelerator=accelerator)
    assert calls == ["forward", "grad", "forward"]
    assert not all(torch.equal(before[k], v) for k, v in state.discriminator.state_dict().items())


def test_the_adaptive_weight_averages_that_of_separate_gradients_over_the_whole_batch() -> None:
    config = VAEConfig(perceptual="random", disc_start=0, gradient_accumulation_steps=2, max_grad_norm=1e9)
    state = make_state(config)
    other = make_state(config)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    noise = torch.from_numpy(noise_at(0, [0, 1, 2, 3], (4, 4, 4), Stream.POSTERIOR))
    done = generator_step(IMAGES, noise, other, config, adversarial=True, first=True, accelerator=accelerator)
    last = last_layer(other.bare.vae)
    plain = sum(v for k, v in done.terms.items() if k != "adversarial")
    expected = losses.adaptive_weight(
        torch.autograd.grad(plain, last, retain_graph=True)[0],
        torch.autograd.grad(done.terms["adversarial"] / (0.5 * 0.7), last)[0],
    )
    vae_step(micro_batches(IMAGES, 2), state, config, step=0, learning_rates=RATES, accelerator=accelerator)
    assert state.adaptive_weight.item() == pytest.approx(0.95 * 0.7 + 0.05 * expected.item(), rel=1e-4)


def test_the_adaptive_weight_begins_as_it_was_measured_first() -> None:
    config = VAEConfig(perceptual="none", disc_start=0)
    weights = []
    for first in (0.0, 0.7):
        state = make_state(config)
        state.adaptive_weight.fill_(first)
        state.optimizers = {
            name: torch.optim.SGD(o.param_groups[0]["params"], 0.0) for name, o in state.optimizers.items()
        }
        vae_step(
            micro_batches(IMAGES, 1),
            state,
            config,
            step=0,
            learning_rates=dict.fromkeys(RATES, 0.0),
            accelerator=Accelerator(),
        )
        weights.append(state.adaptive_weight.item())
    assert weights[1] == pytest.approx(0.95 * 0.7 + 0.05 * weights[0], rel=1e-4)


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_micro_batches_give_the_update_of_the_whole_batch(spectral_norm: bool) -> None:
    states, judged = [], []
    for count in (1, 2, 4):
        config = VAEConfig(perceptual="random", disc_start=1, gradient_accumulation_steps=count, kl_weight=0.01)
        state = make_state(config, spectral_norm)
        GradientState._reset_state()
        accelerator = Accelerator(gradient_accumulation_steps=count)
        for step in range(5):
            images = IMAGES.roll(step, dims=2)
            result = vae_step(
                micro_batches(images, count), state, config, step=step, learning_rates=RATES, accelerator=accelerator
            )
        states.append(state)
        judged.append(result.terms)
    for terms in judged[1:]:
        for name, value in judged[0].items():
            assert terms[name].item() == pytest.approx(value.item(), rel=2e-4, abs=1e-6), name
    for state in states[1:]:
        for network, reference in ((state.bare, states[0].bare), (state.discriminator, states[0].discriminator)):
            for a, b in zip(network.state_dict().values(), reference.state_dict().values(), strict=True):
                assert (a - b).abs().max() < 1e-5


def test_ema_equals_its_formula_in_double_precision() -> None:
    config = VAEConfig(perceptual="none", adversarial="none")
    state = make_state(config)
    accelerator = Accelerator()
    shadow = [p.detach().double().clone() for p in state.bare.vae.parameters()]
    for step in range(20):
        vae_step(micro_batches(IMAGES, 1), state, config, step=step, learning_rates=RATES, accelerator=accelerator)
        decay = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        for s, p in zip(shadow, state.bare.vae.parameters(), strict=True):
            s.mul_(decay).add_(p.detach().double(), alpha=1 - decay)
    for s, p in zip(shadow, state.ema.shadow_params, strict=True):
        assert p.dtype == torch.float32
        assert (s - p.double()).abs().max() < 1e-6


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(poison: float) -> None:
    config = VAEConfig(perceptual="none", disc_start=0)
    state = make_state(config)
    accelerator = Accelerator()
    networks = {"vae": state.bare, "discriminator": state.discriminator}
    before = {k: copy.deepcopy(v.state_dict()) for k, v in networks.items()}
    images = IMAGES.clone()
    images[2, 1, 3, 3] = poison
    result = vae_step(micro_batches(images, 1), state, config, step=0, learning_rates=RATES, accelerator=accelerator)
    assert not result.healthy
    for name, network in networks.items():
        assert all(torch.equal(before[name][k], v) for k, v in network.state_dict().items())
        assert gradient_size(network) == 0
    assert state.adaptive_weight.item() == pytest.approx(0.7)
    assert vae_step(
        micro_batches(IMAGES, 1), state, config, step=1, learning_rates=RATES, accelerator=accelerator
    ).healthy


@pytest.mark.parametrize(("accuracy", "trains"), [(0.74, True), (0.76, False)])
def test_a_discriminator_that_wins_waits_and_its_accuracy_is_averaged(accuracy: float, trains: bool) -> None:
    config = VAEConfig(perceptual="none", disc_start=0)
    state = make_state(config)
    state.accuracy.fill_(accuracy)
    assert state.discriminator is not None
    before = copy.deepcopy(state.discriminator.state_dict())
    vae = copy.deepcopy(state.bare.state_dict())
    result = vae_step(micro_batches(IMAGES, 1), state, config, step=0, learning_rates=RATES, accelerator=Accelerator())
    same = [torch.equal(before[name], value) for name, value in state.discriminator.state_dict().items()]
    assert all(same) != trains
    assert not all(torch.equal(vae[name], value) for name, value in state.bare.state_dict().items())
    now = result.terms["discriminator_accuracy"].item()
    assert state.accuracy.item() == pytest.approx(0.9 * accuracy + 0.1 * now, abs=1e-5)
