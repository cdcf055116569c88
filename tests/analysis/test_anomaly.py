from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import betabinom

from ldm_vae import cli
from ldm_vae.analysis.anomaly import (
    SHRINKAGE,
    AnomalyDetector,
    Facts,
    LatentGaussian,
    dissimilarity,
    fit_detector,
    mean_of_largest,
    relative,
    threshold_at,
)
from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.images import centre_square
from ldm_vae.data.sources import PartSource, Source, open_source
from ldm_vae.errors import BadImageError, ConfigError, DataError, ModelError, ModelMismatchError
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.objectives.perceptual import LPIPSLoss


def head(source: Source, count: int) -> PartSource:
    return PartSource(source, f"the first {count}", count, int)


def make_vae(seed: int = 0, **keywords: object) -> PatchAutoencoderKL:
    torch.manual_seed(seed)
    one = {"block_out_channels": (8,), "encoder_layers_per_block": (1,), "decoder_layers_per_block": (1,)}
    return PatchAutoencoderKL(**{"latent_channels": 4, "linear_path": True, **one, **keywords}).eval()


@pytest.fixture(scope="module")
def detector() -> AnomalyDetector:
    good = open_source("procedural:dead-leaves#train", resolution=48)
    held_out = open_source("procedural:dead-leaves#held-out", resolution=48)
    options = {"blur": 1.0, "share": 0.01, "lpips_backbone": "squeeze", "lpips_pretrained": False}
    methods = ("l1", "ssim", "mahalanobis", "lpips")
    return fit_detector(make_vae(), head(good, 20), head(held_out, 20), Facts(methods=methods, **options))[0]


def leaves(index: int) -> torch.Tensor:
    return to_images(open_source("procedural:dead-leaves@5", resolution=48)[index].pixels)[None]


def test_thresholds_give_the_rate_asked_for_on_fresh_good_images_within_the_binomial_interval() -> None:
    rng = np.random.default_rng(0)
    for rate in (0.05, 0.2):
        alarms = 0
        for _ in range(300):
            scores = rng.gamma(2.0, size=139)
            alarms += int((rng.gamma(2.0, size=20) > threshold_at(scores, rate)).sum())
        above = round(140 * rate)  # of 140 places that a new score has among 139, those that are alarms
        mean, variance = betabinom.stats(20, above, 140 - above)  # thresholds differ, and so do their rates
        assert mean / 20 == pytest.approx(rate)
        assert abs(alarms - 300 * mean) < 3.3 * math.sqrt(300 * variance)
    assert threshold_at(list(range(19)), 0.05) == 18
    assert threshold_at(list(range(99)), 0.05) == 94
    with pytest.raises(DataError, match="at least 19"):
        threshold_at(list(range(18)), 0.05)


def test_the_latents_distance_is_mahalanobis(detector: AnomalyDetector) -> None:
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(3, 3))
    rows = rng.normal(size=(500, 3)) @ mixing.T + [1.0, 2.0, 3.0]
    gaussian = LatentGaussian(3)
    for part in np.split(rows, 5):
        gaussian.add(torch.from_numpy(part.T.reshape(3, 10, 10)))
    mean, whitening = gaussian.whitening()
    covariance = np.cov(rows.T, bias=True)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / 3 * np.eye(3)
    difference = rows[0] - rows.mean(axis=0)
    expected = np.sqrt(difference @ np.linalg.inv(shrunk) @ difference)
    assert np.linalg.norm(whitening @ (rows[0] - mean)) == pytest.approx(expected)


