from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from PIL import Image
from torch import Tensor

from ldm_vae import sampling
from ldm_vae.errors import ModelError
from ldm_vae.latents.scaling import scale_latents, unscale_latents
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.interface import encode_moments
from ldm_vae.models.reconstruction import reconstruct
from ldm_vae.objectives.diffusion import alpha_and_sigma
from ldm_vae.pipeline import LatentDiffusionPipeline, fingerprint_of, load_pipeline
from ldm_vae.sampling import SCHEDULERS, make_scheduler, noise_levels, set_timesteps

SOLVERS = [(prediction, name) for prediction, fitting in SCHEDULERS.items() for name in fitting]
STRIDE = 4


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def patch_vae(channels: int = 3) -> PatchAutoencoderKL:
    """Stride 4, latents of four channels with a scale of their own."""
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(
        in_channels=channels,
        patch_size=2,
        block_out_channels=(8, 8),
        decoder_layers_per_block=(1, 1),
        latents_mean=(0.1, -0.2, 0.0, 0.3),
        latents_std=(0.3, 0.2, 0.25, 0.4),
    )
    return vae.eval()


def pipeline_of(
    prediction: Any = "flow", scheduler: str | None = "euler", *, num_classes: int = 3, vae: Any = None
) -> LatentDiffusionPipeline:
    vae = vae or patch_vae()
    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=(6, 4),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=num_classes + 1 if num_classes else None,
    )
    names = ["ant", "bee", "cat"] if num_classes == 3 else None
    pipeline = LatentDiffusionPipeline(vae, unet.eval(), make_scheduler(prediction, scheduler), class_names=names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def flow() -> LatentDiffusionPipeline:
    return pipeline_of()


def picture(height: int = 24, width: int = 16, *, seed: int = 0, channels: int = 3) -> Tensor:
    """Images (1, channels, height, width) in [-1, 1]."""
    coarse = torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")


def made(pipeline: LatentDiffusionPipeline, *args: Any, **options: Any) -> Tensor:
    options = {"num_inference_steps": 4, "output_type": "pt", **options}
    result: Tensor = pipeline(*args, **options).images
    return result


def shown(images: Tensor) -> Tensor:
    return (images.clamp(-1, 1) + 1) / 2


# Solvers --------------------------------------------------------------------------------------------------------------


def exact_denoiser(prediction: Any, s: float) -> Any:
    """In place of `denoiser_output`: the best output for data that is normal with deviation s."""

    def exact(_: Any, noisy: Tensor, timesteps: Tensor, labels: Any, bare: Any) -> Tensor:
        alpha, sigma = alpha_and_sigma(prediction, timesteps)
        x = noisy * alpha * s**2 / (alpha**2 * s**2 + sigma**2)
        noise = (noisy - alpha * x) / sigma
        return {"flow": noise - x, "v": alpha * noise - sigma * x, "epsilon": noise}[prediction]

    return exact


@pytest.mark.parametrize("steps", [50, 61])
@pytest.mark.parametrize(("prediction", "scheduler"), [pair for pair in SOLVERS if "sde" not in pair[1]])
def test_every_solver_takes_noise_to_gaussian_data_whose_exact_denoiser_it_is_given(
    prediction: Any, scheduler: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For data of deviation s the probability flow scales latents as the noisy data's deviation: noise * s at last.

    The denoiser goes by the timesteps that it is given, as in training, so these must be those of the sample.
    """
    s, rtol = 0.5, 0.06 if scheduler in ("euler", "ddim") else 0.005  # those two are of first order
    monkeypatch.setattr(sampling, "denoiser_output", exact_denoiser(prediction, s))
    pipeline = pipeline_of(prediction, scheduler)
    if scheduler == "ddim" and steps == 61:
        with pytest.raises(ValueError, match="divides 1000, and 61 does not: try 50 or 40, or another scheduler"):
            made(pipeline, num_inference_steps=steps)
        return
    noise = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(3))
    latents = made(pipeline, latents=noise, num_inference_steps=steps, output_type="latent")
    torch.testing.assert_close(latents, noise * s, rtol=rtol, atol=1e-3)
    image = picture()
    options: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent"}
    halfway = made(pipeline, image=shown(image), generator=5, strength=0.5, **options)
    known = pipeline.encode(image)
    start = noise_levels(pipeline.scheduler)[pipeline.scheduler.order * (steps - steps // 2)]
    own = torch.randn(1, 4, 6, 4, generator=torch.Generator().manual_seed(5))
    share = s / (start.alpha**2 * s**2 + start.sigma**2) ** 0.5
    torch.testing.assert_close(halfway, share * start.noised(known, own), rtol=rtol, atol=1e-2)


@pytest.mark.parametrize("prediction", [prediction for prediction, name in SOLVERS if "sde" in name])
def test_a_solver_of_the_sde_ends_at_the_same_data_and_forgets_its_first_noise(
    prediction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = 0.5
    monkeypatch.setattr(sampling, "denoiser_output", exact_denoiser(prediction, s))
    pipeline = pipeline_of(prediction, "sde-dpmsolver++")
    noise = torch.randn(64, 4, 6, 4, generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"generator": range(64), "num_inference_steps": 50, "output_type": "latent"}
    latents = made(pipeline, latents=noise, **options)
    assert latents.std() == pytest.approx(s, rel=0.04)  # 6,144 values: +- 0.01 by chance
    assert latents.mean() == pytest.approx(0, abs=0.02)
    assert torch.corrcoef(torch.stack([latents.flatten(), noise.flatten()]))[0, 1].abs() < 0.05
    assert torch.equal(latents, made(pipeline, latents=noise, **options))  # and has no other source of chance
    with pytest.raises(ValueError, match="frames would differ at random: set algorithm_type to dpmsolver"):
        pipeline.interpolate(1, 2)
    with pytest.raises(ValueError, match="frames would differ at random"):
        pipeline.interpolate_images(picture(), picture())


def test_an_image_of_the_pipeline_goes_back_into_it(flow: LatentDiffusionPipeline) -> None:
    images = made(flow, generator=3)
    assert images.mean() == pytest.approx(0.5, abs=0.2)
    for given in (images, images.permute(0, 2, 3, 1).numpy()):
        known = made(flow, image=given, strength=0, output_type="latent")
        torch.testing.assert_close(known, flow.encode(images * 2 - 1))


def test_solvers_that_add_noise_of_their_own_or_meet_a_time_twice_are_refused() -> None:
    pipeline = pipeline_of("v", "dpmsolver++")
    with pytest.raises(ValueError, match="1001 steps are more than the 1000 timesteps that there are"):
        made(pipeline, num_inference_steps=1001)
    euler = pipeline_of("flow", "euler")
    euler.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="stochastic_sampling to False"):
        made(euler)


@pytest.mark.parametrize(("prediction", "scheduler"), SOLVERS)
def test_noise_levels_are_what_the_scheduler_itself_adds(prediction: Any, scheduler: str) -> None:
    for index in (0, 3):
        solver = make_scheduler(prediction, scheduler)
        set_timesteps(solver, 8, torch.device("cpu"))
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(index)
        x, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        timestep = solver.timesteps[index : index + 1]
        theirs = solver.scale_noise(x, timestep, noise) if hasattr(solver, "scale_noise") else None
        theirs = solver.add_noise(x, noise, timestep) if theirs is None else theirs
        levels = noise_levels(solver)
        torch.testing.assert_close(levels[index].noised(x, noise), theirs, rtol=1e-4, atol=1e-5)
        assert abs(levels[index].time * 1000 - timestep.item()) <= 1
        if prediction == "flow":  # and not the integers that some schedulers cut it to
            assert levels[index].time == pytest.approx(levels[index].sigma)
        assert (levels[-1].time, levels[-1].alpha, levels[-1].sigma) == (0, 1, 0)


def test_a_scheduler_that_is_not_known_is_refused() -> None:
    pipeline = pipeline_of()
    pipeline.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="EulerDiscreteScheduler is not a scheduler that is known here: use one of DD"):
        made(pipeline)


# Guidance -------------------------------------------------------------------------------------------------------------


def test_guidance_of_1_is_none_and_of_0_is_no_class_and_2_is_the_formula(flow: LatentDiffusionPipeline) -> None:
    plain = made(flow, "bee", generator=1)
    assert torch.equal(made(flow, 1, generator=1, guidance_scale=1.0), plain)
    none = made(flow, generator=1)
    assert (plain - none).abs().max() > 1e-3  # classes matter
    torch.testing.assert_close(made(flow, 1, generator=1, guidance_scale=0.0), none, rtol=0, atol=1e-5)
    assert torch.equal(made(flow, generator=1, guidance_scale=5.0), none)

    latents = torch.randn(1, 4, 6, 4, generator=torch.Generator().manual_seed(1))
    for k in range(4):  # Euler's method, written out
        time = torch.tensor([1000 * (1 - k / 4)])
        with torch.no_grad():
            with_class, without = (
                flow.unet(latents, time, class_labels=torch.tensor([label])).sample for label in (1, 3)
            )
        latents = latents - 0.25 * (without + 2 * (with_class - without))
    ours = made(flow, 1, generator=1, guidance_scale=2.0, output_type="latent")
    torch.testing.assert_close(ours, latents, rtol=0, atol=1e-5)


def test_guidance_is_applied_and_paid_for_within_its_interval_alone(
    flow: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, float]] = []
    real = sampling.denoiser_output

    def count(unet: Any, noisy: Tensor, timesteps: Tensor, labels: Any, bare: Any) -> Tensor:
        passes.append((len(noisy), timesteps[0].item()))
        return real(unet, noisy, timesteps, labels, bare)

    monkeypatch.setattr(sampling, "denoiser_output", count)
    images = made(flow, [0, 2], generator=[1, 2], guidance_scale=3.0, guidance_interval=(0.4, 0.75))
    assert passes == [(2, 1000.0), (4, 750.0), (4, 500.0), (2, 250.0)]
    everywhere = made(flow, [0, 2], generator=[1, 2], guidance_scale=3.0)
    assert (images - everywhere).abs().max() > 1e-3


# Seeds and batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "scheduler"),
    [("flow", "heun"), ("flow", "sde-dpmsolver++"), ("v", "ddim"), ("epsilon", "unipc")],
)
def test_image_i_of_a_batch_of_8_is_the_one_made_alone(prediction: Any, scheduler: str) -> None:
    pipeline = pipeline_of(prediction, scheduler)
    labels = [0, 1, 2, 0, 1, 2, 0, 1]
    together = made(pipeline, labels, generator=range(10, 18), guidance_scale=2.0)
    for i in (0, 3, 7):
        alone = made(pipeline, labels[i], generator=torch.Generator().manual_seed(10 + i), guidance_scale=2.0)
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-5)
    assert (together[0] - together[3]).abs().max() > 1e-3  # same class, another seed


def test_one_generator_for_several_images_gives_each_a_seed_of_its_own(flow: LatentDiffusionPipeline) -> None:
    several = made(flow, num_images=3, generator=torch.Generator().manual_seed(4))
    assert torch.equal(several, made(flow, num_images=3, generator=torch.Generator().manual_seed(4)))
    two = made(flow, num_images=2, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(several[:2], two, rtol=0, atol=1e-5)  # another size of batch, and so other kernels
    assert (several[0] - several[1]).abs().max() > 1e-3
    torch.manual_seed(9)
    unseeded = made(flow, num_images=2)
    torch.manual_seed(9)
    assert torch.equal(made(flow, num_images=2), unseeded)


def test_images_have_the_size_asked_for_and_the_trained_one_otherwise(flow: LatentDiffusionPipeline) -> None:
    assert made(flow).shape == (1, 3, 24, 16)
    assert made(flow, height=20, width=36).shape == (1, 3, 20, 36)  # 5 x 9 latents: odd for the denoiser
    assert made(flow, width=4).shape == (1, 3, 24, 4)
    assert made(flow, latents=torch.zeros(2, 4, 3, 7)).shape == (2, 3, 12, 28)


def test_the_output_types_show_the_same_images(flow: LatentDiffusionPipeline) -> None:
    pt = made(flow, 1, generator=[1, 2])
    array = made(flow, 1, generator=[1, 2], output_type="np")
    assert array.shape == (2, 24, 16, 3)
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    pil = made(flow, 1, generator=[1, 2], output_type="pil")
    assert [p.size for p in pil] == [(16, 24)] * 2
    np.testing.assert_array_equal(np.asarray(pil[1]), (array[1] * 255).round().astype(np.uint8))
    latents = made(flow, 1, generator=[1, 2], output_type="latent")
    with torch.no_grad():
        decoded = flow.vae.decode(unscale_latents(flow.vae, latents)).sample
    torch.testing.assert_close(shown(decoded), pt, rtol=0, atol=1e-6)
    assert torch.equal(flow(1, generator=[1, 2], num_inference_steps=4, output_type="pt", return_dict=False)[0], pt)


def test_the_callback_sees_each_step_and_can_put_in_other_latents(flow: LatentDiffusionPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def zero_at_the_end(pipeline: Any, step: int, timestep: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, timestep.item()))
        assert pipeline is flow
        return {"latents": torch.zeros_like(inputs["latents"])} if step == 3 else {}

    latents = made(flow, output_type="latent", callback_on_step_end=zero_at_the_end)
    assert seen == [(0, 1000), (1, 750), (2, 500), (3, 250)]
    assert latents.abs().max() == 0
    with pytest.raises(ValueError, match="callbacks can be given latents, not"):
        made(flow, callback_on_step_end=zero_at_the_end, callback_on_step_end_tensor_inputs=["noise"])


def test_the_progress_bar_counts_the_steps_that_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = pipeline_of()
    pipeline.set_progress_bar_config(disable=False)
    made(pipeline)
    assert "4/4" in capsys.readouterr().err
    made(pipeline, image=shown(picture()), strength=0.5)
    assert "2/2" in capsys.readouterr().err


# From images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 16), (21, 30), (3, 5)])
def test_strength_0_returns_the_reconstruction(flow: LatentDiffusionPipeline, size: tuple[int, int]) -> None:
    images = picture(*size)
    with torch.no_grad():
        expected = shown(reconstruct(flow.vae, images))
    torch.testing.assert_close(made(flow, image=shown(images), strength=0), expected, rtol=0, atol=1e-5)
    heun = pipeline_of("flow", "heun", vae=flow.vae)
    torch.testing.assert_close(made(heun, image=shown(images), strength=0.0), expected, rtol=0, atol=1e-5)


def test_strength_1_forgets_the_image_and_half_is_eulers_method_from_the_middle(flow: LatentDiffusionPipeline) -> None:
    images = picture()
    torch.testing.assert_close(made(flow, 2, image=shown(images), strength=1, generator=7), made(flow, 2, generator=7))
    with torch.no_grad():
        known = scale_latents(flow.vae, encode_moments(flow.vae, images).chunk(2, dim=1)[0])
        latents = 0.5 * known + 0.5 * torch.randn(1, 4, 6, 4, generator=torch.Generator().manual_seed(7))
        for time in (500.0, 250.0):
            output = flow.unet(latents, torch.tensor([time]), class_labels=torch.tensor([2])).sample
            latents = latents - 0.25 * output
    ours = made(flow, 2, image=shown(images), strength=0.5, generator=7, output_type="latent")
    torch.testing.assert_close(ours, latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("prediction", "scheduler"), SOLVERS)
def test_inpainting_leaves_what_is_not_masked_as_the_reconstruction_has_it(prediction: Any, scheduler: str) -> None:
    pipeline = pipeline_of(prediction, scheduler)
    images = picture(22, 17)
    mask = torch.zeros(22, 17)
    mask[5:11, 3:9] = 1
    options: dict[str, Any] = {"image": shown(images), "generator": [1, 2]}
    kept = made(pipeline, strength=0, **options)
    for strength in (0.6, 1.0):
        painted = made(pipeline, mask_image=mask, strength=strength, **options)
        assert torch.equal(painted[..., mask == 0], kept[..., mask == 0])
        assert (painted - kept)[..., mask == 1].abs().max() > 0.01
        assert (painted[0] - painted[1])[..., mask == 1].abs().max() > 0.01
    assert torch.equal(made(pipeline, mask_image=torch.zeros(22, 17), **options), kept)
    two = made(pipeline, image=shown(images), mask_image=torch.stack([mask, 1 - mask])[:, None], generator=[1, 2])
    assert torch.equal(two[1][:, mask == 1], kept[1][:, mask == 1])
    everything = made(pipeline, mask_image=torch.ones(22, 17), **options)
    torch.testing.assert_close(everything, made(pipeline, **options), rtol=0, atol=1e-6)


def test_while_inpainting_the_known_latents_follow_their_noise_level(flow: LatentDiffusionPipeline) -> None:
    images = picture()
    mask = torch.zeros(24, 16, dtype=torch.bool)
    mask[9, 6] = True  # one pixel: its whole latent, (2, 1), is made anew
    known = flow.encode(images)
    noise = torch.randn(1, 4, 6, 4, generator=torch.Generator().manual_seed(2))
    kept = torch.ones(6, 4, dtype=torch.bool)
    kept[2, 1] = False

    def check(_: Any, step: int, __: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        time = 1 - (step + 1) / 4
        expected = (1 - time) * known + time * noise
        assert torch.allclose(inputs["latents"][..., kept], expected[..., kept], atol=1e-5)
        assert not torch.allclose(inputs["latents"][..., ~kept], expected[..., ~kept], atol=1e-3)
        return {}

    made(flow, image=shown(images), mask_image=mask, strength=1, generator=2, callback_on_step_end=check)


def test_images_can_be_pil_arrays_or_tensors_and_one_or_many(flow: LatentDiffusionPipeline) -> None:
    pil = Image.fromarray((shown(picture())[0].permute(1, 2, 0) * 255).round().byte().numpy())
    mask = Image.new("L", (16, 24))
    mask.paste(255, (4, 4, 12, 12))
    options: dict[str, Any] = {"strength": 0.5, "generator": [1, 2], "output_type": "np"}
    reference = made(flow, image=pil, mask_image=mask, **options)
    array = np.asarray(pil)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1) / 255
    for image in ([pil, pil], array, np.stack([array, array]), array / 255, tensor, [tensor, array]):
        for region in (mask, np.asarray(mask), np.asarray(mask) > 0, [mask, mask]):
            np.testing.assert_allclose(made(flow, image=image, mask_image=region, **options), reference, atol=1e-5)
    grey = pipeline_of(vae=patch_vae(channels=1))
    assert np.asarray(made(grey, image=pil, output_type="pil")[0]).shape == (24, 16)


def test_images_of_13_channels_go_through_as_tensors(flow: LatentDiffusionPipeline) -> None:
    many = pipeline_of(vae=patch_vae(channels=13))
    images = picture(channels=13)
    assert made(many, image=shown(images), strength=0.5).shape == (1, 13, 24, 16)
    assert made(many, output_type="np").shape == (1, 24, 16, 13)
    with pytest.raises(ValueError, match="13 channels cannot be PIL images"):
        made(many, output_type="pil")
    with pytest.raises(ValueError, match=r"shape \(1, 13, 24, 16\) .* \(3, H, W\)"):
        made(flow, image=shown(images))


# Between images -------------------------------------------------------------------------------------------------------


def test_an_interpolation_begins_and_ends_with_the_images_of_its_seeds(flow: LatentDiffusionPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt", "class_labels": "cat"}
    frames = flow.interpolate(3, 4, 5, height=32, **options).images
    ends = flow(generator=[3, 4], height=32, **options).images
    torch.testing.assert_close(frames[[0, -1]], ends, rtol=0, atol=1e-5)
    assert all((frames[i] - frames[i + 1]).abs().max() > 1e-3 for i in range(4))
    a, b = (torch.randn(1, 4, 6, 4, generator=torch.Generator().manual_seed(s)) for s in (3, 4))
    middle = sampling.slerp(a, b, 0.5)
    assert middle.norm() == pytest.approx((a.norm() + b.norm()).item() / 2, rel=0.02)  # a straight line: 0.7 of it
    assert torch.allclose(sampling.slerp(a, a, 0.3), a)


def test_an_interpolation_of_images_begins_and_ends_with_their_variations(flow: LatentDiffusionPipeline) -> None:
    a, b = picture(22, 17, seed=1), picture(22, 17, seed=2)
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt", "generator": 6}
    frames = flow.interpolate_images(shown(a), shown(b), 3, class_labels=1, **options).images
    for frame, image in ((frames[0], a), (frames[2], b)):
        alone = flow(1, image=shown(image), strength=0.5, **options).images[0]
        torch.testing.assert_close(frame, alone, rtol=0, atol=1e-5)
    mixed = flow.interpolate_images(shown(a), shown(b), 3, strength=0, **options | {"output_type": "latent"}).images
    torch.testing.assert_close(mixed[1], (flow.encode(a) + flow.encode(b))[0] / 2)
    with pytest.raises(ValueError, match="different sizes"):
        flow.interpolate_images(shown(a), shown(picture()), 3)
    with pytest.raises(ValueError, match="at least its two ends"):
        flow.interpolate(1, 2, 1)


# Other autoencoders, tiles --------------------------------------------------------------------------------------------


def test_tiles_of_the_patch_autoencoder_change_nothing(flow: LatentDiffusionPipeline) -> None:
    options: dict[str, Any] = {"image": shown(picture(70, 90)), "strength": 0.5, "generator": 1}
    whole = made(flow, **options)
    flow.enable_vae_tiling()
    flow.vae.enable_tiling(5)
    sizes: list[int] = []
    hook = flow.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    tiled = made(flow, **options)
    hook.remove()
    flow.disable_vae_tiling()
    assert max(sizes) < 23
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_the_autoencoders_of_diffusers_work_too(kind: str) -> None:
    torch.manual_seed(0)
    vae: Any = (
        AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            scaling_factor=0.5,
            sample_size=16,
        )
        if kind == "AutoencoderKL"
        else diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        )
    )
    pipeline = pipeline_of(vae=vae.eval())
    images = picture(13, 18)
    with torch.no_grad():
        expected = shown(reconstruct(pipeline.vae, images))
    torch.testing.assert_close(made(pipeline, image=shown(images), strength=0), expected, rtol=0, atol=1e-5)
    assert made(pipeline, [0, 1], height=12 * 4, width=8).shape[0] == 2
    pipeline.enable_vae_tiling()
    assert vae.use_tiling
    assert made(pipeline, 1, height=64, width=64).isfinite().all()
    pipeline.disable_vae_tiling()
    assert not vae.use_tiling


def test_half_precision_stays_close(flow: LatentDiffusionPipeline) -> None:
    half = pipeline_of().to(torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16
    image = shown(picture())
    ours = made(half, 1, image=image, generator=1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, made(flow, 1, image=image, generator=1), rtol=0, atol=0.1)


# Saved and loaded -----------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys
from ldm_vae import LatentDiffusionPipeline
import numpy as np
pipeline = LatentDiffusionPipeline.from_pretrained(sys.argv[1])
pipeline("bee", generator=1, num_inference_steps=4, output_type="pil").images[0].save(sys.argv[2])
"""


def test_a_pipeline_saved_moved_and_loaded_elsewhere_gives_the_same_image(
    flow: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    flow.save_pretrained(tmp_path / "here" / "pipeline")
    assert not [p for p in (tmp_path / "here").rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    shutil.move(tmp_path / "here", tmp_path / "there")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "there" / "pipeline"), str(tmp_path / "image.png")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr, done.stderr
    image = made(flow, "bee", generator=1, output_type="pil")[0]
    difference = np.asarray(Image.open(tmp_path / "image.png")).astype(int) - np.asarray(image)
    assert np.abs(difference).max() <= 1  # threads may sum in another order
    for place in ("there", "there/pipeline"):
        loaded = load_pipeline(str(tmp_path / place))
        assert loaded.config.class_names == ["ant", "bee", "cat"]
        assert fingerprint_of(loaded) == fingerprint_of(flow)


def test_a_pipeline_on_the_hub_is_loaded_by_its_id(
    flow: LatentDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub keeps a repository that it downloaded, and from a hub that is at hand."""
    folder = tmp_path / "models--someone--bees"
    flow.save_pretrained(folder / "snapshots" / "0123abcd")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    loaded = LatentDiffusionPipeline.from_pretrained("someone/bees", cache_dir=tmp_path, local_files_only=True)
    assert fingerprint_of(loaded) == fingerprint_of(flow)

    def from_the_hub(name: str, *, allow_patterns: list[str], **_: Any) -> Path:
        assert (name, allow_patterns) == ("someone/bees", ["*.json", "*.safetensors"])
        return folder / "snapshots" / "0123abcd"

    with monkeypatch.context() as online:
        online.setattr("huggingface_hub.snapshot_download", from_the_hub)
        assert fingerprint_of(load_pipeline("someone/bees")) == fingerprint_of(flow)
        assert fingerprint_of(LatentDiffusionPipeline.from_pretrained("someone/bees")) == fingerprint_of(flow)
    with pytest.raises(ModelError, match="someone/wasps could not be had from the hub"):
        load_pipeline("someone/wasps")


def test_the_fingerprint_is_of_weights_and_scale_and_not_of_the_solver(flow: LatentDiffusionPipeline) -> None:
    reference = fingerprint_of(flow)
    assert reference == fingerprint_of(pipeline_of("flow", "heun"))
    assert reference != fingerprint_of(pipeline_of("v", None))
    other = pipeline_of()
    other.vae.register_to_config(latents_mean=[0.0, 0.0, 0.0, 0.0])
    assert reference != fingerprint_of(other)
    other = pipeline_of()
    with torch.no_grad():
        other.unet.conv_out.bias[0] += 1e-6
    assert reference != fingerprint_of(other)


def test_what_is_no_pipeline_is_named_in_one_line(flow: LatentDiffusionPipeline, tmp_path: Path) -> None:
    patch_vae().save_pretrained(tmp_path / "run" / "vae")
    flow.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    flow.save_pretrained(tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "vae")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for name, message in (
        ("nothing", "no such model"),
        ("run", "has no readable model_index.json"),
        ("cut", "cannot load LatentDiffusionPipeline"),
        ("half", "cannot load LatentDiffusionPipeline"),
        ("other", "holds a StableDiffusionPipeline, which is not a LatentDiffusionPipeline"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            load_pipeline(str(tmp_path / name))
        assert "\n" not in str(caught.value)


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 26}, "height 26 is not a multiple of 4: try 24"),
        ({"width": 2}, "width 2 is not a multiple of 4: try 4"),
        ({"class_labels": 3}, "there is no class 3: the model's are 0 to 2"),
        ({"class_labels": -1}, "there is no class -1"),
        ({"class_labels": "dog"}, "there is no class dog: try ant, bee, cat"),
        ({"class_labels": [0, 1], "num_images": 3}, "2 of class_labels for 3 images"),
        ({"class_labels": [0, 1, 2], "num_images": 2}, "num_images is 2, but 3 were described"),
        ({"generator": [1], "num_images": 2}, "1 of generator for 2 images"),
        ({"num_images": 0}, "num_images is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"strength": 1.5}, "strength is 1.5: it must be in 0 to 1"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval is 0.9 to 0.1"),
        ({"output_type": "jpg"}, "output_type jpg is not known: try pil, np, pt, latent"),
        ({"mask_image": torch.ones(24, 16)}, "without the image"),
        ({"image": torch.zeros(3, 24, 16), "height": 24}, "the image's own"),
        ({"image": torch.zeros(3, 24, 16), "mask_image": torch.ones(16, 24)}, "mask of 16x24 .* image of 24x16"),
        ({"image": torch.zeros(3, 3, 24, 16), "mask_image": torch.ones(2, 1, 24, 16)}, "2 of mask_image for 3 images"),
        ({"image": "photo.png"}, "str was given"),
        ({"image": torch.zeros(3, 24, 16, dtype=torch.uint8)}, "floats in"),
        ({"image": []}, "empty list"),
        ({"latents": torch.zeros(1, 5, 6, 4)}, r"shape \(1, 5, 6, 4\) were given: \(N, 4, 6, 4\)"),
        ({"latents": torch.zeros(1, 4, 6, 4), "height": 32}, r"\(N, 4, 8, 4\)"),
    ],
)
def test_a_wrong_option_is_a_value_error_that_says_what_to_do(
    flow: LatentDiffusionPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(flow, **options)


def test_classes_are_refused_by_a_model_that_has_none() -> None:
    pipeline = pipeline_of(num_classes=0)
    assert pipeline.num_classes == 0
    assert torch.equal(made(pipeline, generator=1), made(pipeline, generator=1, guidance_scale=4.0))
    with pytest.raises(ValueError, match="the model has no classes"):
        made(pipeline, 0)


def test_parts_that_do_not_fit_are_refused(flow: LatentDiffusionPipeline) -> None:
    other = PatchAutoencoderKL(latent_channels=8)
    with pytest.raises(ValueError, match="takes 4 channels, the autoencoder's latents have 8"):
        LatentDiffusionPipeline(other, flow.unet, flow.scheduler)
    with pytest.raises(ValueError, match="2 class names for a denoiser of 3 classes"):
        LatentDiffusionPipeline(flow.vae, flow.unet, flow.scheduler, class_names=["a", "b"])
