"""The autoencoder family: each variant trains, and its own property holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import mannwhitneyu

from ldm_vae.analysis.embedding import embed
from ldm_vae.data.blemishes import with_blemishes
from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.corruption import parse_corruption
from ldm_vae.data.loader import CropDataset, collate
from ldm_vae.data.order import index_at
from ldm_vae.data.sources import open_source
from ldm_vae.errors import ConfigError, ModelError, RunError
from ldm_vae.metrics import psnr
from ldm_vae.models.interface import encode_moments, is_variational, posterior_of
from ldm_vae.models.loading import load_autoencoder, load_network
from ldm_vae.models.reconstruction import denoise, reconstruct
from ldm_vae.runs.step import learning_rate_at
from tests.processes import largest_difference, launch, metrics, narrow, state
from training import cache_latents, train_autoencoder
from training.train_autoencoder import PRESETS, Config, training_crops

DATA = "procedural:dead-leaves#train"


def config_for(preset: str, output: Path, **changes: Any) -> Config:
    small = {"data": (DATA,), "output": output, "resolution": 32, "batch_size": 8, "warmup_steps": 2, "steps": 60}
    quiet = {"num_workers": 0, "log_every": 10, "sample_every": 1000, "checkpoint_every": 1000, "tracker": "none"}
    return replace(PRESETS[preset][1], **{**small, **quiet, "mixed_precision": "no", **changes})


def main(config: Config) -> None:
    """The trainer, with networks of half their width: quicker, where they learn enough."""
    with narrow(config.architecture):
        train_autoencoder.main(config)


def held_out(count: int = 6, side: int = 64) -> list[np.ndarray]:
    source = open_source("procedural:dead-leaves#held-out", resolution=side)
    return [source[i].pixels for i in range(count)]


def test_a_denoiser_beats_its_input_on_images_it_never_saw_blind_and_told(tmp_path: Path) -> None:
    main(config_for("denoise", tmp_path, corruption="gaussian:40-60", learning_rate=3e-3, steps=40))
    vae = load_autoencoder(str(tmp_path))
    assert not is_variational(vae)
    noise = parse_corruption("gaussian:50")
    for told in (None, 50.0):
        for i, clean in enumerate(held_out()):
            noisy = noise(clean, np.random.default_rng(i)).input
            with torch.inference_mode():
                made = to_pixels(denoise(vae, to_images(noisy)[None], sigma=told))
            assert psnr(clean[None], made)[0] > psnr(clean[None], noisy[None])[0] + 2
    assert (tmp_path / "samples" / "step-40.png").exists()
    assert any("val_psnr" in m for m in metrics(tmp_path))


@pytest.mark.parametrize("corruption", ["masking:0.5", "poisson:10"])
def test_other_damage_is_undone_in_part_on_images_it_never_saw(corruption: str, tmp_path: Path) -> None:
    main(config_for("plain", tmp_path, corruption=corruption, learning_rate=4e-3, steps=80))
    vae = load_autoencoder(str(tmp_path))
    gains = []
    for i, clean in enumerate(held_out()):
        damaged = parse_corruption(corruption)(clean, np.random.default_rng(i)).input
        with torch.inference_mode():
            made = to_pixels(reconstruct(vae, to_images(damaged)[None]))
        gains.append(psnr(clean[None], made)[0] - psnr(clean[None], damaged[None])[0])
    assert np.mean(gains) > 1


@pytest.mark.parametrize("sparsity", ["l1", "kl"])
def test_more_weight_on_sparsity_leaves_fewer_latents_active(sparsity: Any, tmp_path: Path) -> None:
    active = []
    for weight in (0.0, 0.3):
        run = tmp_path / str(weight)
        main(config_for("sparse", run, sparsity=sparsity, sparsity_weight=weight, target_activation=0.02))
        vae = load_autoencoder(str(run))
        with torch.inference_mode():
            latents = torch.cat([encode_moments(vae, to_images(p)[None]).chunk(2, dim=1)[0] for p in held_out()])
        active.append(float((latents > (0.0 if sparsity == "l1" else 0.5)).float().mean()))
        logged = [m["active_latents"] for m in metrics(run) if "active_latents" in m]
        assert logged[-1] == pytest.approx(active[-1], abs=0.15)  # of other images, and not averaged weights
    assert active[1] < 0.7 * active[0]


def test_the_kl_pulls_what_all_images_have_together_to_a_standard_normal(tmp_path: Path) -> None:
    distance = []
    for weight in (0.0, 0.3):
        run = tmp_path / str(weight)
        config = config_for("plain", run, reconstruction="l1", posterior="gaussian", kl_weight=weight)
        train_autoencoder.main(replace(config, learning_rate=2e-3))
        vae = load_autoencoder(str(run))
        with torch.inference_mode():
            posteriors = [posterior_of(encode_moments(vae, to_images(p)[None])) for p in held_out()]
        means = torch.cat([p.mean for p in posteriors]).transpose(0, 1).flatten(1)  # (c, n)
        noise = torch.cat([p.var for p in posteriors]).transpose(0, 1).flatten(1).mean(dim=1)
        variance = means.var(dim=1) + noise
        distance.append((means.mean(dim=1).abs().max().item(), (variance - 1).abs().max().item()))
    assert distance[1][0] < 0.2 < 0.5 < distance[0][0] or distance[1][1] < 0.2 < 0.5 < distance[0][1]
    assert max(distance[1]) < 0.3


def test_a_global_latent_is_so_many_numbers_an_image(tmp_path: Path) -> None:
    main(config_for("plain", tmp_path, global_latent=6, steps=2))
    vae = load_autoencoder(str(tmp_path))
    images = to_images(np.stack(held_out(4, side=32)))
    assert embed(vae, images).shape == (4, 6)
    assert vae.decode(embed(vae, images)[:, :, None, None]).sample.shape == images.shape


def test_a_vector_network_goes_on_with_whole_images_of_its_size(tmp_path: Path) -> None:
    first = config_for("plain", tmp_path / "first", global_latent=6, steps=1)
    main(first)
    second = replace(first, output=tmp_path / "second", init=str(tmp_path / "first"), global_latent=None)
    main(second)
    vae = load_autoencoder(str(tmp_path / "second"))
    source = open_source(DATA, resolution=96)
    a, b = (collate([training_crops(source, vae, config)[i] for i in range(4)]).images for config in (first, second))
    assert np.array_equal(a, b)
    with pytest.raises(ConfigError, match="vector is of 32 pixels each way: add --resolution 32"):
        main(replace(second, output=tmp_path / "third", resolution=64))
    caching = cache_latents.Config(vae=str(tmp_path / "first"), data=DATA, output=tmp_path / "cache", resolution=64)
    with pytest.raises(ConfigError, match="vector is of 32 pixels each way: leave --resolution out"):
        cache_latents.main(caching)


def test_grey_images_can_be_denoised_and_mirroring_can_be_left_out(tmp_path: Path) -> None:
    run = str(tmp_path / "0-55")
    main(config_for("denoise", Path(run), channels=1, steps=1, mirror=False))
    for high, known in ((90, 90), (10, 55)):  # what can be told is what was taught, before or now
        again = tmp_path / f"0-{high}"
        main(config_for("denoise", again, channels=1, steps=1, init=run, corruption=f"gaussian:0-{high}"))
        assert load_autoencoder(str(again)).config.noise_level == known
    vae = load_autoencoder(run)
    assert vae.config.noise_level == 55
    assert denoise(vae, torch.zeros(1, 1, 20, 24), sigma=10).shape == (1, 1, 20, 24)
    source = open_source("procedural:dead-leaves", resolution=16)
    crops = CropDataset(source, seed=0, resolution=16, mirror=False)
    for position in range(6):
        index = index_at(position, size=len(source), seed=0)
        assert np.array_equal(crops[position].image, to_images(source[index].pixels))


def smooth_photos(folder: Path, count: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(count):
        field = gaussian_filter(rng.standard_normal((48, 48)), 8)
        Image.fromarray((128 + 10 * field / field.std()).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def test_what_finds_blemishes_finds_them_on_images_it_never_saw(tmp_path: Path) -> None:
    data = smooth_photos(tmp_path / "good", 40, seed=0)
    run = tmp_path / "run"
    few = {"data": (data,), "channels": 1, "steps": 320, "batch_size": 3}
    train_autoencoder.main(config_for("find", run, **few, learning_rate=2e-3, ema_decay=0.9))
    vae = load_network(str(run))
    source = open_source(smooth_photos(tmp_path / "others", 12, seed=1), channels=1)
    inside, outside = [], []
    for i in range(12):
        pair = with_blemishes(source[i].pixels, np.random.default_rng(i))
        blemished = pair.target[:, :, 0] > 0
        with torch.inference_mode():
            log_odds = reconstruct(vae, to_images(pair.input)[None])[0]
        assert log_odds.shape == (1, 48, 48)
        inside += log_odds[0].numpy()[blemished].tolist()
        outside += log_odds[0].numpy()[~blemished].tolist()
    area = mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside))  # under the ROC curve
    assert area > 0.7
    assert (run / "samples" / "step-320.png").exists()
    with pytest.raises(ModelError, match="gives no images: it is for `ldm-vae anomaly`"):
        load_autoencoder(str(run))
    again = config_for("plain", tmp_path / "again", data=(data,), channels=1, init=str(run), posterior="gaussian")
    with pytest.raises(ModelError, match="gives no images"):
        main(again)
    main(config_for("plain", tmp_path / "plain", data=(data,), channels=1, steps=1))
    with pytest.raises(ConfigError, match="plain does not find blemishes: leave out --init"):
        main(config_for("find", tmp_path / "again", data=(data,), channels=1, init=str(tmp_path / "plain")))


def test_a_finished_run_is_extended_on_the_longer_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(name: str, steps: int, **changes: Any) -> None:
        main(config_for("plain", tmp_path / name, steps=steps, log_every=1, learning_rate=1e-2, **changes))

    run("run", 2)
    with pytest.raises(RunError, match=r"a run of 2 steps: add --extend .* learning rate then follows the cosine of 4"):
        run("run", 4)
    with pytest.raises(RunError, match=r"other settings \(seed: 0 -> 1; steps: 2 -> 4\)"):
        run("run", 4, extend=True, seed=1)
    run("run", 4, extend=True)
    assert "extended from 2 to 4 steps: after step 2 the learning rate is 50% of its peak" in capsys.readouterr().out
    rates = [m["learning_rate"] for m in metrics(tmp_path / "run") if "learning_rate" in m]
    lengths = (2, 2, 4, 4)
    assert rates == [learning_rate_at(i, 1e-2, steps=n, warmup_steps=2) for i, n in enumerate(lengths)]
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["config"]["steps"], record["extended_from"]) == (4, [2])
    run("run", 4)  # it is a run of four steps now
    run("run", 4, extend=True)
    with pytest.raises(RunError, match=r"other settings \(steps: 4 -> 3\)"):
        run("run", 3, extend=True)
    assert state(tmp_path / "run", 4).keys() == state(tmp_path / "run", 2).keys()


def test_variants_combine_and_do_not_depend_on_how_the_batch_is_split(tmp_path: Path) -> None:
    changes = {"steps": 3, "corruption": "gaussian:0-50", "sparsity": "kl", "global_latent": 5}
    changes |= {"posterior": "gaussian", "kl_weight": 1e-3, "checkpoint_every": 3}
    whole = config_for("denoise", tmp_path / "whole", **changes)
    main(whole)
    main(replace(whole, output=tmp_path / "micro", gradient_accumulation_steps=2))
    two = launch(main, replace(whole, output=tmp_path / "two"), processes=2)
    assert two.returncode == 0, two.stderr
    reference = state(tmp_path / "whole", 3)
    for name in ("micro", "two"):
        other = state(tmp_path / name, 3)
        assert largest_difference(reference, other, ("vae", "ema")) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corruption": "fog:3"}, "--corruption fog:3"),
        ({"global_latent": 0}, "global-latent"),
        ({"global_latent": 4, "resolution": 36}, "not a multiple of 8: try 32"),
        ({"target_activation": 1.0}, "target-activation"),
        ({"corruption": "jpeg:10", "channels": 4}, "4 channels cannot be JPEG"),
        ({"global_latent": 4, "resolution": 64, "shorter_side": 32}, "--shorter-side 32 is less"),
        ({"reconstruction": "cross-entropy", "corruption": "gaussian:5"}, "is for blemishes: leave out --corruption"),
        ({"sparsity_weight": -1.0}, "sparsity-weight"),
        ({"kl_weight": 1e-3}, "no posterior"),
        ({"init": "{run}", "global_latent": 4}, "leave out --init"),
        ({"init": "{run}", "sparsity": "l1"}, "not made for --sparsity l1"),
        ({"init": "{kl}"}, "has a posterior"),
    ],
)
def test_what_cannot_be_trained_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name, posterior in (("run", "deterministic"), ("kl", "gaussian")):
        if changes.get("init") == "{" + name + "}":
            main(config_for("plain", tmp_path / name, posterior=posterior, steps=1))
            changes = changes | {"init": str(tmp_path / name)}
    with pytest.raises(ConfigError, match=message):
        main(config_for("plain", tmp_path / "out", **changes))