def test_standardised_errors_are_in_units_of_their_variance_at_each_pixel(tmp_path: Path) -> None:
    vae = make_vae(latent_channels=5, pool=12, linear_path=False)  # one vector for 48 x 48
    good = [head(open_source(f"procedural:dead-leaves@{i}", resolution=48), 12) for i in (0, 1)]
    options = {"methods": ("standardised",), "blur": 0.0, "share": 1.0, "false_alarm_rate": 0.2}
    found = fit_detector(vae, *good, Facts(**options))[0]  # type: ignore[arg-type]

    def errors(source: Source) -> np.ndarray:
        images = torch.cat([to_images(source[i].pixels)[None] for i in range(12)])
        with torch.inference_mode():
            return (images - vae(images).sample.clamp(-1, 1)).square().mean(dim=1).numpy()

    variance = errors(good[0]).mean(axis=0)
    variance = (1 - SHRINKAGE) * variance + SHRINKAGE * variance.mean()
    maps = found.maps(to_images(good[1][3].pixels)[None])[0]
    assert np.allclose(maps["standardised"], errors(good[1])[3] / variance, rtol=1e-3)
    found.save(tmp_path)
    again = AnomalyDetector.load(tmp_path, vae).maps(to_images(good[1][3].pixels)[None])[0]
    assert np.array_equal(again["standardised"], maps["standardised"])
    with pytest.raises(ConfigError, match="one vector"):
        fit_detector(make_vae(), *good, Facts(**options))  # type: ignore[arg-type]


def test_images_of_any_size_are_squares_to_an_autoencoder_of_vectors(model: Path, tmp_path: Path) -> None:
    """They are seen as in training, fitted or scored; a map is of one image."""
    sizes = {"a": (48, 48), "b": (28, 28), "c": (96, 96), "d": (60, 40), "e": (48, 100)}
    source = open_source("procedural:dead-leaves", resolution=100)
    (tmp_path / "good").mkdir()
    for i, (name, size) in enumerate(sizes.items()):
        Image.fromarray(source[i].pixels).resize(size).save(tmp_path / "good" / f"{name}.png")
    vae = make_vae(pool=12, latent_channels=5, deterministic=True)
    vae.save_pretrained(tmp_path / "vae")
    given = ("--vae", tmp_path / "vae", "--data", tmp_path / "good")
    rate = ("--held-out", tmp_path / "good", "--false-alarm-rate", 0.3)
    run("anomaly", "fit", *given, *rate, "--methods", "standardised", "mahalanobis", "--output", tmp_path / "fitted")
    run("anomaly", "score", *given, "--detector", tmp_path / "fitted", "--output", tmp_path / "out")
    scores = {r["name"]: float(r["standardised"]) for r in csv.DictReader((tmp_path / "out" / "scores.csv").open())}
    assert list(scores) == [f"{n}.png" for n in sizes]
    detector = AnomalyDetector.load(tmp_path / "fitted", vae)
    square = centre_square(np.asarray(Image.open(tmp_path / "good" / "d.png")), 48)
    maps = detector.maps(to_images(square)[None])[0]
    assert scores["d.png"] == pytest.approx(detector.scores(maps)["standardised"], rel=1e-5)
    with pytest.raises(ValueError, match="2 images: a map is made of one at a time"):
        detector.maps(torch.zeros(2, 3, 48, 48))


def test_a_network_that_finds_blemishes_has_its_own_method_and_no_other() -> None:
    finder = make_vae(out_channels=1, finds_blemishes=True, linear_path=False)
    good = [head(open_source(f"procedural:dead-leaves@{i}", resolution=48), 5) for i in (0, 1)]
    found = fit_detector(finder, *good, Facts(blur=0.0, false_alarm_rate=0.3))[0]
    assert found.facts.methods == ("blemishes",)
    maps, given = found.maps(leaves(3))
    with torch.inference_mode():
        probability = finder(leaves(3)).sample.sigmoid()
    assert np.allclose(maps["blemishes"], -torch.log(1 - probability[0, 0]), atol=1e-6)
    assert torch.allclose(given, 2 * probability - 1, atol=1e-6)
    for vae, methods in ((finder, ("l1",)), (finder, ("blemishes", "mahalanobis")), (make_vae(), ("blemishes",))):
        with pytest.raises(ConfigError, match="blemishes is the one method of networks that find these"):
            fit_detector(vae, *good, Facts(methods=methods, false_alarm_rate=0.3))


