"""Fuzzes the codec with mutated compressed files, and with mutated tables.

python -m tests.endurance.fuzzing.codec [--count 100000 --models 2000 --seed 0 --output RESULTS.json]

Half of the mutations leave the checksums as they were: each file must be refused, or decode to the original picture.
The other half correct the checksums, as a hostile writer would: they must be refused, or decode to a picture of the
size in the header. Nothing may crash or hang. The network is untrained, which makes no difference to the bytes.

Tables come with the digest that fits them, as a hostile model would: each must be refused, or give back the symbols
that it is given.
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from zlib import crc32

import numpy as np
import torch

from ldm_vae.codec import bitstream
from ldm_vae.codec.bitstream import Limits
from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.contexts import decode_symbols, encode_symbols
from ldm_vae.codec.fit_tables import fit_tables
from ldm_vae.codec.picture import Picture, encode_picture
from ldm_vae.codec.sections import RAW
from ldm_vae.codec.tables import TYPES, Tables, load_tables
from ldm_vae.data.images import Pixels
from ldm_vae.data.metadata import Metadata
from ldm_vae.data.sources import open_source
from ldm_vae.errors import CompressedFileError, ConfigError, ModelError, one_line_errors
from ldm_vae.files import write_json
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.report import provenance
from ldm_vae.runs.config import Range, check_ranges, parse_flags
from tests.endurance.fuzzing.mutations import mutate

LIMITS = Limits(max_pixels=1 << 16, max_side=1 << 10)
EXTENSIONS = (".png", ".jpg", ".tif", ".npy")
METADATA = Metadata(
    icc=b"profile" * 30,
    cicp=(9, 16, 0, 1),
    exif=b"II*\0\x08\0\0\0\0\0",
    xmp=b"<x:xmpmeta/>",
    text=(("prompt", "a cat"), ("Comment", "é")),
    resolution=(300.0, 150.0),
)
SLOW = 10.0
"""Seconds of computing within which any file must be decoded."""
MOST_MEMORY = 1 << 29
"""Bytes that Python and NumPy may allocate at a time."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the fuzzer."""

    count: Annotated[int, Range(at_least=1)] = 100_000
    """Files."""
    models: Annotated[int, Range(at_least=1)] = 2000
    seed: int = 0
    output: Path | None = None
    """File for the record; by default none."""


def mutate_inside(data: bytes, rng: np.random.Generator) -> bytes:
    """A field, section or tile changed, and every checksum corrected."""
    contents = bitstream.unpack(data)
    parts = {k: bytearray(contents.read(p)) for k, p in contents.sections.items()}
    tiles = [bytearray(contents.read(p)) for p in contents.tiles]
    entries = bitstream.Varints(data)
    bitstream.read_header(entries)
    header = bytearray(data[: entries.position])
    target = int(rng.integers(5))
    if target == 0:
        header[int(rng.integers(4, len(header)))] = int(rng.integers(256))
    elif target == 1 and len(tiles) > 1:  # a contents table that lies
        match rng.integers(3):
            case 0:
                tiles.pop(int(rng.integers(len(tiles))))
            case 1:
                tiles.append(bytearray(tiles[0]))
            case 2:
                tiles[0], tiles[-1] = tiles[-1], tiles[0]
    elif target == 2 and parts:
        kind = int(rng.choice(list(parts)))
        part = parts[kind]
        deflated = kind == bitstream.METADATA and bool(rng.random() < 0.5)  # else most changes end at the inflater
        content = zlib.decompress(part, RAW) if deflated else bytes(part)
        content = mutate(content, [content], rng)
        part[:] = zlib.compress(content, 1, RAW) if deflated else content
    else:
        tile = tiles[int(rng.integers(len(tiles)))]
        tile[:] = mutate(bytes(tile), [bytes(t) for t in tiles], rng)
    head = bytes(header)
    for kind, part in sorted(parts.items()):
        head += bytes([kind]) + bitstream.varint(len(part)) + crc32(part).to_bytes(4, "little")
    for tile in tiles:
        head += bitstream.varint(len(tile)) + crc32(tile).to_bytes(4, "little")
    return b"".join([head, crc32(head).to_bytes(4, "little"), *(p for _, p in sorted(parts.items())), *tiles])


def same(picture: Picture, other: Picture) -> bool:
    return np.array_equal(picture.whole(), other.whole()) and picture.metadata == other.metadata


