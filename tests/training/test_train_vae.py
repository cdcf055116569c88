"""The trainer as people run it: launched, killed, resumed, stopped, poisoned and misused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tifffile
import torch
from accelerate import Accelerator
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import reconstruction
from ldm_vae.data.conversion import to_pixels
from ldm_vae.data.loader import CropDataset
from ldm_vae.data.reader import ReadOptions
from ldm_vae.data.sources import open_source
from ldm_vae.errors import ConfigError, LdmVaeError, RunError, one_line_errors
from ldm_vae.grids import reconstruction_grid, validation_images
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.objectives import autoencoding
from ldm_vae.runs.state import state_tensors
from tests import processes
from tests.processes import (
    ENVIRONMENT,
    ROOT,
    Forked,
    kill_at,
    launch,
    metrics,
    narrow,
    run_script,
    run_until_killed,
    wait_for,
)
from training import train_vae
from training.train_vae import PRESETS, Config, build, main

SCRIPT = str(ROOT / "training" / "train_vae.py")
DEMO = PRESETS["demo"][1]


def config_for(photos: Path, output: Path, **changes: Any) -> Config:
    """Every loss on, both networks, small and exact: 6 steps of 8 crops of 32x32, a checkpoint each second step."""
    base = replace(
        DEMO,
        data=(str(photos),),
        output=output,
        steps=6,
        batch_size=8,
        resolution=32,
        disc_start=2,
        learning_rate=1e-4,
        disc_learning_rate=1e-4,
        disc_channels=16,
        warmup_steps=2,
        mixed_precision="no",
        num_workers=0,
        log_every=1,
        sample_every=100,
        checkpoint_every=2,
        tracker="none",
    )
    return replace(base, **changes)


BY_FLAGS = {name: getattr(DEMO, name) for name in ("warmup_steps", "disc_learning_rate", "disc_channels")}
"""What no flag changes."""


def flags(config: Config) -> list[str]:
    """The command line that gives this configuration."""
    return ["demo", *processes.flags(config, DEMO)]


def state(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return processes.state(run, step)


def largest_difference(a: Path, b: Path, parts: tuple[str, ...]) -> float:
    return processes.largest_difference(state(a), state(b), parts)


def assert_identical(a: Path, b: Path) -> None:
    """Both networks, the averaged weights, both optimizers and the exported model, bit by bit."""
    x, y = state(a), state(b)
    assert x.keys() == y.keys()
    assert {k.split("/")[0] for k in x} == {
        *("vae", "ema", "discriminator", "adaptive_weight", "accuracy", "vae_optimizer", "discriminator_optimizer")
    }
    for key in x:
        assert torch.equal(x[key], y[key]), key
    assert (a / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        b / "vae" / "diffusion_pytorch_model.safetensors"
    ).read_bytes()


@pytest.fixture(scope="module")
def reference(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in one process."""
    output = tmp_path_factory.mktemp("reference") / "run"
    torch.set_num_threads(1)
    main(config_for(photos, output))
    return output


def test_two_processes_and_micro_batches_and_one_process_give_the_same_networks(
    reference: Path, photos: Path, tmp_path: Path
) -> None:
    two = launch(main, config_for(photos, tmp_path / "two"), processes=2)
    assert two.returncode == 0, two.stderr
    assert "effective batch 8 = 2 processes x 4 images x 1 micro-batches" in two.stdout
    main(config_for(photos, tmp_path / "micro", gradient_accumulation_steps=2))
    for other in ("two", "micro"):
        assert largest_difference(reference, tmp_path / other, ("vae", "ema", "discriminator")) < 1e-5
    start, end = state_tensors(build(config_for(photos, tmp_path), Accelerator()).parts()), state(reference)
    for part in ("vae/", "discriminator/"):  # they train: agreement is not idleness
        assert max((start[k] - end[k]).abs().max().item() for k in end if k.startswith(part)) > 1e-4


