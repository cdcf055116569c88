"""Caching as people run it: on several processes, killed, gone on with, and misused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm_vae.data.conversion import to_images
from ldm_vae.data.images import centre_square
from ldm_vae.data.sources import open_source
from ldm_vae.errors import ConfigError, DataError, LdmVaeError, one_line_errors
from ldm_vae.latents.cache import LatentCache
from ldm_vae.latents.scaling import as_stored, scale_latents
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.interface import posterior_of
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.runs.config import parse_flags
from tests.processes import kill_at, launch, run_script, run_until_killed
from training import cache_latents
from training.cache_latents import Config, main


def config_for(photos: Path, vae: Path, output: Path) -> Config:
    return Config(
        vae=str(vae),
        data=str(photos),
        output=output,
        resolution=32,
        shard_size=3,
        batch_size=2,
        num_workers=0,
        flip=True,
    )


def words(config: Config) -> list[str]:
    given = ["--vae", config.vae, "--data", config.data, "--output", str(config.output), "--resolution", "32"]
    return [*given, "--shard-size", "3", "--batch-size", "2", "--num-workers", "0", "--flip"]


@pytest.fixture(scope="module")
def reference(photos: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "cache"
    torch.set_num_threads(1)
    main(config_for(photos, vae, output))
    return output


def test_every_image_and_its_mirror_image_is_there_as_the_vae_encodes_it(
    reference: Path, photos: Path, vae: Path
) -> None:
    cache, source, model = LatentCache(reference), open_source(str(photos)), load_autoencoder(str(vae))
    assert len(cache) == len(source) == 12
    assert cache.plan.classes == source.classes
    for index in range(12):
        image = to_images(centre_square(source[index].pixels, 32))[None]
        for mirrored in (False, True):
            with torch.no_grad():
                expected = model.encode(image.flip(-1) if mirrored else image).latent_dist.parameters[0]
            assert np.allclose(cache.load(index, mirrored)[0], as_stored(expected), atol=1e-3, rtol=1e-3)
        assert cache.load(index)[1] == source[index].label
    bytes_an_image = sum(f.stat().st_size for f in reference.glob("*.safetensors")) / 12
    assert bytes_an_image == pytest.approx(2 * 8 * 4 * 4 * 2 + 16, abs=100)  # and a header a shard


def test_scaled_latents_of_the_whole_set_have_mean_0_and_deviation_1(reference: Path) -> None:
    cache, model = LatentCache(reference), load_autoencoder(str(reference))
    assert model.config.latents_mean == pytest.approx(cache.statistics.mean.tolist())
    posterior = posterior_of(
        torch.from_numpy(np.stack([cache.load(i, m)[0] for i in range(12) for m in (False, True)]))
    )
    torch.manual_seed(0)
    samples = torch.cat([scale_latents(model, posterior.sample()) for _ in range(100)])
    assert samples.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert (samples.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02


def statistics_of(folder: Path) -> dict[str, list[float]]:
    return json.loads((folder / "index.json").read_text())["statistics"]


def test_three_processes_make_the_cache_that_one_makes(
    reference: Path, photos: Path, vae: Path, tmp_path: Path
) -> None:
    done = launch(main, config_for(photos, vae, tmp_path / "cache"), processes=3)
    assert done.returncode == 0, done.stderr
    one, three = statistics_of(reference), statistics_of(tmp_path / "cache")
    assert one["count"] == three["count"] == 12 * 2 * 16
    assert three["mean"] == pytest.approx(one["mean"], rel=1e-6)
    assert three["squares"] == pytest.approx(one["squares"], rel=1e-6)
    for shard in range(4):
        a, b = (load_file(f / f"shard-{shard:05d}.safetensors") for f in (reference, tmp_path / "cache"))
        assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-3) for k in a)


def killed_at_the_third_shard(config: Config) -> None:
    kill_at(3, cache_latents, "write_shard")
    main(config)


def test_a_killed_job_goes_on_without_doing_finished_shards_again(
    reference: Path, photos: Path, vae: Path, tmp_path: Path
) -> None:
    config = replace(config_for(photos, vae, tmp_path / "cache"), num_workers=1)
    run_until_killed(killed_at_the_third_shard, config)
    with pytest.raises(DataError, match="is not finished"):
        LatentCache(config.output)
    finished = {f: f.stat().st_mtime_ns for f in config.output.glob("shard-*")}
    assert len(finished) == 4  # two shards, two files each
    main(config)
    assert {f: f.stat().st_mtime_ns for f in finished} == finished
    assert (config.output / "index.json").read_bytes() == (reference / "index.json").read_bytes()
    before = {f: f.stat().st_mtime_ns for f in config.output.iterdir()}
    main(config)  # nothing is left to do
    assert {f: f.stat().st_mtime_ns for f in config.output.iterdir()} == before


def test_a_cache_begun_before_keeps_the_order_of_its_classes(
    photos: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its classes were sorted as strings: 1, 10, 2."""
    for i, file in enumerate(sorted(photos.rglob("*.png"))):
        place = tmp_path / "data" / ("1", "2", "10")[i % 3] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    config = config_for(tmp_path / "data", vae, tmp_path / "cache")
    with monkeypatch.context() as before:
        before.setattr("ldm_vae.data.file_sources.in_natural_order", str)
        main(config)
    cache = LatentCache(config.output)
    labels = [cache.load(i)[1] for i in range(len(cache))]
    for file in (config.output / "shard-00002.json", config.output / "index.json"):
        file.unlink()  # as if it had been stopped there
    main(config)
    cache = LatentCache(config.output)
    assert cache.classes == ("1", "10", "2")
    assert [cache.load(i)[1] for i in range(len(cache))] == labels == [0] * 4 + [1] * 4 + [2] * 4