def fuzz(codec: LatentCodec, photo: Pixels, *, count: int, seed: int) -> dict[str, Any]:
    """Outcomes of `count` mutated files: numbers, and the files themselves for those that must not occur."""
    rng = np.random.default_rng(seed)
    alpha = np.ascontiguousarray(photo[:, :, 0])
    codec.log2_tile = 4  # the smallest: several tiles in a small picture
    several = codec.compress(photo, step=1)
    codec.log2_tile = LatentCodec.log2_tile
    files = [
        several,
        codec.compress(photo, step=0.5),
        codec.compress(photo[:24, :40, :1], step=1),
        codec.compress(Picture(pixels=photo, alpha=alpha, metadata=METADATA), step=2),
    ]
    whole = [codec.decompress_picture(f) for f in files]
    outcome: dict[str, Any] = {"wrong": [], "crashed": [], "slow": [], "refused": 0, "past the checksums": 0}
    reasons: Counter[str] = Counter()
    for _ in range(count):
        which = int(rng.integers(len(files)))
        honest = bool(rng.random() < 0.5)  # checksums as they were
        data = mutate(files[which], files, rng) if honest else mutate_inside(files[which], rng)
        outcome["past the checksums"] += not honest and data != files[which]
        began = time.process_time()
        try:
            picture = codec.decompress_picture(data, limits=LIMITS)
            header = bitstream.unpack(data).header
            right = picture.pixels.shape == (header.height, header.width, header.colours)
            if honest:
                right = any(same(picture, w) for w in whole)
            if not right:
                outcome["wrong"].append(data)
            with suppress(ConfigError):  # metadata that a format cannot hold
                encode_picture(picture, EXTENSIONS[int(rng.integers(len(EXTENSIONS)))])
        except CompressedFileError as error:
            outcome["refused"] += 1
            reasons[type(error).__name__] += 1
            with suppress(CompressedFileError):
                codec.decompress_picture(data, limits=LIMITS, damage=[])  # salvage
        except Exception as error:
            outcome["crashed"].append((data, repr(error)))
        if time.process_time() - began > SLOW:
            outcome["slow"].append(data)
    return outcome | {"reasons": dict(reasons)}


def mutate_tables(tables: Tables, rng: np.random.Generator) -> Tables:
    """A number, a type or a shape of one array is changed; the contexts are no longer checked."""
    arrays = [{name: getattr(c, name).copy() for name in TYPES} for c in tables.contexts]
    chosen = arrays[int(rng.integers(len(arrays)))]
    name = str(rng.choice(list(TYPES)))
    array = chosen[name]
    match rng.integers(8):
        case 0:
            chosen[name] = array.astype(rng.choice([np.int8, np.int32, np.int64, np.float32]))
        case 1:
            chosen[name] = array[:-1]
        case 2:
            chosen[name] = array.reshape(-1)
        case _:
            for _ in range(int(rng.integers(1, 4))):
                limits = np.iinfo(array.dtype)
                value = rng.choice([limits.min, limits.max, 0, 1, -1, int(rng.integers(-12, 64))])
                array.reshape(-1)[rng.integers(array.size)] = np.clip(value, limits.min, limits.max)
    return replace(tables, contexts=tuple(SimpleNamespace(**a) for a in arrays))


def fuzz_tables(tables: Tables, *, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Outcomes of `count` mutated model folders."""
    rng = np.random.default_rng(seed)
    symbols = np.rint(rng.laplace(size=(len(tables.channels), 40, 30)) * 3).astype(np.int32)
    outcome: dict[str, Any] = {"wrong": [], "crashed": [], "slow": [], "refused": 0}
    for _ in range(count):
        mutated = mutate_tables(tables, rng)
        mutated.save(folder)
        began = time.process_time()
        try:
            for contexts in load_tables(folder).contexts:
                payload = encode_symbols(symbols, contexts)
                if not np.array_equal(decode_symbols(payload, symbols.shape, contexts), symbols):
                    outcome["wrong"].append(mutated)
        except ModelError:
            outcome["refused"] += 1
        except Exception as error:
            outcome["crashed"].append((mutated, repr(error)))
        if time.process_time() - began > SLOW:
            outcome["slow"].append(mutated)
    return outcome


def untrained_codec() -> tuple[LatentCodec, Pixels]:
    """A small codec, and a photo of 96 x 80 pixels to compress with it."""
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(
        latent_channels=4,
        patch_size=4,
        block_out_channels=(16,),
        encoder_layers_per_block=(1,),
        decoder_layers_per_block=(1,),
    )
    with torch.no_grad():
        vae.encoder.conv_out.bias[4:] = -5.0
    source = open_source("procedural:dead-leaves", resolution=96)
    codec = LatentCodec(vae, fit_tables(vae, source, num_images=6, steps=(0.5, 1, 2)))
    return codec, source[0].pixels[:80]


def main(config: Config) -> None:
    check_ranges(config)
    torch.set_num_threads(1)
    codec, photo = untrained_codec()
    tracemalloc.start()
    outcome = fuzz(codec, photo, count=config.count, seed=config.seed)
    with tempfile.TemporaryDirectory() as folder:
        of_tables = fuzz_tables(codec.tables, count=config.models, seed=config.seed, folder=Path(folder))
    outcome |= {f"tables {name}": value for name, value in of_tables.items()}
    _, peak = tracemalloc.get_traced_memory()
    results = {name: len(value) if isinstance(value, list) else value for name, value in outcome.items()}
    results["peak MiB in Python and NumPy"] = round(peak / 2**20)
    for name, value in results.items():
        print(f"{name}: {value}")
    if config.output is not None:
        write_json(config.output, provenance(config) | {"results": results})
    bad = [value for value in outcome.values() if isinstance(value, list) and value]
    if bad:
        print(bad[0][0])
    raise SystemExit(bool(bad) or peak > MOST_MEMORY)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Mutate compressed files and decode them."))
