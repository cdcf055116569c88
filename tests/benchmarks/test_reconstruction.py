from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.reconstruction import Config, main
from ldm_vae.errors import DataError, one_line_errors
from ldm_vae.metrics import frechet_distance, kernel_distance, precision_recall
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.objectives.perceptual import FeatureDistance, LPIPSLoss
from ldm_vae.runs.config import parse_flags
from tests.processes import launch

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of the demo's size that hands the image through, roughly: trained for a moment."""
    folder = tmp_path_factory.mktemp("model") / "vae"
    torch.manual_seed(0)
    model = PatchAutoencoderKL(block_out_channels=(16,), encoder_layers_per_block=(1,), decoder_layers_per_block=(1,))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(60):
        images = torch.nn.functional.interpolate(torch.rand(4, 3, 4, 4) * 2 - 1, size=32, mode="bilinear")
        (model(images).sample - images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def rows(output: Path) -> list[dict[str, str]]:
    with open(output / "per_image.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_figures_depend_on_neither_company_nor_processes_and_are_scikit_images(
    photos: Path, vae: Path, tmp_path: Path
) -> None:
    shared: dict[str, Any] = {"vae": (str(vae),), "data": str(photos), "resolution": 48}
    shared |= {"perceptual": "random", "lpips_backbone": "squeeze"}
    torch.set_num_threads(1)  # as in the launched processes: sums in the same order
    for num_images in (1, 5, 12):
        main(Config(output=tmp_path / f"{num_images}", num_images=num_images, **shared))
    done = launch(main, Config(output=tmp_path / "two", **shared), processes=2)
    assert done.returncode == 0, done.stderr

    reference = rows(tmp_path / "12")
    assert len(reference) == 12
    for other in ("1", "5"):
        assert rows(tmp_path / other) == reference[: int(other)]
    assert rows(tmp_path / "two") == reference

    model = PatchAutoencoderKL.from_pretrained(vae).eval()
    for row in reference:
        square = ImageOps.fit(Image.open(photos / row["image"]), (48, 48), Image.Resampling.BICUBIC)
        pixels = np.asarray(square)
        images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            output = model(images).sample[0].permute(1, 2, 0)
        other = ((output.clamp(-1, 1) + 1) * 127.5).round().numpy().astype(np.uint8)
        assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(pixels, other, data_range=255), abs=1e-3)
        ssim = structural_similarity(
            pixels, other, data_range=255, channel_axis=2, gaussian_weights=True, use_sample_covariance=False
        )
        assert float(row["ssim"]) == pytest.approx(ssim, abs=1e-4)

        pair = [torch.from_numpy(p.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1 for p in (pixels, other)]
        with torch.no_grad():
            distance = LPIPSLoss("squeeze", pretrained=False).lpips(*pair)
        assert float(row["lpips_squeeze_random"]) == pytest.approx(distance.item(), rel=0.02, abs=1e-4)

    results = json.loads((tmp_path / "12" / "results.json").read_text())
    figures = results["results"][str(vae)]
    mean = np.mean([float(r["psnr"]) for r in reference])
    assert figures["metrics"]["psnr"]["mean"] == pytest.approx(mean)
    assert figures["metrics"]["psnr"]["low"] < mean < figures["metrics"]["psnr"]["high"]
    assert figures["latent_shape"] == [4, 12, 12]
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    table = (tmp_path / "12" / "table.md").read_text()
    assert "lpips_squeeze_random" in table
    assert f"{mean:.4g}" in table
    assert Image.open(tmp_path / "12" / "gallery.png").size[0] > 8 * 256


def test_whole_images_of_any_size_side_by_side_and_bad_ones_named(
    photos: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, path in enumerate(sorted(photos.rglob("*.png"))[:3]):
        Image.open(path).crop((0, 0, 50 + i, 41)).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"damage")
    other = tmp_path / "other"
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(other)
    config = Config(vae=(str(vae), str(other)), data=str(folder), output=tmp_path / "out", full=True, perceptual="none")
    main(config)
    assert [(r["model"], r["image"]) for r in rows(config.output)] == [
        (m, f"{i}.png") for m in (str(vae), str(other)) for i in range(3)
    ]
    assert "bad.png" in (config.output / "bad_images.csv").read_text()
    assert "3 images, 1 bad" in capsys.readouterr().out
    model = PatchAutoencoderKL.from_pretrained(vae).eval()
    pixels = np.asarray(Image.open(folder / "1.png"))  # 51 x 41, continued by its last row and column to 52 x 44
    padded = np.pad(pixels, ((0, 3), (0, 1), (0, 0)), mode="edge")
    images = torch.from_numpy(padded).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        made = ((model(images).sample[0, :, :41, :51].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    expected = peak_signal_noise_ratio(pixels, made.astype(np.uint8), data_range=255)
    assert float(rows(config.output)[1]["psnr"]) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no --vae given"),
        (["--vae", "{tmp}/missing"], "no such model"),
        (["--vae", "{vae}", "--data", "{tmp}/empty"], "no images in"),
        (["--vae", "{vae}", "--data", "{tmp}/bad", "--perceptual", "none"], "no usable image"),
        (["--vae", "{vae}", "--data", "procedural:dead-leaves"], "has no end"),
        (["--vae", "{vae}", "--resolution", "0"], "must be at least 1"),
        (["--vae", "{vae}", "--resolution", "2"], "less than a model's stride"),
        (["--vae", "{vae}", "--output", "{tmp}/bad/x.png/out", "--perceptual", "none"], "cannot write to"),
        (["--vae", "{vae}", "--nonsense"], "nonsense"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    words: list[str], message: str, photos: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"damage")
    given = ["--data", str(photos), "--output", str(tmp_path / "out")]
    given += [w.format(tmp=tmp_path, vae=vae) for w in words]
    with pytest.raises(SystemExit) as ended, one_line_errors():
        main(parse_flags(Config, description="", args=given))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_distances_in_pretrained_features_of_each_image_and_of_the_sets(
    photos: Path, vae: Path, tmp_path: Path
) -> None:
    main(
        Config(
            vae=(str(vae),),
            data=str(photos),
            output=tmp_path,
            resolution=48,
            num_images=6,
            perceptual="features",
            features="efficientnet-lite0",
            gallery=0,
        )
    )
    model, network = PatchAutoencoderKL.from_pretrained(vae).eval(), FeatureDistance()
    pairs = []
    for row in rows(tmp_path):
        square = ImageOps.fit(Image.open(photos / row["image"]), (48, 48), Image.Resampling.BICUBIC)
        image = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            reconstruction = ((model(image).sample.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
            assert float(row["features"]) == pytest.approx(network(reconstruction, image).item(), rel=0.02, abs=1e-4)
            pairs.append(torch.cat([network.features.pooled(x) for x in (image, reconstruction)]).double())
    originals, reconstructions = torch.stack(pairs).unbind(dim=1)
    sets = json.loads((tmp_path / "results.json").read_text())["results"][str(vae)]["sets"]
    assert sets["frechet"] == pytest.approx(frechet_distance(originals, reconstructions), rel=0.02)
    assert sets["kernel"] == pytest.approx(kernel_distance(originals, reconstructions), rel=0.05)
    assert (sets["precision"], sets["recall"]) == precision_recall(originals, reconstructions)
    assert "frechet" in (tmp_path / "table.md").read_text()


def test_sets_of_too_few_images_are_refused(photos: Path, vae: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"vae": (str(vae),), "data": str(photos), "resolution": 48, "perceptual": "none"}
    with pytest.raises(DataError, match="3 images are too few for --features: at least 4"):
        main(Config(output=tmp_path, num_images=3, features="efficientnet-lite0", **shared))
