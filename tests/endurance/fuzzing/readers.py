"""Fuzzes everything that reads files (images, archives, shards, runs, models, caches) with mutated ones.

python -m tests.endurance.fuzzing.readers [--count 10000 --seed 0 --output RESULTS.json]

A reader must raise an LdmVaeError or return a result, within seconds, and never crash. Where a digest protects the
file, the result must be that of the original; otherwise it must be of a size that the limits allow.
"""

from __future__ import annotations

import io
import shutil
import struct
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import imagecodecs
import numpy as np
import pyvips
import tifffile
import torch
from diffusers.utils import logging
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm_vae.codec.fit_tables import fit_tables
from ldm_vae.codec.tables import load_tables
from ldm_vae.data import large
from ldm_vae.data.procedural import ProceduralSource
from ldm_vae.data.reader import ImageReader, ReadOptions, read_image
from ldm_vae.data.shards import ShardSource, build_index
from ldm_vae.data.sources import Source, open_source
from ldm_vae.errors import BadImageError, LdmVaeError, one_line_errors
from ldm_vae.files import write_json
from ldm_vae.latents.cache import LatentCache, Plan, begin, summarise, write_index, write_shard
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.interface import fingerprint
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.report import provenance
from ldm_vae.runs.config import Range, check_ranges, parse_flags
from ldm_vae.runs.run import Checkpoint, Run
from tests.endurance.fuzzing.mutations import mutate