def test_the_map_of_lpips_is_its_distance_place_by_place() -> None:
    lpips = LPIPSLoss("squeeze", pretrained=False)
    images, other = leaves(0), leaves(1)
    with torch.inference_mode():
        found = lpips.maps(other, images)
        assert found.shape == (1, 48, 48)
        assert found.mean().item() == pytest.approx(lpips(other, images).item(), rel=0.05)  # enlarging is no average
        assert not lpips.maps(images, images).any()
        changed = images.clone()
        changed[:, :, :8, :8] *= -1
        where = lpips.maps(changed, images)[0]
    assert where[:8, :8].mean() > 20 * where[32:, 32:].mean()


def test_ssims_map_has_the_mean_of_the_metric() -> None:
    from skimage.metrics import structural_similarity

    images, other = leaves(0), leaves(1)
    found = dissimilarity(images, other)
    assert found.shape == (1, 48, 48)
    planes = [to_pixels(x[0]).astype(float) for x in (images, other)]
    options = {"gaussian_weights": True, "use_sample_covariance": False, "sigma": 1.5, "data_range": 255}
    _, full = structural_similarity(*planes, channel_axis=2, full=True, **options)
    inner = slice(8, -8)
    assert np.allclose(1 - found[0, inner, inner], full.mean(axis=2)[inner, inner], atol=1e-3)
    grey = torch.full((1, 3, 20, 20), 0.05)
    assert dissimilarity(grey, -grey).max() < 0.02  # 13 of 255 steps of light, on both sides of the middle


def test_fresh_good_images_raise_alarms_at_the_rate_asked_for(detector: AnomalyDetector) -> None:
    """A detector of 60 images held out, and 200 fresh ones: within the binomial interval, and that of the threshold."""
    held_out = open_source("procedural:dead-leaves@1", resolution=48)
    facts = Facts(blur=1.0, share=0.01, false_alarm_rate=0.2)
    found = fit_detector(detector.vae, head(held_out, 5), head(held_out, 60), facts)[0]
    own = [found.scores(found.maps(to_images(held_out[i].pixels)[None])[0]) for i in range(60)]
    fresh = [found.scores(found.maps(leaves(i))[0]) for i in range(200)]
    for method, threshold in found.facts.thresholds.items():
        assert threshold == threshold_at([s[method] for s in own], 0.2)  # of what was held out, and nothing else
        alarms = sum(s[method] > threshold for s in fresh)
        # of n = 60 the rate above the k-th is Beta(n + 1 - k, k), so alarms are beta-binomial
        k = math.ceil(61 * 0.8)
        low, high = betabinom.interval(0.999, 200, 61 - k, k)
        assert low <= alarms <= high, method


def test_a_strange_patch_is_where_the_maps_are_large(detector: AnomalyDetector) -> None:
    images = leaves(3)
    images[:, :, 20:32, 8:20] = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).sign()
    for method, found in detector.maps(images)[0].items():
        inside = np.zeros(found.shape, bool)
        inside[20:32, 8:20] = True
        assert found[inside].mean() > 1.2 * found[~inside].mean(), method
        if method == "l1":  # the others look at structure, and at what is usual
            assert inside[np.unravel_index(found.argmax(), found.shape)], method


def test_a_map_relative_to_its_surroundings_shows_what_is_unusual_there() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0.9, 1.1, size=(60, 80)).astype(np.float32)
    values[:, 40:] *= 10  # as ever, on that side
    values[20, 10] = 5
    assert np.array_equal(relative(values, 0.0), values)
    found = relative(values, 6.0)
    assert found[:, :20].mean() == pytest.approx(1 / (1 + 0.1 * values.mean()), rel=0.1)
    assert found[:, 60:].mean() == pytest.approx(1, rel=0.1)
    assert np.unravel_index(found.argmax(), found.shape) == (20, 10)
    assert np.allclose(relative(3 * values, 6.0), found, rtol=1e-5)
    assert not relative(np.zeros((5, 5), np.float32), 2.0).any()


