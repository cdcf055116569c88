"""Gradient truth: which term reaches which network, and that splitting a batch changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator

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
from ldm_vae.models.prior import CausalPrior
from ldm_vae.objectives import losses
from ldm_vae.objectives.autoencoding import (
    STEERING,
    Objective,
    State,
    TrainableVAE,
    discriminator_step,
    generator_step,
    qualities_at,
    steering,
    train_step,
)
from ldm_vae.objectives.perceptual import PerceptualLoss

RATES = {"vae": 1e-4, "discriminator": 1e-4}
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
NOISE = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
QUALITY = torch.ones(4)


def make_state(objective: Objective, spectral_norm: bool = False) -> State:
    torch.manual_seed(0)
    bare = TrainableVAE(PatchAutoencoderKL(block_out_channels=(8, 16)), objective.learned_logvar)
    discriminator = PatchDiscriminator(base_channels=8, spectral_norm=spectral_norm)
    lpips = PerceptualLoss("squeeze", pretrained=False) if objective.perceptual != "none" else None
    trained = [p for p in bare.parameters() if p.requires_grad]
    optimizers = {
        "vae": torch.optim.AdamW(trained, weight_decay=0.0),
        "discriminator": torch.optim.AdamW(discriminator.parameters(), weight_decay=0.0),
    }
    return State(
        vae=bare,
        discriminator=discriminator,
        lpips=lpips,
        ema=EMAModel(bare.vae.parameters(), decay=0.9),
        optimizers=optimizers,
        adaptive_weight=torch.tensor(0.7),
        kl_weight=torch.tensor(objective.kl_weight),
        bare=bare,
    )


def micro_batches(images: torch.Tensor, count: int) -> Iterator[Batch]:
    for images_part, positions in zip(images.chunk(count), torch.arange(len(images)).chunk(count), strict=True):
        yield Batch(images=images_part, positions=positions.tolist(), bad_images={})


def gradient_size(module: torch.nn.Module) -> float:
    return sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None)


def test_lpips_alone_gives_the_decoder_a_gradient() -> None:
    objective = Objective(perceptual="random", kl_weight=0.0)
    state = make_state(objective)
    done = generator_step(
        IMAGES, NOISE, QUALITY, state, objective, adversarial=False, first=True, accelerator=Accelerator()
    )
    done.terms["lpips_random"].backward()
    assert gradient_size(state.bare.vae.decoder) > 0
    assert gradient_size(state.bare.vae.encoder) > 0


def test_errors_are_weighed_and_divided_by_the_learned_variance() -> None:
    objective = Objective(perceptual="random", lpips_weight=0.3, learned_logvar=True, kl_weight=0.02)
    state = make_state(objective)
    with torch.no_grad():
        state.bare.logvar.fill_(0.7)
    done = generator_step(
        IMAGES, NOISE, QUALITY, state, objective, adversarial=False, first=True, accelerator=Accelerator()
    )
    assert state.lpips is not None
    expected = {
        "l1": (done.reconstruction - IMAGES).abs().mean() / math.exp(0.7),
        "lpips_random": 0.3 * state.lpips(done.reconstruction, IMAGES) / math.exp(0.7),
        "logvar": torch.tensor(0.7),
        "kl": 0.02 * done.nats_per_pixel,
    }
    assert done.terms.keys() == expected.keys()
    for name, value in expected.items():
        assert done.terms[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_gradients_are_clipped_to_the_norm_that_was_given() -> None:
    objective = Objective(perceptual="random", disc_start=0, max_grad_norm=1e-3)
    state = make_state(objective)
    assert state.discriminator is not None
    networks = {"vae": state.bare, "discriminator": state.discriminator}
    state.optimizers = {
        name: torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 1.0)
        for name, network in networks.items()
    }
    before = copy.deepcopy(networks)
    rates = {"vae": 1.0, "discriminator": 1.0}
    result = train_step(
        micro_batches(IMAGES, 1), state, objective, step=0, learning_rates=rates, accelerator=Accelerator()
    )
    for name, network in networks.items():
        assert result.terms[f"{name}_grad_norm"] > 0.01  # as it was
        pairs = zip(network.parameters(), before[name].parameters(), strict=True)
        moved = torch.cat([(a - b).flatten() for a, b in pairs]).norm().item()
        assert moved == pytest.approx(1e-3, rel=1e-2), name


def test_each_network_has_no_gradient_from_the_others_step() -> None:
    objective = Objective(perceptual="random")
    state = make_state(objective)
    assert state.discriminator is not None
    done = generator_step(
        IMAGES, NOISE, QUALITY, state, objective, adversarial=True, first=True, accelerator=Accelerator()
    )
    sum(done.terms.values()).backward()
    assert gradient_size(state.discriminator) == 0
    assert gradient_size(state.bare.vae) > 0
    state.bare.zero_grad()
    loss, _ = discriminator_step(IMAGES, done.reconstruction, state.discriminator, objective)
    loss.backward()
    assert gradient_size(state.discriminator) > 0
    assert gradient_size(state.bare) == 0
    assert all(p.requires_grad for p in state.discriminator.parameters())


def test_before_disc_start_the_discriminator_is_never_called_and_nothing_is_paid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective = Objective(perceptual="none", disc_start=3)
    state = make_state(objective)
    before = copy.deepcopy(state.discriminator.state_dict())
    calls = []
    state.discriminator.register_forward_pre_hook(lambda *_: calls.append("forward"))
    real_grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append("grad") or real_grad(*a, **k))
    accelerator = Accelerator()
    for step in range(3):
        result = train_step(
            micro_batches(IMAGES, 1), state, objective, step=step, learning_rates=RATES, accelerator=accelerator
        )
        assert "adversarial" not in result.terms
    assert calls == []
    assert all(torch.equal(before[k], v) for k, v in state.discriminator.state_dict().items())
    train_step(micro_batches(IMAGES, 1), state, objective, step=3, learning_rates=RATES, accelerator=accelerator)
    assert calls == ["forward", "grad", "forward"]
    assert not all(torch.equal(before[k], v) for k, v in state.discriminator.state_dict().items())


def test_the_adaptive_weight_is_that_of_separate_gradients_over_the_whole_batch() -> None:
    objective = Objective(perceptual="random", disc_start=0, gradient_accumulation_steps=2, max_grad_norm=1e9)
    state = make_state(objective)
    other = make_state(objective)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    noise = torch.from_numpy(noise_at(0, [0, 1, 2, 3], (4, 4, 4), Stream.POSTERIOR))
    done = generator_step(
        IMAGES, noise, QUALITY, other, objective, adversarial=True, first=True, accelerator=accelerator
    )
    last = last_layer(other.bare.vae)
    plain = sum(v for k, v in done.terms.items() if k != "adversarial")
    expected = losses.adaptive_weight(
        torch.autograd.grad(plain, last, retain_graph=True)[0],
        torch.autograd.grad(done.terms["adversarial"] / (0.5 * 0.7), last)[0],
    )
    train_step(micro_batches(IMAGES, 2), state, objective, step=0, learning_rates=RATES, accelerator=accelerator)
    assert state.adaptive_weight.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_micro_batches_give_the_update_of_the_whole_batch(spectral_norm: bool) -> None:
    states, judged = [], []
    for count in (1, 2, 4):
        objective = Objective(
            perceptual="random", disc_start=1, gradient_accumulation_steps=count, learned_logvar=True, kl_weight=0.01
        )
        state = make_state(objective, spectral_norm)
        GradientState._reset_state()
        accelerator = Accelerator(gradient_accumulation_steps=count)
        for step in range(5):
            images = IMAGES.roll(step, dims=2)
            result = train_step(
                micro_batches(images, count), state, objective, step=step, learning_rates=RATES, accelerator=accelerator
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
    assert states[0].bare.logvar.item() != 0


def test_ema_equals_its_formula_in_double_precision() -> None:
    objective = Objective(perceptual="none", adversarial="none")
    state = make_state(objective)
    accelerator = Accelerator()
    shadow = [p.detach().double().clone() for p in state.bare.vae.parameters()]
    for step in range(20):
        train_step(micro_batches(IMAGES, 1), state, objective, step=step, learning_rates=RATES, accelerator=accelerator)
        decay = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        for s, p in zip(shadow, state.bare.vae.parameters(), strict=True):
            s.mul_(decay).add_(p.detach().double(), alpha=1 - decay)
    for s, p in zip(shadow, state.ema.shadow_params, strict=True):
        assert p.dtype == torch.float32
        assert (s - p.double()).abs().max() < 1e-6


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(poison: float) -> None:
    objective = Objective(perceptual="none", disc_start=0)
    state = make_state(objective)
    accelerator = Accelerator()
    networks = {"vae": state.bare, "discriminator": state.discriminator}
    before = {k: copy.deepcopy(v.state_dict()) for k, v in networks.items()}
    images = IMAGES.clone()
    images[2, 1, 3, 3] = poison
    result = train_step(
        micro_batches(images, 1), state, objective, step=0, learning_rates=RATES, accelerator=accelerator
    )
    assert not result.healthy
    for name, network in networks.items():
        assert all(torch.equal(before[name][k], v) for k, v in network.state_dict().items())
        assert gradient_size(network) == 0
    assert state.adaptive_weight.item() == pytest.approx(0.7)
    assert train_step(
        micro_batches(IMAGES, 1), state, objective, step=1, learning_rates=RATES, accelerator=accelerator
    ).healthy


def codec_state(objective: Objective) -> State:
    state = make_state(objective)
    torch.manual_seed(0)
    bare = TrainableVAE(PatchAutoencoderKL(block_out_channels=(8, 16)), False, CausalPrior(4))
    trained = [p for p in bare.parameters() if p.requires_grad]
    optimizers = {"vae": torch.optim.AdamW(trained, weight_decay=0.0)}
    ema = EMAModel(bare.vae.parameters(), decay=0.9)
    return dataclasses.replace(state, vae=bare, bare=bare, discriminator=None, optimizers=optimizers, ema=ema)


CODEC = Objective(perceptual="none", adversarial="none", reconstruction="l2", prior="causal", kl_weight=0.01)


def test_the_codecs_deviation_is_that_of_a_step_of_one_whatever_the_image() -> None:
    state = codec_state(CODEC)
    _, moments, _, nats = state.vae(IMAGES, NOISE, torch.ones(len(IMAGES)))
    _, logvar = moments.chunk(2, dim=1)
    assert torch.allclose(logvar, torch.tensor(1 / 12).log())
    assert nats.shape == (4,)
    before = state.bare.vae.encoder.conv_out.weight[4:].clone()
    for step in range(3):
        train_step(
            micro_batches(IMAGES, 1),
            state,
            CODEC,
            step=step,
            learning_rates=RATES | {"vae": 0.1},
            accelerator=Accelerator(),
        )
    assert torch.equal(state.bare.vae.encoder.conv_out.weight[4:], before)
    assert (before == 0).all()


def test_the_codecs_deviation_is_fixed_whatever_a_linear_path_was_trained_to_say_of_it() -> None:
    vae = PatchAutoencoderKL(latent_channels=4, block_out_channels=(8, 8), linear_path=True)
    torch.nn.init.normal_(vae.encoder.linear.conv.weight)
    TrainableVAE(vae, False, CausalPrior(4))
    logvar = vae.encode(IMAGES).latent_dist.logvar
    assert torch.allclose(logvar, torch.tensor(1 / 12).log())


def test_the_codecs_rate_is_that_of_its_prior_for_the_noisy_latents() -> None:
    state = codec_state(CODEC)
    quality = torch.tensor([0.5, 1.0, 2.0, 4.0])
    _, moments, _, nats = state.vae(IMAGES, NOISE, quality)
    step = quality[:, None, None, None]
    uniform = torch.special.ndtr(NOISE) - 0.5
    values = moments[:, :4] / step + uniform
    expected = state.bare.prior(values, quality).sum(dim=(1, 2, 3)) / 32**2
    assert torch.allclose(nats, expected, rtol=1e-4)


def test_the_codecs_decoder_sees_rounded_latents_and_its_gradient_goes_past_the_rounding() -> None:
    state = codec_state(CODEC)
    quality = torch.tensor([0.5, 1.0, 2.0, 4.0])
    step = quality[:, None, None, None]
    reconstruction, moments, _, _ = state.vae(IMAGES, NOISE, quality)
    rounded = ((moments[:, :4] / step).round() * step).detach().requires_grad_()
    expected = state.bare.vae.decode(rounded).sample
    assert torch.allclose(reconstruction, expected, atol=1e-6)
    (through,) = torch.autograd.grad(reconstruction.square().sum(), moments)
    (direct,) = torch.autograd.grad(expected.square().sum(), rounded)
    assert torch.allclose(through[:, :4], direct, atol=1e-5)
    assert direct.abs().sum() > 0


def test_coarse_errors_are_weighed_as_the_fine_ones_are() -> None:
    config = dataclasses.replace(CODEC, coarse_weight=0.3)
    state = codec_state(config)
    quality = torch.tensor([0.5, 1.0, 2.0, 4.0])
    step = generator_step(
        IMAGES, NOISE, quality, state, config, adversarial=False, first=True, accelerator=Accelerator()
    )
    assert torch.allclose(
        step.terms["coarse"], 0.3 * losses.coarse_loss(step.reconstruction, IMAGES, "l2", 1 / quality)
    )
    assert state.bare.vae.encoder.conv_out.weight.grad is None
    step.terms["coarse"].backward()
    assert float(state.bare.vae.encoder.conv_out.weight.grad[:4].abs().sum()) > 0


def test_the_rates_weight_is_steered_to_its_target() -> None:
    for target, sign in ((1e-3, 1), (1e3, -1)):
        objective = dataclasses.replace(CODEC, target_bpp=target)
        state = codec_state(objective)
        for step in range(3):
            train_step(
                micro_batches(IMAGES, 1), state, objective, step=step, learning_rates=RATES, accelerator=Accelerator()
            )
        assert float(state.kl_weight) == pytest.approx(0.01 * math.exp(sign * 3 * STEERING))
    assert float(steering(torch.tensor(0.3), 0.3)) == 1


def test_a_codecs_step_does_not_depend_on_how_its_batch_is_split() -> None:
    results = []
    for count in (1, 2, 4):
        GradientState._reset_state()
        objective = dataclasses.replace(CODEC, gradient_accumulation_steps=count, target_bpp=0.1)
        state = codec_state(objective)
        accelerator = Accelerator(gradient_accumulation_steps=count)
        for step in range(2):
            train_step(
                micro_batches(IMAGES, count), state, objective, step=step, learning_rates=RATES, accelerator=accelerator
            )
        results.append((state.kl_weight.clone(), [p.detach().clone() for p in state.bare.parameters()]))
    for weight, parameters in results[1:]:
        assert float(weight) == pytest.approx(float(results[0][0]), rel=1e-6)
        for a, b in zip(parameters, results[0][1], strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_qualities_are_log_uniform_and_belong_to_positions() -> None:
    objective = dataclasses.replace(CODEC, quality_range=(0.5, 4.0))
    found = qualities_at(list(range(4000)), objective)
    assert found.min() >= 0.5
    assert found.max() <= 4
    assert float(found.log2().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(qualities_at([7, 5], objective), found[[7, 5]])
    assert (qualities_at([1, 2], Objective()) == 1).all()
