from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from ldm_vae import cli
from ldm_vae.commands import shards as packing
from ldm_vae.data.loader import CropDataset
from ldm_vae.data.reader import ImageReader
from ldm_vae.data.shards import FACTS, ROW, ROWS, ShardSource, build_index, index_folder, ordered, shards_of
from ldm_vae.data.sources import open_source
from ldm_vae.data.workers import made_ahead
from ldm_vae.errors import BadImageError, DataError


def png(seed: int, side: int = 9) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(side, side + 2, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(file: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.DEFAULT_FORMAT) -> None:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w", format=tar_format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images in three classes, and one that is none."""
    for i in range(12):
        target = tmp_path / "images" / "abc"[i % 3] / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(png(i, side=9 + i))
    return tmp_path / "images"


def test_packed_shards_give_what_the_folder_gives(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    cli.main(["shards", "pack", str(folder), str(packed), "--shard-mib", "1", "--workers", "2"])
    whole, shards = open_source(str(folder)), open_source(str(packed))
    assert isinstance(shards, ShardSource)
    assert shards.classes == ("a", "b", "c")
    assert len(shards) == 12
    for i in range(12):
        assert np.array_equal(shards[i].pixels, whole[i].pixels)
        assert shards[i].label == whole[i].label
        assert shards.name(i) == f"images-000000.tar/{i:09d}.png"
    crops, same = (CropDataset(s, seed=1, resolution=8) for s in (whole, pickle.loads(pickle.dumps(shards))))
    for position in (0, 5, 10**11):
        assert np.array_equal(crops[position].image, same[position].image)


def test_names_of_classes_stay_names(tmp_path: Path) -> None:
    """Folders called 7 and 007 are two classes, and there are none between 7 and 12."""
    for i, name in enumerate(("007", "7", "12", "7")):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name / f"{i}.png").write_bytes(png(i))
    cli.main(["shards", "pack", str(tmp_path / "images"), str(tmp_path / "packed")])
    whole, shards = open_source(str(tmp_path / "images")), open_source(str(tmp_path / "packed"))
    assert shards.classes == whole.classes
    assert [shards[i].label for i in range(4)] == [whole[i].label for i in range(4)]


def test_names_of_classes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert ordered(["a-10", "a-2", "b"])[0] == ["a-2", "a-10", "b"]
    assert ordered(["10", "9"])[1].tolist() == [1, 0, -1]


def test_images_that_share_a_key_are_not_left_out_in_silence(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"IMG.{i:03d}.png", png(i)) for i in range(5)])
    with pytest.warns(UserWarning, match=r"4 images are left out, such as IMG.001.png"):
        build_index(shards_of(str(tmp_path)))
    assert len(open_source(str(tmp_path))) == 1


def test_dots_in_folders_belong_to_the_key_and_packing_keeps_names_with_dots(tmp_path: Path) -> None:
    members = [("v1.5/a.png", png(0)), ("v1.5/a.cls", b"1"), ("v1.5/b.x/c.png", png(1)), ("v1.5/b.x/c.cls", b"0")]
    write_tar(tmp_path / "dots" / "a.tar", members)
    cli.main(["shards", "index", str(tmp_path / "dots")])
    source = open_source(str(tmp_path / "dots"))
    assert [source[i].label for i in range(len(source))] == [1, 0]
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"IMG.{i:03d}.v2.png").write_bytes(png(i))
    cli.main(["shards", "pack", str(tmp_path / "images"), str(tmp_path / "packed")])
    whole, shards = open_source(str(tmp_path / "images")), open_source(str(tmp_path / "packed"))
    assert len(shards) == 3
    assert all(np.array_equal(shards[i].pixels, whole[i].pixels) for i in range(3))