def killed(micro_batch: int, config: Config) -> None:
    """The run, killed as it begins its so-many-th micro-batch."""
    kill_at(micro_batch, autoencoding, "noise_at")
    main(config)


def test_a_run_killed_in_a_later_epoch_and_again_within_a_step_ends_bit_identical(photos: Path, tmp_path: Path) -> None:
    """12 images, 8 a step: step 3 begins in the third epoch. Two micro-batches a step."""
    whole = config_for(photos, tmp_path / "whole", gradient_accumulation_steps=2)
    main(whole)
    config = replace(whole, output=tmp_path / "killed", num_workers=1)
    run_until_killed(killed, 7, config)  # as step 3 begins: the checkpoint of step 2 is the newest
    run_until_killed(killed, 6, config)  # resumed at step 2: in step 4, between its two micro-batches
    assert (tmp_path / "killed" / "checkpoints" / "step-4").exists()
    main(config)
    assert_identical(tmp_path / "whole", tmp_path / "killed")
    steps = [m["step"] for m in metrics(tmp_path / "killed") if "learning_rate" in m]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_two_processes_go_on_with_what_one_began(reference: Path, photos: Path, tmp_path: Path) -> None:
    config = config_for(photos, tmp_path / "run")
    run_until_killed(killed, 6, config)
    done = launch(main, config, processes=2)
    assert done.returncode == 0, done.stderr
    assert largest_difference(reference, tmp_path / "run", ("vae", "ema", "discriminator")) < 1e-5


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a run that is long enough to be stopped within, and was not."""
    changes = {"steps": 30, "checkpoint_every": 1000, "num_workers": 1, "perceptual": "none", "adversarial": "none"}
    config = config_for(photos, tmp_path_factory.mktemp("whole"), **changes | BY_FLAGS)
    torch.set_num_threads(1)
    main(config)
    return config


def third_step(run: Path) -> Callable[[], bool]:
    log = run / "metrics.jsonl"
    return lambda: log.exists() and len(log.read_text().splitlines()) >= 3


def test_ctrl_c_ends_the_step_writes_a_checkpoint_and_the_same_command_goes_on(whole: Config, tmp_path: Path) -> None:
    """It goes to the trainer and all its workers."""
    config = replace(whole, output=tmp_path / "stopped")
    process = Forked(main, config)
    wait_for(third_step(config.output), process)
    os.killpg(process.pids[0], signal.SIGINT)
    done = process.wait()
    assert done.returncode == 0
    assert_stopped_and_goes_on(config, whole, "SIGINT", done.stdout)


def test_a_signal_to_accelerate_s_launcher_alone_does_the_same(whole: Config, tmp_path: Path) -> None:
    """It is what a container gets."""
    config = replace(whole, output=tmp_path / "stopped")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", SCRIPT, *flags(config)]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(third_step(config.output), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)  # until the trainer, too, has closed its output
    assert process.returncode == -signal.SIGTERM
    assert_stopped_and_goes_on(config, whole, "SIGTERM", output)


def assert_stopped_and_goes_on(config: Config, whole: Config, sent: str, output: str) -> None:
    assert f"stopped by {sent} after step" in output
    (checkpoint,) = (config.output / "checkpoints").iterdir()
    assert 3 <= int(checkpoint.name.removeprefix("step-")) < 30
    main(config)
    x, y = state(config.output, 30), state(whole.output, 30)
    assert all(torch.equal(x[k], y[k]) for k in x)


def test_a_signal_to_one_process_of_two_stops_both_after_the_same_step(whole: Config, tmp_path: Path) -> None:
    config = replace(whole, output=tmp_path / "stopped")
    process = Forked(main, config, processes=2)
    wait_for(third_step(config.output), process)
    os.kill(process.pids[1], signal.SIGTERM)
    done = process.wait()
    assert done.returncode == 0
    (checkpoint,) = (config.output / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert 3 <= step < 30
    assert f"after step {step}: run it again to go on" in done.stdout


def test_a_finished_run_is_left_as_it_is(reference: Path, photos: Path) -> None:
    before = {p: p.read_bytes() for p in reference.rglob("*") if p.is_file()}
    main(config_for(photos, reference))
    assert {p: p.read_bytes() for p in reference.rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(reference: Path, photos: Path, tmp_path: Path) -> None:
    config = config_for(photos, tmp_path / "run")
    main(config)
    newest = config.output / "checkpoints" / "step-6" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=r"step-6 is damaged .*digest.*passed over"):
        main(config)
    assert_identical(reference, config.output)


def test_other_settings_are_refused_with_the_fields_that_differ(reference: Path, photos: Path) -> None:
    with pytest.raises(RunError, match=r"other settings \(kl_weight: 0.0001 -> 0.5; seed: 0 -> 1\)"):
        main(config_for(photos, reference, kl_weight=0.5, seed=1))
    main(config_for(photos, reference, num_workers=1, log_every=7))  # these change no result


def test_bf16_at_a_small_learning_rate_changes_full_precision_weights(photos: Path, tmp_path: Path) -> None:
    config = config_for(
        photos, tmp_path / "run", mixed_precision="bf16", learning_rate=4.5e-6, warmup_steps=0, adversarial="none"
    )
    main(config)
    first, last = state(config.output, 4), state(config.output, 6)
    weight = "vae/vae.decoder.conv_out.weight"
    assert last[weight].dtype == torch.float32
    moved = (first[weight] != last[weight]).float().mean().item()
    assert moved > 0.9
    assert (first[weight] - last[weight]).abs().max() < 1e-4
    assert not torch.equal(last[weight].bfloat16().float(), last[weight])
    assert all(t.dtype == torch.float32 for k, t in last.items() if k.startswith(("ema/shadow", "vae_optimizer")))


def test_every_term_is_logged_by_its_name(reference: Path) -> None:
    lines = metrics(reference)
    assert [m["step"] for m in lines if "learning_rate" in m] == [1, 2, 3, 4, 5, 6]
    early, late = lines[0], next(m for m in lines if m["step"] == 6)
    always = {
        "l1",
        "lpips_random",
        "kl",
        "vae_grad_norm",
        "images_per_second",
        "waiting_for_data",
        "seconds",
        "skipped_steps",
    }
    channels = {f"{name}/{c}" for name in ("kl_bits", "latents_mean", "latents_std") for c in range(8)}
    adversarial = {"adversarial", "discriminator", "discriminator_accuracy", "discriminator_grad_norm"}
    assert always | channels <= early.keys()
    assert not adversarial & early.keys()
    assert always | channels | adversarial | {"adaptive_weight"} <= late.keys()
    first, second = (m for m in lines if m["step"] in (3, 4) and "l1" in m)
    assert first["adaptive_weight"] == first["adversarial"] == 0  # each line has the weight of its own step
    assert second["adaptive_weight"] > 0
    assert second["adversarial"] != 0
    assert any("val_psnr" in m for m in lines)
    record = json.loads((reference / "config.json").read_text())
    assert record["config"]["kl_weight"] == 1e-4
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_the_model_and_the_pictures_of_a_run_are_of_the_averaged_weights(reference: Path, photos: Path) -> None:
    saved = load_autoencoder(str(reference))
    checkpoint = state(reference)
    parameters = dict(saved.named_parameters())
    for i, (name, parameter) in enumerate(parameters.items()):
        assert torch.equal(parameter, checkpoint[f"ema/shadow/{i}"]), name
    assert not all(torch.equal(parameter, checkpoint[f"vae/vae.{name}"]) for name, parameter in parameters.items())
    images, _ = validation_images(open_source(str(photos)), side=32)
    with torch.inference_mode():
        made = torch.cat([saved(i[None]).sample for i in images])
    expected = np.asarray(reconstruction_grid(images[:8], made[:8])).astype(int)
    with Image.open(reference / "samples" / "step-6.png") as grid:
        assert np.abs(np.asarray(grid).astype(int) - expected).max() <= 4  # of errors, enlarged
    (line,) = [m for m in metrics(reference) if "val_psnr" in m]
    values = [
        peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(to_pixels(images), to_pixels(made), strict=True)
    ]
    assert line["val_psnr"] == pytest.approx(np.mean(values), abs=0.01)


def test_images_of_five_channels_go_all_the_way(tmp_path: Path) -> None:
    """Arrays and pages, into every loss, a saved model and the benchmark's figures."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        pixels = np.kron(rng.integers(0, 256, (5, 6, 5)), np.ones((8, 8, 1))).astype(np.uint8)
        np.save(folder / f"{i}.npy", pixels)
        tifffile.imwrite(folder / f"{i}.tif", np.moveaxis(pixels, 2, 0), photometric="minisblack")
    config = config_for(
        folder, tmp_path / "run", channels=5, reading=ReadOptions(pages_as_channels=True), steps=3, disc_start=1
    )
    main(config)
    lines = metrics(config.output)
    assert {"lpips_random", "discriminator", "bad_images"} <= lines[-2].keys()
    assert lines[-2]["bad_images"] == 0
    reconstruction.main(
        reconstruction.Config(
            vae=(str(config.output),),
            data=str(folder),
            output=tmp_path / "out",
            full=True,
            perceptual="none",
            reading=ReadOptions(pages_as_channels=True),
        )
    )
    rows = {r["image"]: float(r["psnr"]) for r in csv.DictReader((tmp_path / "out" / "per_image.csv").open())}
    assert len(rows) == 12
    vae = load_autoencoder(str(config.output))
    images = torch.from_numpy(np.load(folder / "3.npy")).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        made = to_pixels(vae(images).sample)[0]
    expected = peak_signal_noise_ratio(np.load(folder / "3.npy"), made, data_range=255)
    assert rows["3.npy"] == rows["3.tif"] == pytest.approx(expected, abs=0.01)