MAX_PIXELS = 1 << 20
P3_PRIMARIES = [0.68, 0.32, 1, 0.265, 0.69, 1, 0.15, 0.06, 1]
READER = ImageReader(max_pixels=MAX_PIXELS)
SLOW = 20.0
"""Seconds of computing."""
Mutate = Callable[[bytes], bytes]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the fuzzer of readers."""

    count: Annotated[int, Range(at_least=1)] = 10_000
    """Files for each reader; readers of folders get a tenth."""
    seed: int = 0
    output: Path | None = None
    """File for the record; by default none."""


@dataclass(frozen=True)
class Settings:
    """Configuration of a run."""

    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)


# Images ---------------------------------------------------------------------------------------------------------------


def images() -> list[bytes]:
    """A small image in many formats."""
    pixels = ProceduralSource("dead-leaves", seed=0, size=40, channels=3)[0].pixels[:32]
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[274] = 6
    files = []
    for kind, options in (
        *(("PNG", {}), ("PNG", {"exif": exif}), ("JPEG", {"exif": exif}), ("GIF", {}), ("BMP", {}), ("PPM", {})),
        *(("WEBP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TGA", {}), ("ICO", {}), ("AVIF", {})),
        ("JPEG2000", {}),
    ):
        out = io.BytesIO()
        image.save(out, kind, **options)
        files.append(out.getvalue())
    for array, options in (
        (pixels.astype(np.uint16) * 257, {"photometric": "rgb", "compression": "zlib"}),
        (np.moveaxis(pixels, 2, 0), {"photometric": "minisblack"}),
        ((pixels[:, :, 0] / 255).astype(np.float32), {}),
    ):
        out = io.BytesIO()
        tifffile.imwrite(out, array, **options)
        files.append(out.getvalue())
    for dtype in (np.uint8, np.float32):
        out = io.BytesIO()
        np.save(out, (pixels / (1 if dtype == np.uint8 else 255)).astype(dtype))
        files.append(out.getvalue())
    deep = pyvips.Image.new_from_array(pixels.astype(np.uint16) * 257, interpretation="rgb16")
    return [*files, deep.pngsave_buffer(bitdepth=16), *odd_images(pixels)]


def odd_images(pixels: np.ndarray) -> list[bytes]:
    """The image at other depths and in other colours, with pages and frames, cut and late."""
    twelve = (pixels.astype(np.uint16) * 4095 + 127) // 255
    p3 = imagecodecs.cms_profile("rgb", whitepoint=[0.3127, 0.329, 1], primaries=P3_PRIMARIES, gamma=2.2)
    files = [
        imagecodecs.jpegxl_encode(pixels, lossless=True),
        imagecodecs.jpegxl_encode(twelve, lossless=True, bitspersample=12, usecontainer=True),
        imagecodecs.jpegxl_encode(np.stack([pixels, pixels[::-1]]), lossless=True),
        imagecodecs.jpeg2k_encode(twelve, level=0, bitspersample=12, reversible=True),
        imagecodecs.avif_encode(twelve, level=90, bitspersample=12, primaries=9, transfer=16, matrix=9),
        imagecodecs.jpeg8_encode(twelve, level=90, bitspersample=12),
        b"P6 %d %d 4095\n" % pixels.shape[1::-1] + twelve.astype(">u2").tobytes(),
    ]
    for array, options in (
        (pixels, {"photometric": "cielab"}),
        (twelve, {"photometric": "icclab"}),
        (np.concatenate([twelve, twelve[:, :, :1]], axis=2), {"photometric": "separated"}),
        (np.stack([pixels[:, :, 0]] * 3), {"photometric": "minisblack"}),
        (pixels, {"photometric": "rgb", "iccprofile": bytes(p3)}),
        (
            np.concatenate([pixels, pixels[:, :, :2]], axis=2),
            {"photometric": "separated", "extrasamples": ["unassalpha"]},
        ),
        (pixels, {"photometric": "rgb", "compression": "png"}),
    ):
        out = io.BytesIO()
        tifffile.imwrite(out, array, **options)
        files.append(out.getvalue())
    image, again = Image.fromarray(pixels), Image.fromarray(pixels[::-1])
    exif, texts = Image.Exif(), PngInfo()
    exif[270], exif[0x8769] = "a title", {40962: 40, 33434: 0.01}
    texts.add(b"gAMA", struct.pack(">I", 100_000))
    texts.add(b"cHRM", struct.pack(">8I", *(31270, 32900), *(int(v * 100_000) for v in P3_PRIMARIES if v != 1)))
    texts.add(b"tIME", bytes(7))
    for text in ("a cat", "a dog" * 100):
        texts.add_text("prompt", text, zip=len(text) > 10)
    for kind, options in (
        *(("PNG", {"icc_profile": bytes(p3), "exif": exif}), ("JPEG", {"icc_profile": bytes(p3), "exif": exif})),
        *((kind, {"save_all": True, "append_images": [again]}) for kind in ("GIF", "WEBP", "PNG", "AVIF", "MPO")),
        ("PNG", {"transparency": tuple(int(v) for v in pixels[0, 0])}),
        ("PNG", {"pnginfo": texts}),
    ):
        out = io.BytesIO()
        image.save(out, kind, **options)
        files.append(out.getvalue())
    jpeg = next(data for data in files if data.startswith(b"\xff\xd8") and b"ICC_PROFILE" in data)
    return [*files, b"junk" + jpeg, jpeg[:-2]]


def read_one(data: bytes, folder: Path | None) -> None:
    """As training does, and as compress does by way of the disk where there is a folder."""
    options = ReadOptions(keep_colour=folder is not None)
    found = read_image(data, keep_alpha=folder is not None, max_pixels=MAX_PIXELS, options=options, scratch=folder)
    pixels = found.pixels
    channels = (3,) if folder is None else (1, 2, 3, 4)
    right = pixels.ndim == 3 and pixels.shape[2] in channels and pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
    if not right or pixels.dtype not in (np.uint8, np.uint16, np.float32):
        raise AssertionError(f"pixels of {pixels.dtype} {pixels.shape}")
    if pixels.dtype == np.float32 and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise AssertionError(f"pixels from {pixels.min()} to {pixels.max()}")


# Folders: made once, then one file is mutated at a time -------------------------------------------------------------


def make_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, data in enumerate(images()[:4]):
            archive.writestr(f"class {i % 2}/{i}.png", data)


def make_shards(folder: Path) -> None:
    source = ProceduralSource("dead-leaves", seed=0, size=24, channels=3)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(3):
                out = io.BytesIO()
                Image.fromarray(source[i].pixels).save(out, "PNG")
                for name, data in ((f"{i}.png", out.getvalue()), (f"{i}.cls", str(i % 2).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    build_index(sorted(map(str, folder.glob("*.tar"))))


def index_again(folder: Path) -> None:
    build_index(sorted(map(str, folder.glob("*.tar"))))
    read_all(ShardSource(str(folder), READER))


def read_all(source: Source) -> None:
    for i in range(min(len(source), 100)):
        try:
            source.name(i)
            source[i]
        except BadImageError:
            pass
    source.fingerprint()


def make_run(folder: Path) -> None:
    run = Run(folder, Settings())
    for step in (1, 2):
        run.log(step, {"loss": 1.0})
        run.save(checkpoint(step))
    run.add_bad_images({"a.png": "empty file", 'b, "c".png': "cut\nshort"})
    run.release()
    (folder / ".lock").unlink()


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step=step, tensors={"a": torch.full((3, 4), float(step))}, facts={"seconds": 1.5, "skipped": 0})


def read_run(folder: Path) -> None:
    run = Run(folder, Settings())
    try:
        loaded = run.load_newest()
        expected = checkpoint(loaded.step if loaded else 0)
        right = loaded is not None and loaded.facts == expected.facts
        if loaded is None or not right or not torch.equal(loaded.tensors["a"], expected.tensors["a"]):
            raise AssertionError(f"another checkpoint was loaded: {loaded}")
        run.forget_after(loaded.step)
    finally:
        run.release()


def small_vae() -> PatchAutoencoderKL:
    torch.manual_seed(0)
    return PatchAutoencoderKL(block_out_channels=(8, 8), decoder_layers_per_block=(0, 1))


def make_model(folder: Path) -> None:
    small_vae().save_pretrained(folder)


def make_cache(folder: Path) -> None:
    vae = small_vae()
    plan = Plan(
        vae=fingerprint(vae),
        data="0" * 64,
        num_images=3,
        resolution=16,
        flip=False,
        latent_shape=(4, 2, 2),
        classes=("a", "b"),
        shard_size=2,
    )
    begin(folder, plan)
    for shard in range(plan.num_shards):
        indices = list(plan.indices(shard))
        moments = np.random.default_rng(shard).standard_normal((len(indices), 1, 8, 2, 2))
        write_shard(folder, shard, moments=moments, indices=indices, labels=[0] * len(indices), bad_images={})
    write_index(folder, summarise(folder, plan))


def read_cache(folder: Path) -> None:
    cache = LatentCache(folder)
    for i in range(min(len(cache), 100)):
        cache.load(i)
    summarise(folder, cache.plan)


def make_tables(folder: Path) -> None:
    vae = small_vae()
    source = open_source("procedural:dead-leaves", resolution=64)
    fit_tables(vae, source, num_images=2, steps=(1,)).save(folder)


FOLDERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "zip": (make_zip, lambda f: read_all(open_source(str(f / "images.zip"), max_pixels=MAX_PIXELS))),
    "shards, indexed again": (make_shards, index_again),
    "shards and their index": (make_shards, lambda f: read_all(ShardSource(str(f), READER))),
    "run directory": (make_run, read_run),
    "model": (make_model, lambda f: load_autoencoder(str(f))),
    "cache of latents": (make_cache, read_cache),
    "codec's tables": (make_tables, load_tables),
}


# The fuzzer -----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Numbers of files that a reader read, refused, was slow with, or crashed on."""

    read: int = 0
    refused: int = 0
    slow: int = 0
    crashed: int = 0
    first: str = ""
    """The first crash."""