def test_scores_do_not_depend_on_what_else_is_scored(detector: AnomalyDetector) -> None:
    first = [detector.scores(detector.maps(leaves(i))[0]) for i in (0, 1, 2)]
    again = [detector.scores(detector.maps(leaves(i))[0]) for i in (2, 1, 0)]
    assert first == again[::-1]
    values = np.arange(200, dtype=np.float32).reshape(10, 20)
    assert mean_of_largest(values, 0.05) == pytest.approx(np.arange(190, 200).mean())
    assert mean_of_largest(values, 1e-9) == 199


def test_a_detector_is_saved_and_goes_with_its_autoencoder_alone(detector: AnomalyDetector, tmp_path: Path) -> None:
    detector.save(tmp_path)
    again = AnomalyDetector.load(tmp_path, make_vae())
    assert again.scores(again.maps(leaves(0))[0]) == detector.scores(detector.maps(leaves(0))[0])
    with pytest.raises(ModelMismatchError, match="this one is"):
        AnomalyDetector.load(tmp_path, make_vae(seed=1))
    (tmp_path / "statistics.safetensors").write_bytes(b"damage")
    with pytest.raises(ModelError, match="cannot load the detector"):
        AnomalyDetector.load(tmp_path, make_vae())
    with pytest.raises(ModelError, match="holds no detector"):
        AnomalyDetector.load(tmp_path / "nowhere", make_vae())
    with pytest.raises(BadImageError, match="ssim needs 11"):
        detector.maps(torch.zeros(1, 3, 8, 30))
    good = open_source("procedural:dead-leaves", resolution=48)
    with pytest.raises(ConfigError, match="share"):
        fit_detector(make_vae(), good, good, Facts(share=0.0))
    with pytest.raises(ConfigError, match="surroundings"):
        fit_detector(make_vae(), good, good, Facts(surroundings=-1.0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_vae().save_pretrained(folder / "vae")
    return folder


def run(*words: object) -> None:
    cli.main([str(w) for w in words])


def test_folders_are_scored_with_heat_maps_past_bad_files(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fitted = ("--output", tmp_path / "fitted", "--methods", "l1", "mahalanobis", "--false-alarm-rate", 0.3)
    run("anomaly", "fit", "--vae", model, "--data", photos, "--held-out", photos, *fitted)
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = np.array(Image.open(sorted(photos.rglob("*.png"))[0]))
    Image.fromarray(pixels).save(folder / "good.png")
    strange = pixels.copy()
    strange[10:40, 10:40] = np.random.default_rng(0).integers(0, 2, size=(30, 30, 1)) * 255
    Image.fromarray(strange[:50]).save(folder / "strange.png")
    (folder / "bad.png").write_bytes(b"nothing")
    words = ("anomaly", "score", "--vae", model, "--data", folder, "--detector", tmp_path / "fitted")
    run(*words, "--output", tmp_path / "out")
    rows = {r["name"]: r for r in csv.DictReader((tmp_path / "out" / "scores.csv").open())}
    assert rows.keys() == {"good.png", "strange.png"}
    for method in ("l1", "mahalanobis"):
        assert float(rows["strange.png"][method]) > float(rows["good.png"][method])
        assert rows["strange.png"][f"{method}_anomalous"] == "1"
    thresholds = json.loads((tmp_path / "fitted" / "anomaly.json").read_text())["thresholds"]
    for row in rows.values():
        assert (float(row["l1"]) > thresholds["l1"]) == (row["l1_anomalous"] == "1")
    with Image.open(tmp_path / "out" / "heat_maps" / "strange.png") as sheet:
        assert sheet.size == (3 * 72 + 2 * 4, 50)
        marked = np.asarray(sheet).astype(int)[:, 2 * 76 :]
    red = marked[:, :, 0] - marked[:, :, 1]
    assert red[15:35, 15:35].mean() > red[:, 50:].mean() + 30
    assert "bad.png" in (tmp_path / "out" / "bad_images.csv").read_text()
    run(*words, "--output", tmp_path / "csv", "--no-heat-maps", "--method", "l1")
    assert not (tmp_path / "csv" / "heat_maps").exists()
    assert (tmp_path / "csv" / "scores.csv").read_text() == (tmp_path / "out" / "scores.csv").read_text()


def test_what_cannot_be_fitted_or_scored_is_said(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def fails(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run("anomaly", *words)
        assert exit_.value.code == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
        return line

    fit = ("fit", "--vae", model, "--data", photos, "--output", tmp_path / "fitted")
    assert "no such model" in fails("fit", "--vae", tmp_path / "no", "--data", photos)
    (tmp_path / "empty").mkdir()
    assert "no images" in fails("fit", "--vae", model, "--data", tmp_path / "empty", "--held-out", photos)
    assert "no images" in fails(*fit, "--held-out", tmp_path / "empty")
    assert "at least 19" in fails(*fit)  # two are held out of twelve
    assert "false-alarm rate" in fails(*fit, "--false-alarm-rate", 2)
    lpips = ("--methods", "lpips", "--lpips-backbone", "squeeze", "--false-alarm-rate", 0.4)
    assert "weights" in fails(*fit, *lpips)
    assert not (tmp_path / "fitted").exists()
    (model / "config.json").write_text(json.dumps({"config": {"data": str(photos)}}))
    rate = ("--false-alarm-rate", 0.4)
    assert "was trained on" in fails(*fit, *rate)
    for held_out in (photos, f"{photos}/", f"{photos}#held-out", f"{photos}#train"):
        assert "was trained on" in fails(*fit, "--held-out", held_out, *rate)
    (model / "config.json").write_text(json.dumps({"config": {"data": f"{photos.parent}/./{photos.name}#train"}}))
    assert "was trained on" in fails(*fit, "--held-out", photos, *rate)
    inside = ("fit", "--vae", model / "vae", "--data", photos, "--output", tmp_path / "fitted")
    assert "was trained on" in fails(*inside, "--held-out", f"{photos}#train", *rate)
    run("anomaly", "fit", "--vae", model, "--data", photos, "--output", tmp_path / "unseen", *rate)
    (model / "config.json").unlink()
    assert "other things than a detector" in fails("fit", "--vae", model, "--data", photos, "--output", model, *rate)
    assert "other things" in fails("fit", "--vae", model, "--data", photos, "--output", model, *rate, "--overwrite")
    assert (model / "vae" / "config.json").exists()
    run("anomaly", *fit, "--held-out", photos, "--false-alarm-rate", 0.2)
    assert "is there" in fails(*fit)
    score = ("score", "--vae", model, "--data", photos, "--output", tmp_path / "out")
    within = ("score", "--vae", model, "--data", photos, "--output", photos / "out")
    assert "is inside --data" in fails(*within, "--detector", tmp_path / "fitted")
    assert "holds no detector" in fails(*score)
    fitted = ("--output", tmp_path / "out", "--detector", tmp_path / "fitted")
    assert "no such model" in fails("score", "--vae", tmp_path / "no", "--data", photos, *fitted)
    assert "no images" in fails("score", "--vae", model, "--data", tmp_path / "empty", *fitted)
    assert "has no lpips" in fails(*score, "--detector", tmp_path / "fitted", "--method", "lpips")
    small = tmp_path / "small"
    small.mkdir()
    Image.new("RGB", (9, 9)).save(small / "a.png")
    words = ("score", "--vae", model, "--data", small, "--output", tmp_path / "out", "--detector", tmp_path / "fitted")
    assert "ssim needs 11" in fails(*words)
    assert "owner/name is on the hub" in fails("fit", "--vae", "owner/name", "--data", photos)
    on_the_hub = ("score", "--vae", "owner/name", "--data", photos, "--output", tmp_path)
    assert "owner/name could not be had from the hub" in fails(*on_the_hub)