def test_the_scale_of_latents_that_will_be_others_is_forgotten(photos: Path, tmp_path: Path) -> None:
    main(config_for(photos, tmp_path / "first", steps=1))
    noisy = config_for(photos, tmp_path / "noisy", steps=1, init=str(tmp_path / "first"))
    with pytest.raises(ConfigError, match="needs the scale of the latents: give --init CACHE/vae"):
        main(replace(noisy, train="robust-decoder"))
    vae = load_autoencoder(str(tmp_path / "first"))
    channels = vae.config.latent_channels
    vae.register_to_config(latents_mean=[0.5] * channels, latents_std=[2.0] * channels)
    vae.save_pretrained(tmp_path / "first" / "vae")
    for train, mean in (("all", None), ("decoder", [0.5] * channels)):
        config = config_for(photos, tmp_path / train, steps=1, init=str(tmp_path / "first"), train=train)
        main(config)
        assert load_autoencoder(str(config.output)).config.latents_mean == mean


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_run_starts_from_an_autoencoder_on_the_hub_by_its_id(
    subfolder: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub keeps what it downloaded: a repository of the autoencoder alone, and one of a pipeline."""
    folder, commit = tmp_path / "hub" / "models--someone--vae", "0123abcd" * 5
    torch.manual_seed(1)
    vae = PatchAutoencoderKL(block_out_channels=(16, 32))
    vae.save_pretrained(folder / "snapshots" / commit / subfolder)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    main(config_for(photos, tmp_path / "run", steps=1, init="someone/vae", train="decoder"))
    trained = load_autoencoder(str(tmp_path / "run"))
    torch.testing.assert_close(trained.encoder.state_dict(), vae.encoder.state_dict(), rtol=0, atol=0)
    with pytest.raises(LdmVaeError, match="someone/other could not be had from the hub"):
        main(config_for(photos, tmp_path / "other", steps=1, init="someone/other"))


def test_the_mean_and_deviation_that_are_logged_are_those_of_the_latents(photos: Path, tmp_path: Path) -> None:
    config = config_for(photos, tmp_path / "run", steps=1, adversarial="none", perceptual="none")
    vae = build(config, Accelerator()).bare.vae
    crops = CropDataset(open_source(str(photos)), seed=0, resolution=32)
    images = torch.from_numpy(np.stack([crops[position].image for position in range(8)]))
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    main(config)
    line = metrics(config.output)[0]
    for c in range(8):
        channel = posterior.mean[:, c]
        assert line[f"latents_mean/{c}"] == pytest.approx(channel.mean().item(), abs=1e-6)
        assert line[f"latents_std/{c}"] == pytest.approx(channel.std(correction=0).item(), abs=1e-5)
    bits = sum(line[f"kl_bits/{c}"] for c in range(8)) * 8 * 8
    assert bits * np.log(2) == pytest.approx(posterior.kl().mean().item(), rel=1e-4)
    assert line["kl"] == pytest.approx(1e-4 * posterior.kl().mean().item() / 32**2, rel=1e-4)


def test_nan_steps_are_skipped_counted_and_then_lead_back_to_the_checkpoint(
    reference: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = train_vae.vae_step
    poisoned = {"left": 3}

    def poison(batches: Any, state: Any, config: Config, **keywords: Any) -> Any:
        if keywords["step"] >= 3 and poisoned["left"] > 0:
            poisoned["left"] -= 1
            with torch.no_grad():
                batch = next(batches)
                batch.images.fill_(float("nan"))
                batches = iter([batch])
        return real(batches, state, config, **keywords)

    monkeypatch.setattr(train_vae, "vae_step", poison)
    config = config_for(photos, tmp_path / "run", checkpoint_every=3)
    main(config)
    assert "not finite in 3 steps in a row, up to step 6: back to the checkpoint of step 3" in capsys.readouterr().out
    assert_identical(reference, config.output)
    assert [m["skipped_steps"] for m in metrics(config.output) if m["step"] == 6 and "kl" in m] == [3]

    poisoned["left"] = 2  # too few to go back
    config = config_for(photos, tmp_path / "skipped")
    main(config)
    assert metrics(config.output)[-1]["step"] == 6
    assert [m["skipped_steps"] for m in metrics(config.output) if m["step"] == 6 and "kl" in m] == [2]

    poisoned["left"] = 10**9
    with pytest.raises(RunError, match="once more"):
        main(config_for(photos, tmp_path / "hopeless", checkpoint_every=3))
    config = config_for(photos, tmp_path / "early", checkpoint_every=4)  # due at the first bad step: not written
    with pytest.raises(RunError, match="before the first checkpoint"):
        main(config)
    assert {m["step"] for m in metrics(config.output)} >= {1, 2, 3}  # the curve is there to be looked at


def test_a_folder_with_every_kind_of_damage_trains_and_names_each_bad_file(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data set with spaces, ünïcödé and 写真"
    folder.mkdir()
    image = Image.open(next(photos.rglob("*.png")))
    for mode, kind in (("1", "png"), ("L", "tiff"), ("LA", "png"), ("P", "gif"), ("RGBA", "webp"), ("CMYK", "jpg")):
        image.convert(mode).save(folder / f"mode {mode}.{kind}")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "16 bit.png")
    image.save(folder / "photo.avif")
    image.save(folder / "photo.bmp")
    Image.new("RGB", (1, 1), "red").save(folder / "one pixel.png")
    Image.new("RGB", (1, 5000), "red").save(folder / "thin.png")
    np.save(folder / "array.npy", np.asarray(image))
    good = len(list(folder.iterdir()))
    (folder / "loop").symlink_to(folder)
    data = (folder / "photo.bmp").read_bytes()
    bad = {
        "empty.png": (b"", "empty file"),
        "truncated 写真.bmp": (data[: len(data) // 2], "truncated"),
        "text.jpg": (b"this is no image", "cannot identify"),
        "bomb.png": (bomb(), "more than the limit"),
        "bands.npy": (npy(np.zeros((40, 40, 7), np.uint8)), "7 channels, the model has 3"),
    }
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    (folder / "gone.png").symlink_to(folder / "nowhere")
    config = config_for(folder, tmp_path / "run", steps=12, adversarial="none", num_workers=1)
    main(config)
    with open(config.output / "bad_images.csv", newline="", encoding="utf-8") as file:
        rows = {row["name"]: row["reason"] for row in csv.DictReader(file)}
    assert rows.keys() == bad.keys() | {"gone.png"}
    for name, (_, reason) in bad.items():
        assert reason in rows[name]
    assert "cannot be read: No such file" in rows["gone.png"]
    assert good == 12
    assert metrics(config.output)[-1]["step"] == 12
    assert [m["bad_images"] for m in metrics(config.output) if m["step"] == 12 and "l1" in m] == [6]

    only_bad = tmp_path / "only bad"
    only_bad.mkdir()
    (only_bad / "text.jpg").write_bytes(b"this is no image")
    with pytest.raises(LdmVaeError, match=r"no usable image: all 1 that were tried are bad, such as text.jpg"):
        main(config_for(only_bad, tmp_path / "nothing"))
    assert "text.jpg,cannot be decoded" in (tmp_path / "nothing" / "bad_images.csv").read_text()
    config = config_for(only_bad, tmp_path / "nothing to train on", val_data=str(photos))
    with pytest.raises(LdmVaeError, match="no usable image"):
        main(config)
    assert "text.jpg,cannot be decoded" in (config.output / "bad_images.csv").read_text()


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes: a header, and nothing behind it."""
    import struct
    import zlib

    body = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    data = zlib.compress(bytes(1000))
    idat = b"IDAT" + data
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        + struct.pack(">I", len(data)) + idat + struct.pack(">I", zlib.crc32(idat))
    )  # fmt: skip