def test_fewer_shards_than_workers_give_every_image_once(folder: Path, tmp_path: Path) -> None:
    cli.main(["shards", "pack", str(folder), str(tmp_path / "packed"), "--workers", "8"])
    cli.main(["shards", "index", str(tmp_path / "packed"), "--workers", "8"])
    assert len(list((tmp_path / "packed").glob("*.tar"))) == 1
    source = open_source(str(tmp_path / "packed"))
    loaded = list(made_ahead(source.__getitem__, range(12), num_workers=2))
    assert [sample.name for sample in loaded] == [source.name(i) for i in range(12)]
    assert all(np.array_equal(sample.pixels, source[i].pixels) for i, sample in enumerate(loaded))


def test_packing_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(12, 24):
        noise = np.random.default_rng(i).integers(256, size=(400, 400, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "a" / f"{i}.png")
    packed, command = tmp_path / "packed", ["shards", "pack", str(folder), str(tmp_path / "packed"), "--shard-mib", "1"]
    made: list[int] = []

    def stopped_after(count: int, make: Any = packing.make_shard) -> Any:
        def make_shard(source: Any, begin: int, *more: Any) -> Any:
            if len(made) == count:
                raise KeyboardInterrupt
            made.append(begin)
            return make(source, begin, *more)

        return make_shard

    monkeypatch.setattr(packing, "make_shard", stopped_after(3))
    with pytest.raises(KeyboardInterrupt):
        cli.main(command)
    assert list(packed.glob("*.tar")) == []
    monkeypatch.setattr(packing, "make_shard", stopped_after(-1))
    with monkeypatch.context() as patched:
        patched.setattr(packing.os, "replace", replaced_until(packed, 2))
        with pytest.raises(KeyboardInterrupt):
            cli.main(command)  # stopped again, when some of them stand where they belong
    assert len(list(packed.glob("*.tar"))) == 2
    with monkeypatch.context() as patched:
        patched.setattr(packing, "index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cli.main(command)  # and when all do
    cli.main(command)
    assert not (packed / packing.BEGUN).exists()
    assert len(made) == len(set(made)) == len(list(packed.glob("*.tar"))) > 4
    whole, shards = open_source(str(folder)), open_source(str(packed))
    assert all(np.array_equal(shards[i].pixels, whole[i].pixels) for i in range(24))
    assert not (packed / packing.BEGUN).exists()


def replaced_until(folder: Path, count: int, replace: Any = os.replace) -> Any:
    def stopping(source: Any, target: Any) -> None:
        if Path(target).parent == folder and len(list(folder.glob("*.tar"))) == count:
            raise KeyboardInterrupt
        replace(source, target)

    return stopping


def test_what_is_there_is_replaced_by_what_is_whole_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, broken = tmp_path / "packed", tmp_path / "broken"
    cli.main(["shards", "pack", str(folder), str(packed)])
    before = (packed / "images-000000.tar").read_bytes()
    broken.mkdir()
    (broken / "a.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        cli.main(["shards", "pack", str(broken), str(packed), "--overwrite"])
    assert "no usable image" in capsys.readouterr().err
    assert (packed / "images-000000.tar").read_bytes() == before
    (packed / "mine.tar").write_bytes(b"")
    with pytest.raises(SystemExit):
        cli.main(["shards", "pack", str(folder), str(packed), "--overwrite"])
    assert "mine.tar is none of ours" in capsys.readouterr().err
    assert len(list(packed.glob("*.tar"))) == 2


def test_a_server_that_does_not_answer_makes_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another crop in its place would make the run another one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ldm_vae.data.image_files.RETRY_AFTER", (0.0, 0.0))
    write_tar(tmp_path / "a.tar", [("0.png", png(0))])
    memory = fsspec.filesystem("memory")
    memory.pipe("/silent/a.tar", (tmp_path / "a.tar").read_bytes())
    build_index(["memory://silent/a.tar"])
    source = open_source("memory://silent/a.tar")
    asked: list[int] = []
    cat_file = type(memory).cat_file

    def answering(after: int) -> Any:
        def answer(self: Any, *words: Any, **more: Any) -> bytes:
            asked.append(len(asked))
            if len(asked) <= after:
                raise TimeoutError("no answer")
            return cat_file(self, *words, **more)

        return answer

    monkeypatch.setattr(type(memory), "cat_file", answering(2))
    assert np.array_equal(source[0].pixels, np.asarray(Image.open(io.BytesIO(png(0)))))
    asked.clear()
    monkeypatch.setattr(type(memory), "cat_file", answering(3))
    with pytest.raises(DataError, match="cannot be read: TimeoutError: no answer") as raised:
        source[0]
    assert not isinstance(raised.value, BadImageError)


def test_shards_are_read_through_a_pattern_and_any_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    paths = []
    for shard in range(3):
        file = tmp_path / f"x-{shard}.tar"
        members = [(f"{shard}/{i}.png", png(10 * shard + i)) for i in range(4)]
        members += [(f"{shard}/{i}.cls", str(7 - i).encode()) for i in range(3)]
        write_tar(file, [*members, (f"{shard}/0.json", b'{"width": 3}'), ("readme.txt", b"")])
        memory.pipe(f"/bucket/x-{shard}.tar", file.read_bytes())
        paths.append(str(file))
    for pattern in (str(tmp_path / "x-{0..2}.tar"), "memory://bucket/x-{0..2}.tar"):
        with pytest.raises(DataError, match="ldm-vae shards index"):
            open_source(pattern)
        build_index(shards_of(pattern))
        source = open_source(pattern)
        assert len(source) == 12
        assert source.classes == tuple("01234567")
        assert [source[i].label for i in range(4)] == [7, 6, 5, None]
        expected = np.asarray(Image.open(io.BytesIO(png(21))))
        assert np.array_equal(source[9].pixels, expected)
        assert source.name(9) == "x-2.tar/2/1.png"
    assert index_folder(paths).parent == tmp_path
    assert index_folder(["memory://bucket/x-0.tar"]).is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_and_long_names(tmp_path: Path, tar_format: int) -> None:
    long = "d" * 90 + "/" + "é" * 30 + "-long-enough-for-a-record-of-its-own" * (tar_format != tarfile.USTAR_FORMAT) * 3
    members = [(f"{long}{i}.png", png(i)) for i in range(3)]
    write_tar(
        tmp_path / "a.tar", [*members, (f"{long}1.seg.png", png(9)), (f"{long}2.json", b'{"class": "cat"}')], tar_format
    )
    with pytest.warns(UserWarning, match="1 images are left out"):
        build_index(shards_of(str(tmp_path)))
    source = open_source(str(tmp_path))
    assert len(source) == 3
    assert source.classes == ("cat",)
    assert [source[i].label for i in range(3)] == [None, None, 0]
    for i in range(3):
        assert np.array_equal(source[i].pixels, np.asarray(Image.open(io.BytesIO(png(i)))))


def test_a_changed_shard_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    write_tar(file, [(f"{i}.png", png(i)) for i in range(3)])
    build_index([str(file)])
    source = ShardSource(str(file), ImageReader(max_pixels=1000))
    before = source.fingerprint()
    write_tar(file, [("0.png", png(0, side=40)), ("1.png", png(1)), ("2.png", png(2))])
    with pytest.raises(BadImageError, match="has changed since"):
        source[1]
    assert source.name(1).startswith("a.tar/")
    with pytest.raises(DataError, match="has changed since it was indexed: run"):
        open_source(str(file))
    build_index([str(file)])
    again = open_source(str(file), max_pixels=1000)
    assert again.fingerprint() != before
    with pytest.raises(BadImageError, match="pixels"):
        again[0]
    file.unlink()
    with pytest.raises(BadImageError, match="cannot be read"):
        again[1]
    with pytest.raises(DataError, match="no such shard"):
        open_source(str(file))


def test_what_is_no_shard_or_no_index_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["shards", *words])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    file = tmp_path / "a.tar"
    file.write_bytes(b"no tar" * 1000)
    assert "cannot be read" in fails("index", str(file))
    write_tar(file, [("0.txt", b"")])
    assert "no images" in fails("index", str(file))
    write_tar(file, [(f"{i}.png", png(i)) for i in range(3)])
    file.write_bytes(file.read_bytes()[:2000])
    assert "cannot be read" in fails("index", str(file))
    assert "no such shard" in fails("index", str(tmp_path / "b-{0..3}.tar"))
    (tmp_path / "empty").mkdir()
    assert "no .tar" in fails("index", str(tmp_path / "empty"))
    assert "not a pattern" in fails("index", str(tmp_path / "b-{0.tar"))
    write_tar(file, [("0.png", png(0)), ("0.cls", b"99999999999999")])
    build_index([str(file)])  # a name, not a number
    write_tar(file, [("0.png", png(0)), ("0.cls", b"1000000")])
    assert "class 1000000 is more" in fails("index", str(file))
    write_tar(file, [("0.png", png(0))])
    cli.main(["shards", "index", str(file)])
    index = index_folder([str(file)])
    whole = {name: (index / name).read_bytes() for name in (FACTS, ROWS)}
    for name, content in whole.items():
        for damaged in (b"", content[: len(content) // 2], b"\x00" * len(content)):
            (index / name).write_bytes(damaged)
            with pytest.raises(DataError, match="damaged"):
                open_source(str(file))
        (index / name).write_bytes(content)
    facts = json.loads(whole[FACTS])
    (index / FACTS).write_text(json.dumps(facts | {"version": 2}))
    with pytest.raises(DataError, match="version 2"):
        open_source(str(file))
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "0.png").write_bytes(png(0))
    (folder / "1.png").symlink_to(tmp_path / "nowhere")
    cli.main(["shards", "pack", str(folder), str(tmp_path / "packed")])
    assert "1.png" in (tmp_path / "packed" / "bad_images.csv").read_text()
    assert "already" in fails("pack", str(folder), str(tmp_path / "packed"))
    cli.main(["shards", "pack", str(folder), str(tmp_path / "packed"), "--overwrite"])
    assert len(open_source(str(tmp_path / "packed"))) == 1


def test_links_and_names_that_lead_elsewhere_are_names(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name in ("../../../etc/left-out.png", "/etc/evil.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png(1))
            tar.addfile(member, io.BytesIO(png(1)))
    build_index([str(file)])
    source = open_source(str(file))
    assert len(source) == 1
    assert np.array_equal(source[0].pixels, np.asarray(Image.open(io.BytesIO(png(1)))))


def test_a_hundred_million_rows_cost_no_memory(tmp_path: Path) -> None:
    """A sparse file of so many rows: the last one is read as fast as the first, and nothing is held."""
    file = tmp_path / "a.tar"
    write_tar(file, [("0.png", png(0))])
    index = build_index([str(file)])
    row = np.load(index / ROWS)
    count = 10**8
    with open(index / ROWS, "wb") as out:
        np.lib.format.write_array_header_2_0(
            out, {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (count,)}
        )
        begin = out.tell()
        out.truncate(begin + count * ROW.itemsize)
        out.seek(begin + (count - 1) * ROW.itemsize)
        out.write(row.tobytes())
    facts = json.loads((index / FACTS).read_text())
    (index / FACTS).write_text(json.dumps(facts | {"samples": count}))
    tracemalloc.start()
    source = open_source(str(file))
    assert len(source) == count
    assert source[count - 1].name == "a.tar/0.png"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < count * ROW.itemsize / 100
    with pytest.raises(DataError, match="damaged at row 0"):
        source[0]
    row["offset"] = np.iinfo(row["offset"].dtype).max  # past what a file may have
    with open(index / ROWS, "r+b") as out:
        out.seek(begin + (count - 1) * ROW.itemsize)
        out.write(row.tobytes())
    with pytest.raises(DataError, match=f"damaged at row {count - 1}"):
        open_source(str(file)).name(count - 1)
