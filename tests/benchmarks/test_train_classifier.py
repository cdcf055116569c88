from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.train_classifier import Config, augment, main
from ldm_vae.data.conversion import to_images
from ldm_vae.data.procedural import SHAPES
from ldm_vae.data.sources import open_source
from ldm_vae.errors import one_line_errors
from ldm_vae.models.classifier import load_classifier
from ldm_vae.runs.config import parse_flags


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shapes(output: Path, **changes: Any) -> Config:
    flags: dict[str, Any] = {"data": "procedural:shapes", "val_data": "procedural:shapes@1", "output": output}
    flags |= {"resolution": 16, "channels": 1, "batch_size": 32, "epochs": 2, "num_images": 64}
    return Config(**flags | changes)


def test_it_learns_shapes_and_the_saved_classifier_has_the_accuracy_that_it_reports(tmp_path: Path) -> None:
    config = shapes(tmp_path, num_images=480, epochs=12, resolution=24)
    results = main(config)
    assert results["accuracy"]["mean"] > 0.5  # by chance: 0.125
    assert results["accuracy"]["low"] < results["accuracy"]["mean"] < results["accuracy"]["high"]
    assert list(results["accuracy_of_class"]) == list(SHAPES)
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results

    classifier = load_classifier(str(tmp_path))
    assert tuple(classifier.config.class_names) == SHAPES
    assert (classifier.config.in_channels, classifier.config.resolution) == (1, 24)
    source, right = open_source("procedural:shapes@5", channels=1, resolution=24), []
    for i in range(400):  # others of the same kind
        images = torch.from_numpy(source[i].pixels).permute(2, 0, 1)[None] / 127.5 - 1
        right.append(int(classifier(images).argmax()) == i % 8)
    assert np.mean(right) == pytest.approx(results["accuracy"]["mean"], abs=0.1)


def test_on_pretrained_features_a_few_images_are_enough(tmp_path: Path) -> None:
    flags = {"backbone": "efficientnet-lite0", "channels": 3, "resolution": 64, "num_images": 80, "epochs": 20}
    results = main(shapes(tmp_path, **flags))
    assert results["parameters"] == 1281 * 128 + 129 * 8
    assert results["accuracy"]["mean"] > 0.6  # by chance: 0.125
    classifier, source = load_classifier(str(tmp_path)), open_source("procedural:shapes@5", resolution=64)
    images = torch.stack([to_images(source[i].pixels) for i in range(80)])
    right = (classifier(images).argmax(dim=1) == torch.arange(80) % 8).float().mean().item()
    assert right == pytest.approx(results["accuracy"]["mean"], abs=0.15)


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)
        main(shapes(tmp_path / name, seed=seed))
    a, b, c = (load_classifier(str(tmp_path / name)).state_dict() for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])


def test_classes_are_matched_by_name_and_bad_images_are_counted(tmp_path: Path) -> None:
    """The validation images have only the last class, whose label in their own folder would be 0."""
    for folder, names in (("train", ("ant", "bee")), ("val", ("bee",))):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(8):
                grey = np.full((16, 16), (60 if name == "ant" else 190) + i, np.uint8)
                Image.fromarray(grey).save(tmp_path / folder / name / f"{i}.png")
    (tmp_path / "train" / "ant" / "bad.png").write_bytes(b"damage")
    given = {"data": str(tmp_path / "train"), "val_data": str(tmp_path / "val"), "num_images": None}
    results = main(shapes(tmp_path / "out", **given, epochs=20, batch_size=16))
    assert results["accuracy_of_class"] == {"bee": 1.0}
    assert results["bad_images"] == 1
    assert results["training_images"] == 16


def test_training_images_are_mirrored_and_moved_by_a_pixel_for_every_32() -> None:
    ramp = torch.arange(64.0).expand(40, 1, 64, 64)
    seen = augment(ramp, torch.Generator().manual_seed(0), flip=True)[:, 0, 32, 32]
    middle = set(seen.tolist())
    assert len(middle) == 2  # mirrored or not, all moved alike
    assert all(abs(value - 31.5) <= 2.5 for value in middle)
    assert len(set(augment(ramp, torch.Generator().manual_seed(0), flip=False)[:, 0, 32, 32].tolist())) == 1


def test_a_square_of_half_the_side_is_erased_in_a_share_of_the_images() -> None:
    """Less where its middle, drawn evenly from the whole image, is near an edge: 7/16 of a side on average."""
    white = torch.ones(2000, 1, 32, 32)
    erased = augment(white, torch.Generator().manual_seed(0), flip=False, erase=0.25) == 0
    touched = erased.flatten(1).any(dim=1)
    assert touched.float().mean() == pytest.approx(0.25, abs=0.03)
    sides = erased[touched].any(dim=3).sum(dim=2).float()
    assert sides.max() == 16
    assert sides.mean() == pytest.approx(14, abs=0.5)
    assert erased[touched].float().mean() == pytest.approx((7 / 16) ** 2, abs=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "{tmp}/missing"], "no such folder or file"),
        (["--data", "procedural:dead-leaves"], "has 0 classes"),
        (["--data", "{photos}"], "are not in"),
        (["--data", "{tmp}/mixed", "--val-data", "{tmp}/mixed"], "has no class"),
        (["--val-data", "{tmp}/bad"], "are not in"),
        (["--data", "{tmp}/bad", "--val-data", "{tmp}/bad"], "no usable image"),
        (["--num-images", "0"], "--num-images is 0"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--resolution", "8"], "at least 16"),
        (["--erase", "2"], "--erase is 2"),
        (["--backbone", "efficientnet-lite0", "--channels", "1"], "--backbone efficientnet-lite0 takes 3"),
        (["--widths", "0"], "--widths is (0,): it must be at least 1"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--output", "{tmp}/bad/a/x.png/out"], "cannot write to"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    words: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "x.png").write_bytes(b"damage")
        (tmp_path / "mixed" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "mixed" / name / "x.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "mixed" / "x.png")
    given = ["--data", "procedural:shapes", "--val-data", "procedural:shapes", "--num-images", "16"]
    given += ["--output", str(tmp_path / "out"), *(w.format(tmp=tmp_path, photos=photos) for w in words)]
    with pytest.raises(SystemExit) as ended, one_line_errors():
        main(parse_flags(Config, description="", args=given))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_procedural_images_without_a_number_have_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_line_errors():
        main(shapes(tmp_path, num_images=None))
    assert "has no end" in capsys.readouterr().err