def npy(array: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-such-flag"], "no-such-flag"),
        (["--steps", "many"], "steps"),
        (["--steps", "0"], "--steps is 0: it must be at least 1"),
        (["--checkpoint-every", "0"], "--checkpoint-every is 0"),
        (["--shorter-side", "-3"], "--shorter-side is -3"),
        (["--ema-decay", "0.9"], "ema-decay"),  # the preset's
        (["--kl-weight", "-1"], "--kl-weight is -1"),
        (["--init", "{tmp}/tiny"], "AutoencoderTiny has no posterior"),
        (["--data", "{tmp}/missing"], "no such folder or file"),
        (["--data", "{tmp}/empty"], "no images in"),
        (["--resolution", "34"], "34 is not a multiple of 4: try 32"),
        (["--resolution", "16"], "needs crops of 32 pixels"),
        (["--target-bpp", "1"], "target-bpp"),  # the codec's
        (["--resolution", "20", "--perceptual", "none"], "the discriminator needs crops of 24 pixels"),
        (
            ["--gradient-accumulation-steps", "3"],
            "batch size 8 is not a multiple of 1 processes x 3 micro-batches: try 9",
        ),
        (["--output", "{tmp}/file"], "cannot write to"),
        (["--output", "/proc/nothing"], "cannot write to"),
        (["--channels", "2"], "the images have 2"),
        (["--init", "{tmp}/missing"], "no such model"),
        (["--learning-rate", "-1"], "must be more than 0"),
        (["--tracker", "nonsense"], "nonsense"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    words: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file")
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")
    given = flags(config_for(photos, tmp_path / "run", **BY_FLAGS))
    given += [w.format(tmp=tmp_path) for w in words]
    with pytest.raises(SystemExit) as ended, one_line_errors():
        main(train_vae.parse_config(PRESETS, description="", args=given))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


def test_the_script_itself_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    words = ["demo", "--data", str(tmp_path / "no"), "--output", str(tmp_path / "run")]
    done = launch(run_script, "training/train_vae.py", *words)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line] == [f"error: no such folder or file: {tmp_path}/no"]


def test_the_decoder_of_a_diffusers_autoencoder_is_trained_and_its_encoder_left(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(tmp_path / "vae")
    config = config_for(photos, tmp_path / "run", init=str(tmp_path / "vae"), train="decoder", ema_decay=0.0)
    main(config)
    before = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    after = diffusers.AutoencoderKL.from_pretrained(config.output / "vae").eval()
    for (name, x), (_, y) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        frozen = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(x, y) == frozen or (not frozen and x.abs().sum() == 0), name
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    loaded = load_autoencoder(str(config.output))
    assert isinstance(loaded, diffusers.AutoencoderKL)
    assert torch.equal(loaded(images).sample, after(images).sample)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 1, "reconstruction": "charbonnier"},
        {"adversarial": "non-saturating", "spectral_norm": True, "reconstruction": "l2"},
        {"gradient_checkpointing": True, "shorter_side": 40, "tracker": "tensorboard"},
        {"compile": True, "mixed_precision": "bf16"},
    ],
    ids=lambda c: " ".join(c),
)
def test_every_option_trains(changes: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    if "compile" in changes:  # few layers: compiling takes long
        one = {"encoder_layers_per_block": (1,), "decoder_layers_per_block": (1,)}
        PatchAutoencoderKL(block_out_channels=(16,), **one).save_pretrained(tmp_path / "vae")
        changes = changes | {"init": str(tmp_path / "vae")}
    config = config_for(photos, tmp_path / "run", steps=3, **changes)
    main(config)
    lines = metrics(config.output)
    assert lines[-1]["step"] == 3
    assert all(np.isfinite(v) for m in lines for v in m.values())
    if config.tracker == "tensorboard":
        files = [EventAccumulator(str(f)).Reload() for f in config.output.rglob("events.out.tfevents*")]
        logged = {e.step: e.value for f in files if "kl" in f.Tags()["scalars"] for e in f.Scalars("kl")}
        assert logged == pytest.approx({m["step"]: m["kl"] for m in lines if "kl" in m}, rel=1e-6)


def test_parts_that_have_no_names_are_not_compiled_one_by_one(photos: Path, tmp_path: Path) -> None:
    diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    with pytest.raises(ConfigError, match="--compile is not for AutoencoderKL"):
        main(config_for(photos, tmp_path / "run", init=str(tmp_path / "vae"), compile=True, adversarial="none"))


def test_a_run_that_finds_other_images_says_so(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    config = config_for(folder, tmp_path / "run", steps=1, adversarial="none")
    main(config)
    main(config)
    assert "warning" not in capsys.readouterr().out
    next(folder.rglob("*.png")).unlink()
    for said in ("warning: 11 images where there were 12", ""):
        main(config)
        assert said in capsys.readouterr().out


def test_it_learns(tmp_path: Path) -> None:
    """A few seconds of training reconstructs dead leaves it has not seen far better than their mean colour would."""
    config = replace(
        DEMO,
        data=("procedural:dead-leaves#train",),
        val_data="procedural:dead-leaves#held-out",
        output=tmp_path / "run",
        steps=200,
        batch_size=4,
        resolution=32,
        perceptual="none",
        adversarial="none",
        learning_rate=8e-3,
        ema_decay=0.95,
        num_workers=0,
        tracker="none",
    )
    with narrow(config.architecture):
        main(config)
    psnr = [m["val_psnr"] for m in metrics(config.output) if "val_psnr" in m]
    assert psnr[-1] > psnr[0] + 5
    assert psnr[-1] > 18