def attempt(read: Callable[[], Any], outcome: Outcome) -> None:
    began = time.process_time()
    try:
        read()
        outcome.read += 1
    except LdmVaeError:
        outcome.refused += 1
    except Exception as error:
        outcome.crashed += 1
        outcome.first = outcome.first or f"{type(error).__name__}: {error}"
    outcome.slow += time.process_time() - began > SLOW


def fuzz(count: int, seed: int, work: Path) -> dict[str, Outcome]:
    """Outcomes by reader: `count` mutated images, twice, and a tenth as many mutated files of each kind of folder."""
    rng = np.random.default_rng(seed)
    files = images()
    outcomes: dict[str, Outcome] = {}
    threshold, large.LARGE = large.LARGE, 1 << 8
    try:
        for name, folder in (("images", None), ("images, by way of the disk", work)):
            outcomes[name] = Outcome()
            for _ in range(count):
                data = mutate(files[int(rng.integers(len(files)))], files, rng)
                attempt(lambda data=data, folder=folder: read_one(data, folder), outcomes[name])  # type: ignore[misc]
    finally:
        large.LARGE = threshold
    for name, (make, read) in FOLDERS.items():
        outcomes[name] = Outcome()
        whole, here = work / "whole", work / "here"
        whole.mkdir()
        make(whole)
        names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
        for _ in range(max(count // 10, 1)):
            shutil.copytree(whole, here)  # with its times
            file = here / names[int(rng.integers(len(names)))]
            data = file.read_bytes()
            mutated = mutate(data, [data], rng)
            file.write_bytes(mutated)
            attempt(lambda here=here, read=read: read(here), outcomes[name])  # type: ignore[misc]
            shutil.rmtree(here)
        shutil.rmtree(whole)
    return outcomes


def main(config: Config) -> None:
    check_ranges(config)
    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as work:
        outcomes = fuzz(config.count, config.seed, Path(work))
    for name, outcome in outcomes.items():
        print(f"{name}: {asdict(outcome)}")
    if config.output is not None:
        results = {name: asdict(outcome) for name, outcome in outcomes.items()}
        write_json(config.output, provenance(config) | {"results": results})
    print(Counter({k: sum(getattr(o, k) for o in outcomes.values()) for k in ("read", "refused", "slow", "crashed")}))
    raise SystemExit(any(o.crashed or o.slow for o in outcomes.values()))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Fuzz everything that reads files."))
