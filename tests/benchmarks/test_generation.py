from __future__ import annotations

import json
import shutil
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor

from benchmarks.generation import REAL, Config, main
from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.procedural import SHAPES
from ldm_vae.data.sources import open_source, shuffled
from ldm_vae.errors import one_line_errors
from ldm_vae.grids import GAP, LABEL_HEIGHT
from ldm_vae.metrics import frechet_distance, kernel_distance, precision_recall
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.classifier import ImageClassifier
from ldm_vae.pipeline import LatentDiffusionPipeline
from ldm_vae.runs.config import parse_flags
from ldm_vae.sampling import SCHEDULERS, make_scheduler

SIDE, N = 16, 24
FIGURES = ("frechet", "kernel", "precision", "recall")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images_of(folder: Path) -> Tensor:
    """(N, 3, SIDE, SIDE) in [-1, 1], in the order of their names."""
    source = open_source(str(folder))
    pixels = np.stack([source[i].pixels for i in range(N)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of shapes by class (reference, real, samples), a classifier, a module of it, and a pipeline."""
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("reference", "real", "samples")):
        source = open_source(f"procedural:shapes@{seed}", resolution=SIDE)
        for i in range(N):
            path = home / name / SHAPES[i % 8] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source[i].pixels).save(path)
    torch.manual_seed(0)
    classifier = ImageClassifier(3, 8, widths=(8, 16), num_features=12, class_names=SHAPES, resolution=SIDE).train()
    images = images_of(home / "reference")
    for _ in range(40):
        features = classifier.features(images)  # batch norm sees what is usual; nothing else is learned
    classifier.head.bias.data = -classifier.head(features).mean(dim=0).detach()  # it does not see one class everywhere
    classifier.eval().save_pretrained(home / "classifier")
    classifier.forward = classifier.features  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(classifier, torch.zeros(5, 3, SIDE, SIDE)).save(str(home / "traced.pt"))
        exported = torch.export.export(classifier, (torch.zeros(5, 3, SIDE, SIDE),))
        torch.export.save(exported, home / "of_five.pt2")
    vae = PatchAutoencoderKL(patch_size=2, block_out_channels=(8, 8), decoder_layers_per_block=(1, 1))
    unet = UNet2DModel(
        sample_size=(SIDE // 4, SIDE // 4),
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=9,
    )
    pipeline = LatentDiffusionPipeline(vae.eval(), unet.eval(), make_scheduler("flow"), class_names=list(SHAPES))
    pipeline.save_pretrained(home / "run" / "pipeline")
    return home


def given(home: Path, output: Path, **changes: Any) -> Config:
    flags: dict[str, Any] = {"data": str(home / "reference"), "real": str(home / "real"), "output": output}
    flags |= {"features": (str(home / "classifier"),), "samples": (str(home / "samples"),)}
    return Config(**flags | changes)


def measured(config: Config) -> dict[str, Any]:
    main(config)
    record: dict[str, Any] = json.loads((config.output / "results.json").read_text())
    return record


def figures(record: dict[str, Any], name: Path | str) -> list[float]:
    return [record["results"][str(name)][f] for f in FIGURES]


@pytest.fixture(scope="module")
def direct(home: Path) -> dict[str, tuple[Tensor, list[bool]]]:
    """Features of each folder, and which images are recognised, by the classifier itself."""
    classifier = ImageClassifier.from_pretrained(home / "classifier").eval()
    found = {}
    for name in ("reference", "real", "samples"):
        source = open_source(str(home / name))
        images = images_of(home / name)
        labels = torch.tensor([SHAPES.index(Path(source.name(i)).parent.name) for i in range(N)])
        with torch.no_grad():
            found[name] = classifier.features(images), (classifier(images).argmax(dim=1) == labels).tolist()
    return found


def test_figures_are_those_of_the_features_of_all_images(home: Path, direct: Any, tmp_path: Path) -> None:
    record = measured(given(home, tmp_path))
    reference = direct["reference"][0]
    for name, row in (("real", REAL), ("samples", home / "samples")):
        features, right = direct[name]
        expected = [frechet_distance(reference, features), kernel_distance(reference, features)]
        assert figures(record, row) == pytest.approx([*expected, *precision_recall(reference, features)], rel=1e-4)
        recognised = record["results"][str(row)]["recognised"]
        assert recognised["mean"] == pytest.approx(np.mean(right))
        assert recognised["low"] <= recognised["mean"] <= recognised["high"]
        of_class = [np.mean(right[3 * k : 3 * k + 3]) for k in range(8)]  # folders and classes by name, three each
        assert [recognised["of_class"][k] for k in sorted(SHAPES)] == pytest.approx(of_class)
    assert 0 < np.mean(direct["samples"][1]) < 1
    assert record["images"] == N
    table = (tmp_path / "table.md").read_text()
    assert f"{record['results'][REAL]['frechet']:.4g}" in table
    assert "recognised, of class" in table


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_figures_depend_on_neither_batch_size_nor_earlier_random_numbers(
    batch_size: int, home: Path, tmp_path: Path
) -> None:
    samples = (str(home / "samples"), str(home / "real"))
    whole = measured(given(home, tmp_path / "whole", samples=samples, real=None, num_images=10, batch_size=64))
    torch.rand(batch_size)
    parts = measured(given(home, tmp_path / "parts", samples=samples, real=None, num_images=10, batch_size=batch_size))
    for name in (REAL, *samples):
        assert figures(parts, name) == pytest.approx(figures(whole, name), rel=1e-4)
        assert parts["results"][name]["recognised"] == whole["results"][name]["recognised"]


def test_an_identical_set_is_at_no_distance_and_the_halves_of_the_reference_share_no_image(
    home: Path, tmp_path: Path
) -> None:
    record = measured(given(home, tmp_path, real=None, samples=(str(home / "reference"),)))
    assert record["images"] == N // 2  # on each side: the halves
    frechet, kernel, precision, recall = figures(record, home / "reference")
    assert frechet == pytest.approx(0, abs=1e-4)
    assert kernel < 0
    assert (precision, recall) == (1, 1)
    assert record["results"][REAL]["frechet"] > 10 * abs(frechet)


@pytest.mark.parametrize(("name", "batch_size"), [("traced.pt", 7), ("of_five.pt2", 5)])
def test_saved_modules_give_the_figures_of_the_classifier(
    name: str, batch_size: int, home: Path, tmp_path: Path
) -> None:
    classifier = measured(given(home, tmp_path / "classifier"))
    flags = {"features": (str(home / "classifier"), str(home / name)), "batch_size": batch_size, "resolution": SIDE}
    both = measured(given(home, tmp_path / "module", **flags))
    assert both["results"] == classifier["results"]
    (module,) = both["in_other_features"]
    assert module["features"] == {"name": str(home / name), "number": 12}
    for row in (REAL, home / "samples"):
        assert figures(module, row) == pytest.approx(figures(classifier, row), rel=1e-4)
        assert module["results"][str(row)]["recognised"] is None


def test_folders_of_generate_are_read_by_name_or_number_and_without_the_contact_sheet(
    home: Path, tmp_path: Path
) -> None:
    for label, name in enumerate(SHAPES):
        (tmp_path / "samples" / f"{label:04d}").mkdir(parents=True)
        for file in (home / "samples" / name).iterdir():
            (tmp_path / "samples" / f"{label:04d}" / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (99, 99)).save(tmp_path / "samples" / "contact_sheet.png")
    (tmp_path / "samples" / "0000" / "bad.png").write_bytes(b"damage")
    by_name = measured(given(home, tmp_path / "a"))
    by_number = measured(given(home, tmp_path / "b", samples=(str(tmp_path / "samples"),)))
    assert by_number["images"] == N
    one, other = by_name["results"][str(home / "samples")], by_number["results"][str(tmp_path / "samples")]
    assert other["recognised"]["of_class"] == one["recognised"]["of_class"]
    assert other["frechet"] == pytest.approx(one["frechet"], rel=1e-4)
    assert list(by_number["bad_images"][str(tmp_path / "samples")]) == ["0000/bad.png"]


def test_a_pipeline_is_measured_by_the_images_that_it_makes_and_timed(home: Path, tmp_path: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(home / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0}
    for i in range(N):
        image = pipeline(i % 8, generator=100 + i, **options).images[0]
        path = tmp_path / "made" / SHAPES[i % 8] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    flags: dict[str, Any] = {"samples": (str(tmp_path / "made"),), "pipeline": str(home / "run"), "seed": 100}
    flags |= {"num_inference_steps": 2, "guidance_scale": (2.0,)}
    flags |= {"time": True, "time_steps": (1, 3), "time_batch_size": 2, "time_seconds": 0.0}
    record = measured(given(home, tmp_path / "out", num_images=N, batch_size=5, **flags))
    made = "guidance 2, 2 steps"
    assert figures(record, made) == pytest.approx(figures(record, tmp_path / "made"), rel=1e-3)
    assert record["results"][made]["recognised"] == record["results"][str(tmp_path / "made")]["recognised"]
    schedulers = list(SCHEDULERS["flow"])
    assert [(t["scheduler"], t["steps"]) for t in record["timing"]] == [(s, n) for s in schedulers for n in (1, 3)]
    for row in record["timing"]:
        assert 0 < row["milliseconds_per_step"] * row["steps"] < 1e3 * row["seconds_per_image"]

    flags = {"pipeline": str(home / "run"), "time": True, "time_steps": (1,), "time_seconds": 0.0}
    alone = measured(Config(output=tmp_path / "alone", **flags))
    assert "results" not in alone
    assert len(alone["timing"]) == len(schedulers)


def test_a_pipeline_is_judged_at_several_scales_and_steps_beside_its_reconstructions_and_goes_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, Any] = {"samples": (), "pipeline": str(home / "run"), "num_images": 16, "num_inference_steps": 2}
    flags |= {"guidance_scale": (1.0, 2.0), "interval_scale": (3.0,), "compared_steps": (2, 3), "compared_images": 8}
    record = measured(given(home, tmp_path, **flags))
    sets = ["guidance 1, 2 steps", "guidance 2, 2 steps", "guidance 3 in 0.3 to 0.8, 2 steps"]
    assert list(record["results"]) == [REAL, "reconstructions", *sets]
    compared = record["compared"]
    assert (record["images"], compared["images"]) == (16, 8)
    assert list(compared["results"]) == [REAL, "reconstructions", "guidance 1, 2 steps", "guidance 1, 3 steps"]

    vae = PatchAutoencoderKL.from_pretrained(home / "run" / "pipeline" / "vae").eval()
    extract = ImageClassifier.from_pretrained(home / "classifier").eval()
    sources = {name: open_source(str(home / name)) for name in ("reference", "real")}
    reference, real = (images_of(home / name)[list(islice(shuffled(s, 0), 16))] for name, s in sources.items())
    with torch.no_grad():
        decoded = to_images(to_pixels(vae.decode(vae.encode(real).latent_dist.mode()).sample))
        distance = frechet_distance(extract.features(reference), extract.features(decoded))
    assert record["results"]["reconstructions"]["frechet"] == pytest.approx(distance, rel=1e-3)
    for name in sets:
        row = record["results"][name]
        assert row["relative"]["frechet"] == pytest.approx(row["frechet"] / distance, rel=1e-3)

    capsys.readouterr()
    again = measured(given(home, tmp_path, **flags))
    assert capsys.readouterr().out.count("16 images in ") == 3
    assert again["results"] == record["results"]
    assert len(list((tmp_path / "generated" / sets[0]).rglob("0*.png"))) == 16


def test_copies_of_training_images_are_found_and_shown_beside_them(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "samples", tmp_path / "training")
    for i in range(N):
        pixels = open_source("procedural:shapes@9", resolution=SIDE)[i].pixels
        Image.fromarray(pixels).save(tmp_path / "training" / SHAPES[i % 8] / f"new-{i}.png")
    output = tmp_path / "out"
    record = measured(given(home, output, train_data=str(tmp_path / "training")))
    copied, real = (record["results"][name]["nearest"] for name in (str(home / "samples"), REAL))
    assert copied["median"] == copied["ratio"]["ratio"] == 0
    assert real["median"] > 0
    assert real["ratio"]["low"] < real["ratio"]["ratio"] < real["ratio"]["high"]
    assert 0.5 < real["ratio"]["ratio"] < 2
    rows = np.asarray(Image.open(output / "nearest in classifier" / "1 samples.png"))
    step, top = SIDE + LABEL_HEIGHT + GAP, LABEL_HEIGHT
    shown = [rows[top + i * step : top + i * step + SIDE] for i in range(4)]
    assert np.array_equal(shown[0], shown[1])  # copies above what they were copied from
    assert np.array_equal(shown[2], shown[3])
    other = np.asarray(Image.open(output / "nearest in classifier" / f"0 {REAL}.png"))
    assert not np.array_equal(other[top : top + SIDE], other[top + step : top + step + SIDE])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "{tmp}/missing"], "no such folder or file"),
        (["--data", "{tmp}/empty"], "no images in"),
        (["--real", "{tmp}/few"], "3 images on each side are too few"),
        (["--num-images", "25"], "has 24 usable images, --num-images 25 needs 25"),
        (["--real", "None", "--num-images", "13"], "needs 26, for it is halved"),
        (["--samples", "{tmp}/damaged", "--num-images", "4"], "has 3 usable images, --num-images 4 needs 4"),
        (["--samples", "procedural:shapes"], "has no end"),
        (["--real", "{home}/reference"], "--real is --data"),
        (["--train-data", "{home}/real"], "--train-data is also --data or --real"),
        (["--features", "{tmp}/missing.pt"], "no such model"),
        (["--features", "{home}/run"], "has no readable config.json"),
        (["--features", "{home}/of_five.pt2", "--resolution", "16"], "does not take float32 (32, 3, 16, 16)"),
        (["--features", "{home}/traced.pt", "--channels", "1"], "does not take float32 (32, 1, 256, 256)"),
        (["--features", "inception"], "weights-inception-2015-12-05-6726825d.pth"),
        (["--channels", "1"], "--channels is 1: "),
        (["--pipeline", "{tmp}/missing", "--num-images", "4"], "no such model"),
        (["--pipeline", "{home}/run"], "how many images"),
        (["--time"], "--time needs the --pipeline"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--time-steps", "0"], "--time-steps"),
        (["--data", "None"], "no --data given"),
        (["--output", "{home}/traced.pt/out"], "cannot write to"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    words: list[str],
    message: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    for name in ("few", "damaged"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (20, 20), (80 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "damaged" / "x.png").write_bytes(b"damage")
    flags = ["--data", f"{home}/reference", "--real", f"{home}/real", "--features", f"{home}/classifier"]
    flags += ["--samples", f"{home}/samples", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended, one_line_errors():
        main(parse_flags(Config, description="", args=flags + [w.format(tmp=tmp_path, home=home) for w in words]))
    assert ended.value.code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_nothing_to_measure_is_said(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_line_errors():
        main(given(home, tmp_path, samples=()))
    assert "nothing to measure" in capsys.readouterr().err
