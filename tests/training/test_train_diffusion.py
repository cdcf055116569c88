"""The diffusion trainer as people run it: from a cache and on the fly, launched, killed, resumed and misused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from ldm_vae.errors import ConfigError, DataError, LdmVaeError, ModelError, RunError, one_line_errors
from ldm_vae.latents.cache import LatentCache
from ldm_vae.latents.scaling import scale_latents
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.objectives import denoising
from ldm_vae.pipeline import load_pipeline
from ldm_vae.runs.state import state_tensors
from tests.processes import (
    Forked,
    flags,
    kill_at,
    largest_difference,
    launch,
    metrics,
    run_script,
    run_until_killed,
    state,
    wait_for,
)
from training import cache_latents, train_diffusion
from training.train_diffusion import PRESETS, Config, build, main, open_data

DEMO = PRESETS["demo"][1]
PARTS = ("unet", "ema", "optimizer")


@pytest.fixture(scope="module")
def cache(photos: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("latents") / "cache"
    cache_latents.main(
        cache_latents.Config(
            vae=str(vae), data=str(photos), output=output, resolution=32, shard_size=5, num_workers=0, flip=True
        )
    )
    return output


def config_for(cache: Path | None, output: Path, **changes: Any) -> Config:
    """Small and exact: 6 steps of 8 latents of 4x4, a checkpoint each second step."""
    base = replace(
        DEMO,
        latents=cache,
        output=output,
        flip=True,
        steps=6,
        batch_size=8,
        learning_rate=1e-4,
        warmup_steps=2,
        mixed_precision="no",
        num_workers=0,
        log_every=1,
        sample_every=100,
        checkpoint_every=2,
        tracker="none",
    )
    return replace(base, **changes)


def words(config: Config) -> list[str]:
    return ["demo", *flags(config, DEMO)]


@pytest.fixture(scope="module")
def reference(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in one process."""
    output = tmp_path_factory.mktemp("reference") / "run"
    torch.set_num_threads(1)
    main(config_for(cache, output))
    return output


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 1e-3)])
def test_on_the_fly_and_from_the_cache_the_losses_are_the_same(
    precision: str, tolerance: float, cache: Path, photos: Path, tmp_path: Path
) -> None:
    """To 1e-5 in float32; in bf16 a last bit of float16's rounding weighs more."""
    settings = {"mixed_precision": precision, "checkpoint_every": 100}
    main(config_for(cache, tmp_path / "cached", **settings))
    main(config_for(None, tmp_path / "fly", data=str(photos), vae=str(cache), resolution=32, **settings))
    cached, fly = ([m["loss"] for m in metrics(tmp_path / run) if "loss" in m] for run in ("cached", "fly"))
    assert len(cached) == 6
    assert fly == pytest.approx(cached, abs=tolerance)
    a, b = ({k: v for k, v in validated(tmp_path / run).items() if k != "step"} for run in ("cached", "fly"))
    assert a == pytest.approx(b, abs=10 * tolerance)


def test_a_cache_of_other_images_judges_training_on_the_fly_as_it_judges_training_from_a_cache(
    cache: Path, photos: Path, tmp_path: Path
) -> None:
    main(config_for(cache, tmp_path / "cached", val_latents=cache, checkpoint_every=100))
    on_the_fly = {"data": str(photos), "vae": str(cache), "resolution": 32, "checkpoint_every": 100}
    main(config_for(None, tmp_path / "fly", val_latents=cache, **on_the_fly))
    a, b = ({k: v for k, v in validated(tmp_path / run).items() if k != "step"} for run in ("cached", "fly"))
    assert a == pytest.approx(b, abs=1e-4)