def run_of(vae: Path, folder: Path, **config: int | None) -> Path:
    """A run that trained this autoencoder with these flags."""
    shutil.copytree(vae, folder / "vae")
    (folder / "config.json").write_text(json.dumps({"config": config}))
    return folder


@pytest.mark.parametrize(
    ("flags", "side"), [({"resolution": 48, "shorter_side": None}, 48), ({"resolution": 32, "shorter_side": 60}, 56)]
)
def test_images_have_the_size_that_the_vae_was_trained_on_unless_told_otherwise(
    flags: dict[str, int | None],
    side: int,
    photos: Path,
    vae: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_of(vae, tmp_path / "run", **flags)
    config = replace(config_for(photos, run, tmp_path / "cache"), resolution=None)
    main(config)
    assert f"images of {side} x {side} pixels" in capsys.readouterr().out
    plan = LatentCache(config.output).plan
    assert (plan.resolution, plan.latent_shape) == (side, (4, side // 8, side // 8))
    main(replace(config, resolution=32, output=tmp_path / "other"))
    assert LatentCache(tmp_path / "other").plan.resolution == 32


def test_a_model_without_its_run_needs_a_resolution(photos: Path, vae: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say which size of images it was trained on: add --resolution 256"):
        main(replace(config_for(photos, vae, tmp_path / "cache"), resolution=None))


def test_a_shard_that_was_removed_is_made_again_with_a_new_index(photos: Path, vae: Path, tmp_path: Path) -> None:
    config = config_for(photos, vae, tmp_path / "cache")
    main(config)
    whole = (config.output / "index.json").read_bytes()
    (config.output / "shard-00001.safetensors").unlink()
    (config.output / "index.json").write_text("stale")
    (config.output / ".shard-00001.safetensors.left").write_text("by a killed job")
    main(config)
    assert (config.output / "index.json").read_bytes() == whole
    assert not list(config.output.glob(".shard-*"))


def test_images_without_finite_latents_are_bad(
    photos: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cache_latents.encode_moments

    def poisoned(vae: object, images: torch.Tensor) -> torch.Tensor:
        moments = real(vae, images)
        moments[0] = float("nan")
        return moments

    monkeypatch.setattr(cache_latents, "encode_moments", poisoned)
    config = replace(config_for(photos, vae, tmp_path / "cache"), batch_size=3, num_workers=0)
    main(config)
    cache = LatentCache(config.output)
    assert np.isfinite(cache.statistics.mean).all()
    assert [r["count"] for r in cache.shards] == [2, 2, 2, 2]
    assert (config.output / "bad_images.csv").read_text().count("no finite latents") == 4


def test_any_diffusers_autoencoder_is_cached_and_its_scale_comes_back(photos: Path, tmp_path: Path) -> None:
    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny = diffusers.AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **small)
    kl = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    for model in (tiny, kl):
        model.save_pretrained(tmp_path / type(model).__name__)
        output = tmp_path / f"cache of {type(model).__name__}"
        main(replace(config_for(photos, tmp_path / type(model).__name__, output), flip=False))
        cache, loaded = LatentCache(output), load_autoencoder(str(output))
        moments = torch.from_numpy(np.stack([cache.load(i)[0] for i in range(12)]))
        assert moments.shape[1:] == (8, 16, 16)
        scaled = scale_latents(loaded, posterior_of(moments).mean)
        assert scaled.mean(dim=(0, 2, 3)).abs().max() < 0.02
        if model is tiny:
            assert (scaled.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02
            assert moments[:, 4:].max() < -29


def test_another_vae_or_other_data_is_refused(reference: Path, photos: Path, vae: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    PatchAutoencoderKL(block_out_channels=(16, 16)).save_pretrained(tmp_path)
    config = config_for(photos, vae, reference)
    for other, fields in (
        (replace(config, vae=str(tmp_path)), "vae"),
        (replace(config, data="procedural:shapes", num_images=12), "data, classes"),
        (replace(config, num_images=11), "num_images"),
    ):
        with pytest.raises(DataError, match=rf"something else \({fields} differ\): remove it to make them anew"):
            main(other)


def test_bad_images_are_left_out_and_named(photos: Path, vae: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, file in enumerate(sorted(photos.rglob("*.png"))[:4]):
        (folder / f"{i}.png").write_bytes(file.read_bytes() if i != 1 else b"no image")
    config = replace(config_for(folder, vae, tmp_path / "cache"), flip=False, num_workers=2)
    main(config)
    cache = LatentCache(config.output)
    assert np.array_equal(cache.load(1)[0], cache.load(2)[0])
    assert "1.png,cannot be decoded" in (config.output / "bad_images.csv").read_text()
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(LdmVaeError, match="no usable image: all 4"):
        main(replace(config, output=tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--resolution", "33"], "--resolution 33 is not a multiple of 8: try 32"),
        (["--batch-size", "0"], "--batch-size is 0: it must be at least 1"),
        (["--num-workers", "-1"], "--num-workers is -1: it must be at least 0"),
        (["--vae", "{tmp}/missing"], "no such model"),
        (["--data", "{tmp}/missing"], "no such folder or file"),
        (["--data", "procedural:shapes"], "has no end: add --num-images"),
        (["--output", "/proc/nothing"], "cannot write to"),
        (["--no-such-flag"], "no-such-flag"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    extra: list[str], message: str, photos: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(config_for(photos, vae, tmp_path / "cache")) + [w.format(tmp=tmp_path) for w in extra]
    with pytest.raises(SystemExit) as ended, one_line_errors():
        main(parse_flags(Config, description="", args=given))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_script_itself_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    words = ["--vae", str(tmp_path / "no"), "--data", ".", "--output", str(tmp_path / "cache")]
    done = launch(run_script, "training/cache_latents.py", *words)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line] == [f"error: no such model: {tmp_path}/no"]
