"""The benchmarks of denoising and anomalies, small: their figures against independent ones."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio

from benchmarks import anomaly, denoising
from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.corruption import Corruption
from ldm_vae.data.order import Stream, generator_at
from ldm_vae.data.sources import open_source
from ldm_vae.data.squares import read_usable
from ldm_vae.errors import ConfigError, DataError
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.reconstruction import denoise

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of stripes in the files of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for part, count in (("train", 300), ("t10k", 60)):
        labels = np.arange(count) % 10
        y, x = np.mgrid[:28, :28]
        stripes = 127 + 100 * np.sin((x * (labels[:, None, None] + 1) + y) / 6 + rng.normal(size=(count, 1, 1)) / 4)
        pixels = (stripes + rng.normal(size=stripes.shape) * 5).clip(0, 255).astype(np.uint8)
        header = bytes(16)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
        label_bytes = bytes(8) + labels.astype(np.uint8).tobytes()
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(label_bytes))
    return folder


def test_denoisers_see_the_same_noise_and_their_figures_are_right(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "damaged.png").write_bytes(b"damage")
    good = [i for i in range(3) if open_source(str(folder)).name(i) != "damaged.png"]
    assert len(good) == 2
    PatchAutoencoderKL(block_out_channels=(8, 8), noise_level=55.0).save_pretrained(tmp_path / "run" / "vae")
    denoising.main(
        denoising.Config(
            vae=str(tmp_path / "run"),
            data=str(folder),
            tune_on=str(folder),
            output=tmp_path / "out",
            sigmas=(25.0,),
            num_images=3,
            num_tuning=2,
        )
    )
    assert capsys.readouterr().out.count("left out: damaged.png") == 2
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    found = {r["method"]: r for r in record["results"]}
    assert list(found) == ["noisy", "Gaussian blur", "non-local means", "ours, blind", "ours, told sigma"]
    assert found["noisy"]["psnr"] == pytest.approx(20.17, abs=0.4)  # 20 log10(255 / 25), a little more by clipping
    assert found["non-local means"]["psnr"] > found["noisy"]["psnr"] + 3
    rows = list(csv.DictReader((tmp_path / "out" / "per_image.csv").open()))
    assert len(rows) == 2 * 5
    means = [float(r["psnr"]) for r in rows if r["method"] == "Gaussian blur"]
    assert found["Gaussian blur"]["psnr"] == pytest.approx(np.mean(means))
    vae = PatchAutoencoderKL.from_pretrained(tmp_path / "run" / "vae").eval()
    source = open_source(str(folder))
    for told in (None, 25.0):
        values = []
        for i in good:
            damaged = Corruption("gaussian", 25, 25)(source[i].pixels, generator_at(0, i, Stream.CORRUPTION)).input
            with torch.inference_mode():
                made = to_pixels(denoise(vae, to_images(damaged)[None], sigma=told))[0]
            values.append(peak_signal_noise_ratio(source[i].pixels, made, data_range=255))
        assert found["ours, blind" if told is None else "ours, told sigma"]["psnr"] == pytest.approx(np.mean(values))
    assert (tmp_path / "out" / "sigma-25.png").stat().st_size > 0
    with pytest.raises(ConfigError, match="sigmas"):
        denoising.main(denoising.Config(vae="", data="", tune_on="", output=tmp_path, sigmas=()))


def test_photos_of_16_bits_are_denoised_as_those_of_8(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels.astype(np.uint16) * 257, photometric="rgb")
    source = open_source(str(tmp_path))
    assert source[0].pixels.dtype == np.uint16
    assert np.array_equal(read_usable(source, None)[0], pixels)
    for count in (0, -1):
        with pytest.raises(ConfigError, match="num-images"):
            denoising.main(denoising.Config(vae="", data="", tune_on="", output=tmp_path, num_images=count))


def test_defects_of_tiles_are_judged_by_image_pixel_and_kind(
    tmp_path: Path, in_process: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anomaly, "seconds_of_script", in_process)
    rng = np.random.default_rng(0)
    data = tmp_path / "tiles"
    for folder in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
        (data / folder).mkdir(parents=True)
    for i in range(30):
        Image.fromarray(tile(rng)).save(data / "train" / "good" / f"{i}.jpg")
    for i in range(4):
        Image.fromarray(tile(rng)).save(data / "test" / "good" / f"{i}.jpg")
        pixels, mask = tile(rng), np.zeros((40, 56), np.uint8)
        mask[10:22, 12 + i : 26 + i] = 255
        pixels[mask > 0] = 255 * ((np.indices((40, 56)) // 4).sum(axis=0) % 2)[mask > 0]
        Image.fromarray(pixels).save(data / "test" / "hole" / f"{i}.jpg")
        Image.fromarray(mask).save(data / "ground_truth" / "hole" / f"{i}.png")
    config = anomaly.Config(
        data=data,
        output=tmp_path / "out",
        steps=2,
        resolution=32,
        batch_size=4,
        blur=1.0,
        sides=(16,),
        false_alarm_rate=0.4,
        preset="plain",
    )
    anomaly.main(config)
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {r["method"]: r for r in record["rows"]}
    assert {"ours, l1", "ours, ssim", "ours, mahalanobis", "5 nearest on pixels"} < rows.keys()
    assert rows["ours, l1"]["image_auroc"] == rows["ours, l1"]["hole"] == 1.0  # it differs in every way
    assert rows["ours, l1"]["pixel_auroc"] > 0.8
    assert rows["ours, l1"]["detected"] == 1.0
    best, fair = record["above_pca"]["best on these tiles"], record["above_pca"]["chosen by blemishes"]
    ours, pca = (rows[name]["image_auroc"] for name in ("ours, l1", best["than"]))
    assert pca == max(r["image_auroc"] for name, r in rows.items() if name.startswith("PCA"))
    assert best["low"] <= ours - pca <= best["high"]
    mean = record["above_pca"]["best mean on these tiles"]["than"]
    means = {name: r["image_auroc"] for name, r in rows.items() if name.endswith(", mean")}
    assert means[mean] == max(means.values())
    assert fair["than"] == max(record["pca_by_blemishes"], key=record["pca_by_blemishes"].get)
    assert record["pca_by_blemishes"].keys() == {name for name in rows if name.startswith("PCA")}
    anomaly.main(replace(config, preset="find"))
    by_finder = {r["method"]: r for r in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    assert by_finder.keys() - rows.keys() == {"ours, blemishes"}
    assert {name: r for name, r in by_finder.items() if name in rows} == {n: rows[n] for n in by_finder if n in rows}
    with pytest.raises(ConfigError, match="--false-alarm-rate is 1"):
        anomaly.main(replace(config, false_alarm_rate=1))
    with pytest.raises(DataError, match="train/good"):
        anomaly.main(anomaly.Config(data=tmp_path / "no", output=tmp_path / "out"))


def test_errors_of_components_are_scored_as_each_of_ours() -> None:
    rng = np.random.default_rng(0)
    good, test = ([tile(rng)[:, :, None] for _ in range(n)] for n in (12, 3))
    config = anomaly.Config(sides=(16,))
    found = {s.method: (s.scores, s.maps) for s in anomaly.pca_scores(good, test, config)}
    x, y = anomaly.flattened(good, 16), anomaly.flattened(test, 16)
    basis = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][:4]
    errors = np.square((y - x.mean(axis=0)) @ (np.eye(256) - basis.T @ basis))
    roots = np.sqrt(errors).reshape(3, 16, 16)
    finder = np.stack([gaussian_filter(m, 2 * 16 / 256) for m in roots])
    restorer = np.stack([gaussian_filter(m, 4 * 16 / 128) for m in roots])
    around = np.stack([gaussian_filter(m, 12 * 16 / 128) + 0.1 * m.mean() for m in restorer])

    def largest(maps: np.ndarray, count: int) -> np.ndarray:
        return np.sort(maps.reshape(3, -1), axis=1)[:, -count:].mean(axis=1)

    expected = {
        "mean": errors.mean(axis=1),
        "smooth": largest(restorer, 13),
        "relative to the surroundings": largest(restorer / around, 13),
        "as ours": largest(finder, 5),
    }
    counts = ("4", "8", "0.95 of the variance", "0.99 of the variance")
    assert found.keys() == {f"PCA of {n} at 16x16, {scoring}" for n in counts for scoring in expected}
    _, strengths, directions = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    kept = np.cumsum(strengths**2) / np.sum(strengths**2)
    basis = directions[: int(np.argmax(kept >= 0.95)) + 1]
    assert 4 < len(basis) < 12
    left = np.square((y - x.mean(axis=0)) @ (np.eye(256) - basis.T @ basis)).mean(axis=1)
    assert np.allclose(found["PCA of 0.95 of the variance at 16x16, mean"][0], left, rtol=1e-3)
    for scoring, values in expected.items():
        assert np.allclose(found[f"PCA of 4 at 16x16, {scoring}"][0], values, rtol=1e-3), scoring
    assert np.allclose(found["PCA of 4 at 16x16, as ours"][1], finder, atol=1e-4)


def test_the_mean_of_the_ordered_pairs_is_the_area_under_the_curve() -> None:
    rng = np.random.default_rng(0)
    scores, anomalous = rng.integers(0, 9, 50), rng.random(50) < 0.4  # with ties
    area = anomaly.ordered_pairs(scores, anomalous).mean()
    assert area == pytest.approx(anomaly.auroc(scores, anomalous))
    assert 0.3 < area < 0.7
    interval = anomaly.difference_interval(scores + 9 * anomalous, scores, anomalous, seed=0)
    assert interval["low"] < 1 - area < interval["high"]


def share_in_order(scores: np.ndarray, anomalous: np.ndarray) -> float:
    """The area under the ROC curve of scores without ties."""
    return float((scores[anomalous][:, None] > scores[~anomalous]).mean())


def test_the_interval_of_mean_areas_is_that_of_images_drawn_again_class_by_class() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    theirs = [rng.normal(size=60) + (labels != k) for k in range(3)]
    ours = [t + 0.7 * rng.normal(size=60) + 0.6 * (labels != k) for k, t in enumerate(theirs)]
    differences = []
    for _ in range(1000):
        drawn = np.concatenate([rng.choice(np.flatnonzero(labels == k), 20) for k in range(3)])
        others = [labels[drawn] != k for k in range(3)]
        areas = [[share_in_order(s[k][drawn], others[k]) for k in range(3)] for s in (ours, theirs)]
        differences.append(np.mean(areas[0]) - np.mean(areas[1]))
    expected = np.percentile(differences, [2.5, 97.5])
    found = anomaly.mean_difference_interval(ours, theirs, labels, seed=1)
    assert (found["low"], found["high"]) == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0]))
    assert anomaly.mean_difference_interval(ours, ours, labels, seed=1) == {"low": 0, "high": 0}


def tile(rng: np.random.Generator) -> np.ndarray:
    return (90 + 8 * rng.normal(size=(1, 56)) + 3 * rng.normal(size=(40, 56))).clip(0, 255).astype(np.uint8)


def test_each_class_is_the_good_one_in_turn(
    fashion: Path, tmp_path: Path, in_process: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anomaly, "seconds_of_script", in_process)
    monkeypatch.setattr(anomaly, "FASHION", anomaly.FASHION[:2])
    config = anomaly.PRESETS["fashion-mnist"][1]
    changes = {"steps": 1, "batch_size": 4, "global_latent": 3, "false_alarm_rate": 0.4, "num_test": 30}
    anomaly.main(replace(config, data=fashion, output=tmp_path, **changes))
    record = json.loads((tmp_path / "results.json").read_text())
    rows = record["rows"]
    means = {r["method"]: r["image_auroc"] for r in rows if r["class"] == "mean"}
    own = {m: [r["image_auroc"] for r in rows if r["method"] == m and r["class"] != "mean"] for m in means}
    for method, values in own.items():
        assert len(values) == 2
        assert means[method] == pytest.approx(np.mean(values))
    for method, others in record["above_pca"].items():
        for pca, above in others.items():
            assert means[pca] == max(v for m, v in means.items() if m.startswith("PCA") and m.endswith(pca[-6:]))
            assert above["by"] == pytest.approx(means[method] - means[pca])
            assert above["low"] <= above["high"]
    assert means["5 nearest on pixels"] > 0.8  # stripes are easily told