def test_a_run_does_not_lie_among_the_images_that_it_learns_from(photos: Path, vae: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    with pytest.raises(ConfigError, match="is inside --data"):
        main(config_for(None, tmp_path / "photos" / "run", data=f"{tmp_path / 'photos'}#train", vae=str(vae)))


def validated(run: Path) -> dict[str, float]:
    return next(m for m in metrics(run) if "val_loss" in m)


def test_two_processes_and_micro_batches_and_one_process_give_the_same_network(
    reference: Path, cache: Path, tmp_path: Path
) -> None:
    two = launch(main, config_for(cache, tmp_path / "two"), processes=2)
    assert two.returncode == 0, two.stderr
    assert "effective batch 8 = 2 processes x 4 images x 1 micro-batches" in two.stdout
    main(config_for(cache, tmp_path / "micro", gradient_accumulation_steps=2))
    a = state(reference, 6)
    for other in ("two", "micro"):
        b = state(tmp_path / other, 6)
        parts = [(a[k] - b[k]).abs().flatten() for k in a if k.startswith(("unet/", "ema/shadow"))]
        differences = torch.cat(parts)
        # A weight whose gradient is nothing but rounding moves by the learning rate, either way: Adam divides by its
        # size. Of 11 million there is none on AMD's processors and one on Intel's, by 1.7e-5.
        assert (differences > 1e-5).sum() <= 1e-6 * len(differences)
        assert differences.max() < 1e-4
    accelerator = Accelerator()
    config = config_for(cache, tmp_path)
    start = state_tensors(build(config, open_data(config, accelerator), accelerator).parts())
    end = state(reference, 6)
    moved = max((start[k] - end[k]).abs().max().item() for k in end if k.startswith("unet/"))
    assert moved > 1e-4  # it trains: agreement is not idleness


def killed(micro_batch: int, config: Config) -> None:
    """The run, killed as it begins its so-many-th micro-batch."""
    kill_at(micro_batch, denoising, "denoising_losses")
    main(config)


def assert_identical(a: Path, b: Path) -> None:
    x, y = state(a, 6), state(b, 6)
    assert x.keys() == y.keys()
    assert {k.split("/")[0] for k in x} == set(PARTS)
    for key in x:
        assert torch.equal(x[key], y[key]), key
    weights = Path("pipeline") / "unet" / "diffusion_pytorch_model.safetensors"
    assert (a / weights).read_bytes() == (b / weights).read_bytes()


def test_a_run_killed_in_a_later_epoch_and_again_within_a_step_ends_bit_identical(cache: Path, tmp_path: Path) -> None:
    """12 images, 8 a step: step 3 begins in the third epoch. Two micro-batches a step."""
    whole = config_for(cache, tmp_path / "whole", gradient_accumulation_steps=2)
    main(whole)
    config = replace(whole, output=tmp_path / "killed", num_workers=1)
    run_until_killed(killed, 7, config)  # as step 3 begins: the checkpoint of step 2 is the newest
    run_until_killed(killed, 6, config)  # resumed at step 2: in step 4, between its two micro-batches
    assert (tmp_path / "killed" / "checkpoints" / "step-4").exists()
    main(config)
    assert_identical(tmp_path / "whole", tmp_path / "killed")
    assert [m["step"] for m in metrics(tmp_path / "killed") if "loss" in m] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def numbered(photos: Path, tmp_path: Path) -> Path:
    """Images in classes 1, 2 and 10."""
    for i, file in enumerate(sorted(photos.rglob("*.png"))):
        place = tmp_path / "numbered" / ("1", "2", "10")[i % 3] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return tmp_path / "numbered"


def test_a_run_begun_before_keeps_the_order_of_its_classes(
    numbered: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its classes were sorted as strings: 1, 10, 2."""
    data = {"data": str(numbered), "vae": str(vae), "resolution": 32, "label_dropout": 0.0, "flip": False}
    with monkeypatch.context() as before:
        before.setattr("ldm_vae.data.file_sources.in_natural_order", str)
        main(config_for(None, tmp_path / "whole", **data))
        main(config_for(None, tmp_path / "run", **data))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    main(config_for(None, tmp_path / "run", **data))
    assert_identical(tmp_path / "run", tmp_path / "whole")
    assert load_pipeline(str(tmp_path / "run")).config.class_names == ["1", "10", "2"]
    assert (tmp_path / "run" / "classes.csv").read_text().split() == ["label,class", "0,1", "1,10", "2,2"]
    capsys.readouterr()
    main(config_for(None, tmp_path / "new", **data, steps=1))
    assert "3 classes (0 1, 1 2, 2 10)" in capsys.readouterr().out
    assert load_pipeline(str(tmp_path / "new")).config.class_names == ["1", "2", "10"]


def test_a_validation_cache_may_have_the_classes_in_another_order(
    numbered: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"vae": str(vae), "data": str(numbered), "resolution": 32, "num_workers": 0, "flip": True}
    cache_latents.main(cache_latents.Config(output=tmp_path / "natural", **settings))
    monkeypatch.setattr("ldm_vae.data.file_sources.in_natural_order", str)
    cache_latents.main(cache_latents.Config(output=tmp_path / "strings", **settings))
    losses = []
    for name in ("natural", "strings"):
        assert LatentCache(tmp_path / name).classes == (("1", "2", "10") if name == "natural" else ("1", "10", "2"))
        main(config_for(tmp_path / "natural", tmp_path / name / "run", val_latents=tmp_path / name, steps=1))
        losses.append(validated(tmp_path / name / "run"))
    assert losses[0] == losses[1]


def test_two_processes_go_on_with_what_one_began(reference: Path, cache: Path, tmp_path: Path) -> None:
    config = config_for(cache, tmp_path / "run")
    run_until_killed(killed, 6, config)
    done = launch(main, config, processes=2)
    assert done.returncode == 0, done.stderr
    assert largest_difference(state(reference, 6), state(tmp_path / "run", 6), ("unet", "ema")) < 1e-5


def test_the_run_holds_a_pipeline_with_averaged_weights_and_measured_latents(reference: Path, cache: Path) -> None:
    pipeline = load_pipeline(str(reference))
    shadow = [v for k, v in state(reference, 6).items() if k.startswith("ema/shadow/")]
    assert sum(p.numel() for p in pipeline.unet.parameters()) == sum(v.numel() for v in shadow)
    assert torch.equal(next(pipeline.unet.parameters()), state(reference, 6)["ema/shadow/0"])
    assert pipeline.config.class_names == ["first class", "zweite Klasse ü"]
    latents = torch.randn(2, 4, 4, 4)
    expected = scale_latents(load_autoencoder(str(cache)), latents)
    assert torch.equal(scale_latents(pipeline.vae, latents), expected)
    grid = np.asarray(Image.open(reference / "samples" / "step-6.png"))
    assert grid.std() > 1
    line = next(m for m in metrics(reference) if "val_loss" in m)
    by_time = [v for k, v in line.items() if k.startswith("val_loss/t=")]
    assert len(by_time) == 8
    assert np.mean(by_time) == pytest.approx(line["val_loss"])


def test_without_statistics_they_are_measured_and_kept_with_the_checkpoint(
    photos: Path, vae: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(None, tmp_path / "run", data=str(photos), vae=str(vae), resolution=32, flip=False, steps=2)
    main(config)
    found = load_pipeline(str(config.output)).vae.config
    of_all = load_autoencoder(str(cache)).config
    assert found.latents_std == pytest.approx(of_all.latents_std, rel=0.1)  # without the mirrored images
    monkeypatch.setattr(train_diffusion, "measure_statistics", lambda *_: pytest.fail("measured again"))
    main(replace(config, log_every=3))


def test_nan_steps_are_skipped_counted_and_then_lead_back_to_the_checkpoint(
    reference: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, poisoned, seen = train_diffusion.denoiser_step, {"left": 3}, {"steps": 0}

    def poison(batches: Any, *args: Any, **keywords: Any) -> Any:
        seen["steps"] += 1
        if seen["steps"] > 3 and poisoned["left"] > 0:
            poisoned["left"] -= 1
            batch = next(batches)
            batch.noise.fill_(float("nan"))
            batches = iter([batch])
        return real(batches, *args, **keywords)

    monkeypatch.setattr(train_diffusion, "denoiser_step", poison)
    config = config_for(cache, tmp_path / "run", checkpoint_every=3)
    main(config)
    assert "not finite in 3 steps in a row, up to step 6: back to the checkpoint of step 3" in capsys.readouterr().out
    assert_identical(reference, config.output)
    poisoned["left"], seen["steps"] = 10**9, 0
    with pytest.raises(RunError, match="once more"):
        main(config_for(cache, tmp_path / "hopeless", checkpoint_every=3))


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction": "v", "min_snr_gamma": 5.0, "tracker": "tensorboard"},
        {"prediction": "epsilon", "class_conditional": False, "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "num_workers": 1, "val": True, "optimizer": "muon"},
        pytest.param({"compile": True, "flip": False}, marks=pytest.mark.slow),  # minutes of compiling
    ],
    ids=lambda c: " ".join(c),
)
def test_every_option_trains(changes: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    if changes.pop("val", False):
        changes |= {"val_latents": cache}
    config = config_for(cache, tmp_path / "run", steps=2, **changes)
    main(config)
    lines = metrics(config.output)
    assert lines[-1]["step"] == 2
    assert all(np.isfinite(v) for m in lines for v in m.values())
    assert load_pipeline(str(config.output)).num_classes == (0 if "class_conditional" in changes else 2)


def test_other_settings_are_refused_with_the_fields_that_differ(reference: Path, cache: Path) -> None:
    with pytest.raises(RunError, match=r"other settings \(prediction: flow -> v; seed: 0 -> 1\)"):
        main(config_for(cache, reference, prediction="v", seed=1))


def test_a_vae_that_did_not_make_the_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    PatchAutoencoderKL(block_out_channels=(16, 16)).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"holds latents of another VAE than .*other: make the cache anew"):
        main(config_for(cache, tmp_path / "run", vae=str(tmp_path / "other")))


def test_a_run_is_not_resumed_on_other_latents_or_classes(photos: Path, vae: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for i, file in enumerate(sorted(photos.rglob("*.png"))):
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / file.parent.name / f"{i}.png").write_bytes(file.read_bytes())
    config = config_for(None, tmp_path / "run", data=str(folder), vae=str(vae), resolution=32, steps=2, flip=False)
    main(config)
    (folder / "a third class").mkdir()
    (folder / "a third class" / "0.png").write_bytes(file.read_bytes())
    with pytest.raises(RunError, match=r"begun with something else \(data, number of images, classes changed since\)"):
        main(config)


def test_a_run_is_not_resumed_on_more_images_of_the_same_data_or_another_scale(
    photos: Path, vae: Path, tmp_path: Path
) -> None:
    def make_cache(num_images: int, **changes: Any) -> None:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        given = {"vae": str(vae), "data": str(photos), "resolution": 32, "num_workers": 0, "num_images": num_images}
        cache_latents.main(cache_latents.Config(output=tmp_path / "c", **given | changes))

    make_cache(8)
    config = config_for(tmp_path / "c", tmp_path / "run", steps=2, flip=False)
    main(config)
    main(config)  # as it was
    make_cache(10)
    with pytest.raises(RunError, match=r"begun with something else \(number of images, scale changed since\)"):
        main(config)
    make_cache(8, flip=True)
    with pytest.raises(RunError, match=r"begun with something else \(scale changed since\)"):
        main(config)


def test_validation_latents_must_have_the_same_classes(cache: Path, vae: Path, tmp_path: Path) -> None:
    cache_latents.main(
        cache_latents.Config(
            vae=str(vae), data="procedural:shapes", output=tmp_path / "c", resolution=32, num_workers=0, num_images=8
        )
    )
    with pytest.raises(DataError, match=r"has other classes \(circle, square, .*\) than the training data"):
        main(config_for(cache, tmp_path / "run", val_latents=tmp_path / "c"))


def test_the_scale_is_the_cache_s_whatever_the_vae_that_is_named_says(photos: Path, tmp_path: Path) -> None:
    diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    settings = {"data": str(photos), "output": tmp_path / "c", "resolution": 16, "num_workers": 0}
    cache_latents.main(cache_latents.Config(vae=str(tmp_path / "vae"), **settings))
    configs = [config_for(tmp_path / "c", tmp_path / "run", vae=v, flip=False) for v in (None, str(tmp_path / "vae"))]
    own, named = (open_data(c, Accelerator()).vae.config for c in configs)
    assert own.latents_std == named.latents_std
    assert own.scaling_factor == named.scaling_factor == 1.0


def test_a_stop_signal_ends_the_step_and_the_same_command_goes_on(cache: Path, tmp_path: Path) -> None:
    whole = config_for(cache, tmp_path / "whole", steps=20, checkpoint_every=1000)
    config = replace(whole, output=tmp_path / "stopped")
    process = Forked(main, config)
    log = config.output / "metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, process)
    os.kill(process.pids[0], signal.SIGTERM)
    done = process.wait()
    assert done.returncode == 0
    assert "stopped by SIGTERM after step" in done.stdout
    main(config)
    main(whole)
    x, y = state(config.output, 20), state(whole.output, 20)
    assert all(torch.equal(x[k], y[k]) for k in x)


def test_images_are_encoded_at_the_resolution_of_the_vae_s_run(
    photos: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(vae, tmp_path / "trained" / "vae")
    flags = {"resolution": 32, "shorter_side": 60}
    (tmp_path / "trained" / "config.json").write_text(json.dumps({"config": flags}))
    main(config_for(None, tmp_path / "run", data=str(photos), vae=str(tmp_path / "trained"), steps=1, flip=False))
    said = capsys.readouterr().out
    assert "images of 56 x 56 pixels" in said
    assert "latents 4x7x7" in said


def test_a_damaged_cache_is_refused(photos: Path, vae: Path, tmp_path: Path) -> None:
    cache_latents.main(
        cache_latents.Config(vae=str(vae), data=str(photos), output=tmp_path / "c", resolution=32, num_workers=0)
    )
    file = tmp_path / "c" / "shard-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="missing or damaged: remove it"):
        main(config_for(tmp_path / "c", tmp_path / "run", flip=False))


def test_mirrored_images_must_be_in_the_cache(photos: Path, vae: Path, tmp_path: Path) -> None:
    cache_latents.main(
        cache_latents.Config(vae=str(vae), data=str(photos), output=tmp_path / "c", resolution=32, num_workers=0)
    )
    with pytest.raises(ConfigError, match="has no mirrored images"):
        main(config_for(tmp_path / "c", tmp_path / "run"))


def test_bad_images_are_named_on_the_fly_and_a_set_of_nothing_else_is_an_error(
    photos: Path, vae: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, file in enumerate(sorted(photos.rglob("*.png"))[:6]):
        (folder / f"{i}.png").write_bytes(file.read_bytes() if i != 1 else b"no image")
    settings = {"data": str(folder), "vae": str(vae), "resolution": 32, "steps": 2}
    main(config_for(None, tmp_path / "run", **settings))
    assert "1.png,cannot be decoded" in (tmp_path / "run" / "bad_images.csv").read_text()
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(LdmVaeError, match="no usable image"):
        main(config_for(None, tmp_path / "nothing", **settings))


def test_a_run_starts_from_the_denoiser_of_another(reference: Path, cache: Path, tmp_path: Path) -> None:
    """Whatever size the preset names, and without its classes."""
    config = config_for(cache, tmp_path / "run", init=str(reference), steps=1, denoiser="tiny", learning_rate=1e-9)
    main(config)
    before, after = load_pipeline(str(reference)).unet, load_pipeline(str(tmp_path / "run")).unet
    assert largest_difference(before.state_dict(), after.state_dict(), tuple(before.state_dict())) < 1e-6
    main(replace(config, output=tmp_path / "none", class_conditional=False))
    assert load_pipeline(str(tmp_path / "none")).num_classes == 0


def test_a_denoiser_of_other_latents_or_another_prediction_is_no_start(
    reference: Path, cache: Path, photos: Path, tmp_path: Path
) -> None:
    config = config_for(cache, tmp_path / "run", init=str(reference), prediction="v")
    with pytest.raises(ModelError, match="predicts flow: add --prediction flow"):
        main(config)
    with pytest.raises(ConfigError, match="Muon needs whole matrices, which FSDP divides: add --optimizer adamw"):
        build(replace(config, optimizer="muon"), None, SimpleNamespace(is_fsdp2=True))  # type: ignore[arg-type]
    PatchAutoencoderKL(block_out_channels=(8, 8)).save_pretrained(tmp_path / "other")
    others = config_for(None, tmp_path / "run", init=str(reference), data=str(photos), vae=str(tmp_path / "other"))
    with pytest.raises(ModelError, match="knows latents of another VAE: give --vae"):
        main(replace(others, resolution=32))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--no-such-flag"], "no-such-flag"),
        (["--steps", "0"], "--steps is 0"),
        (["--latents", "{tmp}/missing"], "is not a cache of latents: make one with training/cache_latents.py"),
        (["--data", "procedural:shapes"], "give either --latents, a cache, or --data with --vae"),
        (["--vae", "{tmp}/missing"], "no such model"),
        (["--vae", "{tmp}/other"], "holds latents of another VAE"),
        (["--label-dropout", "2"], "--label-dropout is 2.0: it must be at least 0 and at most 1"),
        (["--min-snr-gamma", "0"], "--min-snr-gamma is 0.0: it must be more than 0"),
        (["--prediction", "sample"], "prediction"),
        (["--gradient-accumulation-steps", "3"], "batch size 8 is not a multiple"),
        (["--output", "/proc/nothing"], "cannot write to"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    extra: list[str], message: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PatchAutoencoderKL(block_out_channels=(8, 8)).save_pretrained(tmp_path / "other")
    given = words(config_for(cache, tmp_path / "run", warmup_steps=100)) + [w.format(tmp=tmp_path) for w in extra]
    with pytest.raises(SystemExit) as ended, one_line_errors():
        main(train_diffusion.parse_config(PRESETS, description="", args=given))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_script_itself_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    words = ["demo", "--latents", str(tmp_path / "no"), "--output", str(tmp_path / "run")]
    done = launch(run_script, "training/train_diffusion.py", *words)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith(f"error: {tmp_path}/no is not a cache of latents")
