from __future__ import annotations

import errno
import io
import os
import shutil
import zipfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_vae.data import reader
from ldm_vae.data.hugging_face import HuggingFaceSource
from ldm_vae.data.procedural import SHAPES
from ldm_vae.data.reader import ImageReader, ReadOptions
from ldm_vae.data.sources import check_outside, open_mix, open_source
from ldm_vae.errors import BadImageError, ConfigError, DataError
from ldm_vae.runs.config import as_json, differences, parse_config
from training import train_vae


def test_a_folder_is_read_recursively_in_order_with_labels(photos: Path) -> None:
    source = open_source(str(photos))
    assert len(source) == 12
    assert source.classes == ("first class", "zweite Klasse ü")
    names = [source.name(i) for i in range(12)]
    assert names == sorted(names)
    for i in range(12):
        sample = source[i]
        assert sample.label == source.classes.index(sample.name.split("/")[0])
        assert np.array_equal(sample.pixels, np.asarray(Image.open(photos / sample.name)))


def test_classes_with_numbers_are_in_the_order_of_the_numbers(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ["0", "1", "2", "10", "11", "a-2", "a-10", "b"]
    image = next(photos.rglob("*.png"))
    for folder in folders:
        (tmp_path / folder).mkdir()
        shutil.copy(image, tmp_path / folder)
    source = open_source(str(tmp_path))
    assert source.classes == tuple(folders)
    labels = {source.name(i).split("/")[0]: source[i].label for i in range(len(source))}
    assert labels == {folder: label for label, folder in enumerate(folders)}
    monkeypatch.setattr("ldm_vae.data.file_sources.in_natural_order", str)
    before = open_source(str(tmp_path))
    assert before.classes == tuple(sorted(folders))
    assert before.fingerprint() == source.fingerprint()  # the same data in either order


def test_a_zip_of_a_folder_is_the_same_as_the_folder(photos: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in photos.rglob("*.png"):
            archive.write(path, path.relative_to(photos))
        archive.writestr("../escape.txt", "nothing")
        archive.writestr("__MACOSX/._image.png", "nothing")
    folder, zipped = open_source(str(photos)), open_source(str(tmp_path / "photos.zip"))
    assert len(zipped) == len(folder)
    assert zipped.classes == folder.classes
    for i in range(12):
        assert zipped.name(i) == folder.name(i)
        assert zipped[i].label == folder[i].label
        assert np.array_equal(zipped[i].pixels, folder[i].pixels)


def test_a_local_hugging_face_dataset_is_read_with_its_labels(photos: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    paths = sorted(photos.rglob("*.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": p.read_bytes(), "path": None} for p in paths] + [{"bytes": b"x", "path": None}]}
    rows["label"] = [i % 2 for i in range(13)]
    dataset = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(tmp_path / "folder" / "train-0.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for path in ("folder", "folder/train-0.parquet", "saved"):
        source = open_source(str(tmp_path / path))
        assert len(source) == 13
        assert source.classes == ("a", "b")
        assert source[3].label == 1
        assert np.array_equal(source[3].pixels, np.asarray(Image.open(paths[3])))
        with pytest.raises(BadImageError):
            source[12]


def test_a_file_that_a_row_names_is_read_below_its_root_alone(photos: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = next(photos.rglob("*.png"))
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": None, "path": str(file)}]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    for roots in ((), (tmp_path,), (tmp_path / ".." / tmp_path.name,)):
        with pytest.raises(BadImageError, match="names a file that is not in the data set"):
            HuggingFaceSource(dataset, ImageReader(max_pixels=10**6), roots=roots)[0]
    source = HuggingFaceSource(dataset, ImageReader(max_pixels=10**6), roots=(tmp_path, photos))
    assert source[0].pixels.shape == (60, 72, 3)
    rows["image"][0]["path"] = str(photos)
    source = HuggingFaceSource(datasets.Dataset.from_dict(rows, features=features), ImageReader(max_pixels=10**6))
    with pytest.raises(BadImageError, match="names a file"):
        source[0]


def test_images_that_the_hub_has_as_files_are_read_from_where_the_library_put_them(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a data set of image files `load_dataset` gives names in its cache, with links to what was downloaded."""
    datasets = pytest.importorskip("datasets")
    blob, name = tmp_path / "real" / "blobs" / "0", tmp_path / "hub" / "snapshots" / "a.png"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(next(photos.rglob("*.png")).read_bytes())
    (tmp_path / "hub").symlink_to(tmp_path / "real")
    name.parent.mkdir()
    name.symlink_to(blob)
    loaded = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(name)}]}, features=datasets.Features({"image": datasets.Image()})
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: loaded)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert open_source("owner/name")[0].pixels.shape == (60, 72, 3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(BadImageError, match="names a file"):
        open_source("owner/name")[0]


def test_an_imagefolder_is_read_by_datasets(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "link").symlink_to(photos)
    source = open_source(f"imagefolder:{tmp_path / 'link'}")  # whose rows name the files without the link
    assert len(source) == 12
    assert source.classes == ("first class", "zweite Klasse ü")
    assert {source[i].label for i in range(12)} == {0, 1}
    assert source[5].pixels.shape == (60, 72, 3)


def test_links_to_folders_are_followed_and_loops_end(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(photos)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(str(tmp_path))
    assert len(source) == 13
    with pytest.raises(BadImageError, match="cannot be read"):
        source[[source.name(i) for i in range(13)].index("gone.png")]


def test_a_file_system_that_does_not_answer_makes_no_bad_image(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another image in its place would make the run another one, and a cache would have a hole for good."""
    monkeypatch.setattr("ldm_vae.data.image_files.RETRY_AFTER", (0.0, 0.0))
    source = open_source(str(photos))
    expected, asked = source[3].pixels, []
    read = Path.read_bytes

    def answering(after: int, number: int) -> None:
        def answer(self: Path) -> bytes:
            asked.append(self)
            if len(asked) <= after:
                raise OSError(number, os.strerror(number))
            return read(self)

        asked.clear()
        monkeypatch.setattr(Path, "read_bytes", answer)

    answering(2, errno.ESTALE)
    assert np.array_equal(source[3].pixels, expected)
    assert len(asked) == 3
    answering(100, errno.EIO)
    with pytest.raises(DataError, match=r"cannot be read: OSError: .*Input/output error") as error:
        source[3]
    assert not isinstance(error.value, BadImageError)
    answering(100, errno.EACCES)
    with pytest.raises(BadImageError, match="cannot be read: Permission denied"):
        source[3]
    assert len(asked) == 1
    scan, blocked = os.scandir, photos / "first class"

    def listed(folder: Path) -> Any:
        if folder == blocked:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", listed)
    with pytest.raises(DataError, match=r"first class/? cannot be read"):
        open_source(str(photos))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no such folder or file: nowhere"),
        ("procedural:nothing", "procedural:dead-leaves, procedural:shapes"),
        ("procedural:shapes@x", "not known"),
        ("imagefolder:{tmp}/missing", "no such folder"),
        ("{tmp}/empty", "no images in"),
        ("{tmp}/text.txt", "neither a .zip nor a .parquet"),
        ("{tmp}/missing", "no such folder or file"),
    ],
)
def test_a_path_that_holds_nothing_is_one_clear_error(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(DataError, match=message):
        open_source(path.format(tmp=tmp_path))


def test_a_damaged_zip_is_one_clear_error_and_a_damaged_member_a_bad_image(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    image = next(photos.rglob("*.png")).read_bytes()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("./good.png", image)
            archive.writestr("./hurt/hurt.png", image[::-1])
        data = bytearray(path.read_bytes())
        end = data.index(b"PK\x01\x02")
        for place in range(end - 2500, end - 2000):
            data[place] ^= 255
        path.write_bytes(data)
        source = open_source(str(path))
        assert source.classes == ("hurt",)
        assert source[0].pixels.shape == (60, 72, 3)
        with pytest.raises(BadImageError, match="cannot be read"):
            source[1]
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError):
        open_source(str(path))


def test_held_out_and_train_are_disjoint_and_together_everything(photos: Path) -> None:
    whole = open_source(str(photos))
    parts = {s: open_source(f"{photos}#{s}") for s in ("train", "held-out")}
    names = {s: [p.name(i) for i in range(len(p))] for s, p in parts.items()}
    assert sorted(names["train"] + names["held-out"]) == [whole.name(i) for i in range(12)]
    assert len(names["held-out"]) == 2
    endless = open_source("procedural:dead-leaves#held-out", resolution=16)
    assert np.array_equal(endless[5].pixels, open_source("procedural:dead-leaves", resolution=16)[50].pixels)


def test_a_mix_counts_the_images_of_a_path_as_often_as_it_says(photos: Path) -> None:
    mix = open_mix([f"{photos}#train", f"{photos}#held-out:3"], open_source)
    train, held_out = open_source(f"{photos}#train"), open_source(f"{photos}#held-out")
    names = [mix.name(i) for i in range(len(mix))]
    assert Counter(names) == Counter(map(train.name, range(len(train)))) + Counter(
        {held_out.name(i): 3 for i in range(len(held_out))}
    )
    assert np.array_equal(mix[len(mix) - 1].pixels, held_out[len(held_out) - 1].pixels)
    assert mix.fingerprint() != open_mix([f"{photos}#train", f"{photos}#held-out:2"], open_source).fingerprint()
    assert open_mix([str(photos)], open_source).fingerprint() == open_source(str(photos)).fingerprint()


@pytest.mark.parametrize("name", ["dead-leaves", "shapes"])
def test_procedural_images_depend_on_seed_and_index_alone(name: str) -> None:
    first, again = (open_source(f"procedural:{name}", resolution=48) for _ in range(2))
    other = open_source(f"procedural:{name}@1", resolution=48)
    for i in (0, 7, 10**11):
        assert first[i].pixels.shape == (48, 48, 3)
        assert np.array_equal(first[i].pixels, again[i].pixels)
        assert not np.array_equal(first[i].pixels, other[i].pixels)
    assert not np.array_equal(first[0].pixels, first[8].pixels)


def test_shapes_have_eight_labelled_classes() -> None:
    source = open_source("procedural:shapes", resolution=32, channels=1)
    assert source.classes == SHAPES
    assert [source[i].label for i in range(8)] == list(range(8))
    assert source[0].pixels.shape == (32, 32, 1)


def test_dead_leaves_have_the_statistics_of_natural_images() -> None:
    """The power spectrum of photographs falls as 1/f^2, their gradients have heavy tails (Lee et al. 2001)."""
    source = open_source("procedural:dead-leaves", resolution=128)
    grey = np.stack([source[i].pixels.mean(axis=2) for i in range(24)]) / 255
    power = (np.abs(np.fft.fft2(grey - grey.mean(axis=(1, 2), keepdims=True))) ** 2).mean(axis=0)
    f = np.fft.fftfreq(128)
    radius = np.hypot(f[:, None], f[None])
    bins = np.geomspace(0.03, 0.3, 9)
    middle = np.sqrt(bins[:-1] * bins[1:])
    energy = [power[(radius >= a) & (radius < b)].mean() for a, b in pairwise(bins)]
    slope = np.polyfit(np.log(middle), np.log(energy), 1)[0]
    assert -3.2 < slope < -1.6
    gradient = np.diff(grey, axis=2).ravel()
    kurtosis = ((gradient - gradient.mean()) ** 4).mean() / gradient.var() ** 2
    assert kurtosis > 6
    assert 0.1 < grey.std() < 0.35


def test_hidden_files_and_other_files_are_not_images(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    for name in ("a.PNG", ".hidden.png", "notes.txt", ".cache/b.png", "MANIFEST.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(file.getvalue())
    source = open_source(str(tmp_path))
    assert [source.name(i) for i in range(len(source))] == ["a.PNG"]
    assert source.classes == ()


def test_names_that_are_not_unicode_are_read(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")).write_bytes(file.getvalue())
    assert open_source(str(tmp_path))[0].pixels.shape == (4, 4, 3)


def test_only_what_would_be_read_again_is_kept_out_of_a_folder(photos: Path, tmp_path: Path) -> None:
    inside = photos / "a" / "run"
    for given in (photos, f"{photos}#train", f"{photos}#held-out", f"imagefolder:{photos}"):
        with pytest.raises(ConfigError, match="is inside --data"):
            check_outside(inside, str(given), flag="--data")
        check_outside(tmp_path / "run", str(given), flag="--data")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "0.parquet").touch()
    for given in ("procedural:shapes", tmp_path / "tables", tmp_path / "x.zip", "owner/name"):
        check_outside(tmp_path / "tables" / "run", str(given), flag="--data")


def test_how_files_are_understood_comes_from_the_flags_and_tells_sources_apart(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[0, 50], [100, 200]], np.int32))
    args = ["f8c4", "--data", str(tmp_path), "--output", "run", "--pages-as-channels", "--value-range"]
    options = parse_config(train_vae.PRESETS, description="", args=[*args, "0", "200"]).reading
    source = open_source(str(tmp_path), channels=1, options=options)
    assert np.allclose(source[0].pixels[:, :, 0], [[0, 0.25], [0.5, 1]])
    others = [ReadOptions(), ReadOptions(keep_colour=True), ReadOptions(value_range=(0, 100)), options]
    assert len({open_source(str(tmp_path), channels=1, options=o).fingerprint() for o in others}) == 4
    with pytest.raises(ConfigError, match="--value-range 5 5: black, then white, which is more; both finite"):
        parse_config(train_vae.PRESETS, description="", args=[*args, "5", "5"])


def test_a_run_from_before_a_group_of_flags_goes_on() -> None:
    config = train_vae.PRESETS["f8c4"][1]
    saved = as_json(config)
    del saved["reading"]
    assert differences(saved, config, free=()) == []
    assert differences(saved, replace(config, reading=ReadOptions(keep_colour=True)), free=()) != []


def test_what_was_left_out_of_an_image_is_said_once_of_each_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader.NOTED.clear()
    frames = [Image.new("L", (4, 4), value) for value in (10, 20, 30)]
    for name in ("a", "b"):
        frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=frames[1:])
    source = open_source(str(tmp_path))
    assert [source[i].notes for i in range(2)] == [("1 of 3 frames",)] * 2
    assert capsys.readouterr().err.splitlines() == [
        "a.gif: 1 of 3 frames (the first of such images; no others are named)"
    ]
