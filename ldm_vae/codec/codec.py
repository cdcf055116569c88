"""LatentCodec: pictures to bytes and back through an autoencoder, and how its tables are fitted.

compress: picture -> posterior mean -> int32 symbols -> tiles of bytes -> file; decompress goes the same way back.
Floats end at `quantise`: which bytes are written for given symbols, and read for given bytes, is integers alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from ldm_vae.codec import bitstream, picture
from ldm_vae.codec.bitstream import Contents, Header, Limits
from ldm_vae.codec.contexts import INT32
from ldm_vae.codec.picture import Picture, as_picture
from ldm_vae.codec.tables import DIGEST_BYTES, QUALITY_ONE, Tables, load_tables
from ldm_vae.codec.tiles import CodedTile, decode_tiles, encode_tiles
from ldm_vae.data.images import Pixels, to_images, to_pixels
from ldm_vae.errors import CompressedFileError, ConfigError, CorruptError, ModelError, ModelMismatchError
from ldm_vae.files import is_hub_id
from ldm_vae.models.pretrained import channels_of, encode_moments, fingerprint, load_autoencoder, stride_of
from ldm_vae.models.tiling import in_tiles

LOG2_TILE = 7
"""Tiles of 128 x 128 latents: each is coded by itself."""
TILE = 64
"""Latents a side that the network sees at once, beside its halo."""
MAX_METADATA = 1 << 24
"""Bytes of an ICC profile or of EXIF."""
MARK = (255, 0, 255)
"""Colour of the tiles that could not be decoded; grey pictures take its mean."""

Box = tuple[int, int, int, int]
"""Top, left, bottom, right, in latents."""
Floats = np.ndarray[Any, Any]


class LatentCodec:
    """Compresses pictures with an autoencoder and its tables.

    Args:
        vae: any diffusers autoencoder with a posterior.
        tables: fitted for it, see `fitting.fit_tables`.
        workers: processes for the tiles of one large picture (1024 x 1024 pixels each, at stride 8).

    Raises:
        ModelMismatchError: the tables were fitted for another autoencoder.
    """

    def __init__(self, vae: Any, tables: Tables, *, workers: int = 1) -> None:
        self.vae, self.tables, self.workers = vae.eval(), tables, workers
        found = fingerprint(vae)
        if found != tables.vae:
            raise ModelMismatchError(
                f"the tables were fitted for the autoencoder {tables.vae[:16]}, this one is {found[:16]}: "
                "fit them anew with `ldm-vae fit-codec`"
            )
        self.weights = bytes.fromhex(found)[:DIGEST_BYTES]
        self.stride = stride_of(vae)
        self.exact = hasattr(vae, "decoder_halo")  # it sees only so far: tiles give what the whole gives

    @classmethod
    def from_pretrained(cls, path: str, *, device: str | torch.device = "cpu", workers: int = 1) -> LatentCodec:
        """The codec of a run directory, a model folder or a hub id: its VAE, and its tables in `codec/`.

        Raises:
            ModelError: there is no such model, or it has no tables.
        """
        vae = load_autoencoder(path).to(device)
        return cls(vae, load_tables(tables_folder(path)), workers=workers)

    def compress(self, image: Image.Image | Pixels | Picture, *, quality: float = 1.0, strip: bool = False) -> bytes:
        """A file's bytes.

        Args:
            image: PIL's, a `Picture`, or uint8 or uint16 (H, W) or (H, W, C), where the last of 2 or 4 is alpha.
            quality: the quantiser's step in posterior deviations * sqrt(12): more is coarser and smaller.
            strip: leave out ICC profile and EXIF.

        Raises:
            ConfigError: a quality that a file cannot hold.
            BadImageError, ModelError: an image that cannot be compressed, or not with this model.
        """
        given = as_picture(image)
        return self.pack(given, self.latents_of(given), fixed_point(quality), strip=strip)

    def decompress(self, data: bytes) -> Image.Image:
        """The image of a file's bytes, as PIL's. See `decompress_picture` for errors and for what PIL cannot hold."""
        return self.decompress_picture(data).to_pil()

    def decompress_picture(
        self,
        data: bytes,
        *,
        region: tuple[int, int, int, int] | None = None,
        limits: Limits | None = None,
        damage: list[str] | None = None,
    ) -> Picture:
        """The picture of a file's bytes.

        Args:
            region: left, top, width and height in pixels of what is wanted; only its tiles are decoded where the
                autoencoder's receptive field allows.
            limits: on what the file may ask for.
            damage: takes a message for each tile and section that is damaged. It is marked, or left out, and the rest
                is given; without this list the first one is an error.

        Raises:
            CompressedFileError: see `ldm_vae.errors`; a file of another model is a ModelMismatchError.
            ConfigError: a region outside the picture.
        """
        contents = bitstream.unpack(data, limits=limits, salvage=damage is not None)
        header = contents.header
        self.check(header)
        left, top, width, height = region or (0, 0, header.width, header.height)
        if min(left, top) < 0 or min(width, height) < 1 or left + width > header.width or top + height > header.height:
            raise ConfigError(
                f"the region {left} {top} {width} {height} is not within the picture's {header.width}x{header.height}"
            )
        box = self.latents_for(header, left, top, width, height)
        latents, bad_tiles = self.read_latents(contents, box, damage)
        pixels = self.pixels_of(latents, header)  # of the whole box
        for tile in bad_tiles:
            mark(pixels, [self.stride * (tile[i] - box[i % 2]) for i in range(4)])
        y, x = top - box[0] * self.stride, left - box[1] * self.stride
        alpha, icc, exif = self.read_sections(contents, damage)
        return Picture(
            pixels=np.ascontiguousarray(pixels[y : y + height, x : x + width]),
            alpha=None if alpha is None else np.ascontiguousarray(alpha[top : top + height, left : left + width]),
            icc=icc,
            exif=exif,
        )

    # Image to latents and back --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def latents_of(self, given: Picture) -> Floats:
        """The posterior's mean, float32 (c, h, w). What is missing to the stride continues the last row and column."""
        pixels = self.in_model_channels(given.pixels)
        height, width = pixels.shape[:2]
        padding = ((0, -height % self.stride), (0, -width % self.stride), (0, 0))
        values = torch.from_numpy(np.moveaxis(np.pad(pixels, padding, mode="edge"), 2, 0)[None].astype(np.int32))
        device = next(self.vae.parameters()).device

        def encode(part: Tensor) -> Tensor:
            images = to_images(np.moveaxis(part[0].numpy(), 0, 2).astype(pixels.dtype))[None]
            return encode_moments(self.vae, images.to(device)).chunk(2, dim=1)[0].float().cpu()

        if not self.exact:
            return encode(values)[0].numpy()
        halo = -(-self.vae.encoder_halo // self.stride)
        return in_tiles(encode, values, tile=TILE, halo=halo, unit_in=self.stride, unit_out=1)[0].numpy()

    @torch.inference_mode()
    def pixels_of(self, latents: Floats, header: Header) -> Pixels:
        """Latents (c, h, w) -> pixels (h*f, w*f, C) in the colours and depth that the header names."""
        dtype = np.uint16 if header.depth == 16 else np.uint8
        device = next(self.vae.parameters()).device

        def decode(part: Tensor) -> Tensor:
            images = self.vae.decode(part.to(device)).sample
            if header.colours == 1:
                images = images.mean(dim=1, keepdim=True)
            return torch.from_numpy(np.moveaxis(to_pixels(images, dtype), -1, 1).astype(np.int32))

        values = torch.from_numpy(latents)[None]
        if self.exact:
            made = in_tiles(decode, values, tile=TILE, halo=self.vae.decoder_halo, unit_in=1, unit_out=self.stride)
        else:
            made = decode(values)
        return np.moveaxis(made[0].numpy(), 0, 2).astype(dtype)

    def in_model_channels(self, pixels: Pixels) -> Pixels:
        """Grey goes three times into a model of colours; whatever else differs is a ModelError."""
        have, wanted = pixels.shape[2], channels_of(self.vae)
        if have != wanted and (have, wanted) != (1, 3):
            raise ModelError(f"the picture has {have} channels and the model {wanted}: it cannot be compressed with it")
        return np.repeat(pixels, wanted // have, axis=2)

    # Latents to bytes and back --------------------------------------------------------------------------------------

    def pack(self, given: Picture, latents: Floats, quality: int, *, strip: bool = False) -> bytes:
        """A file's bytes from a picture and its latents, at a fixed-point quality."""
        symbols = self.quantise(latents, quality)
        height, width, colours = given.pixels.shape
        header = Header(
            width=width,
            height=height,
            colours=colours,
            depth=8 * given.pixels.dtype.itemsize,
            log2_stride=self.stride.bit_length() - 1,
            channels=len(symbols),
            log2_tile=LOG2_TILE,
            log2_lanes=log2_lanes(symbols[:, : 1 << LOG2_TILE, : 1 << LOG2_TILE].size),
            quality=quality,
            tables=self.tables.digest,
            weights=self.weights,
        )
        boxes = map(header.tile_box, range(header.grid[0] * header.grid[1]))
        tiles = encode_tiles(
            [symbols[:, top:bottom, left:right] for top, left, bottom, right in boxes],
            self.tables.contexts_of(quality),
            lanes=header.lanes,
            workers=self.workers,
        )
        sections = {}
        if given.alpha is not None:
            sections[bitstream.ALPHA] = picture.pack_alpha(given.alpha)
        for kind, metadata in ((bitstream.ICC, given.icc), (bitstream.EXIF, given.exif)):
            if metadata and not strip and len(metadata) <= MAX_METADATA:
                sections[kind] = zlib.compress(metadata, 9)
        return bitstream.pack(header, sections, tiles)

    def quantise(self, latents: Floats, quality: int) -> np.ndarray[Any, Any]:
        """float (c, h, w) -> int32 symbols (C, h, w) of the coded channels: the nearest multiple of each one's step."""
        coded = list(self.tables.channels)
        centred = latents[coded].astype(np.float64) - self.tables.means[coded, None, None]
        symbols = np.rint(centred / self.tables.steps(quality)[:, None, None])
        if not np.isfinite(symbols).all():
            raise ModelError("the autoencoder's latents are not finite")
        return np.clip(symbols, *INT32).astype(np.int32)

    def dequantise(self, symbols: np.ndarray[Any, Any], quality: int) -> Floats:
        """Back to float32 latents (c, h, w); a channel that is not coded is its mean everywhere."""
        latents = np.tile(self.tables.means[:, None, None], (1, *symbols.shape[1:]))
        latents[list(self.tables.channels)] += symbols * self.tables.steps(quality)[:, None, None]
        return latents.astype(np.float32)

    def check(self, header: Header) -> None:
        """Raises ModelMismatchError or CorruptError for a file that this codec cannot have written."""
        for name, wrote, have in (
            ("autoencoder", header.weights, self.weights),
            ("tables", header.tables, self.tables.digest),
        ):
            if wrote != have:
                raise ModelMismatchError(
                    f"the file was written with another model: its {name} is {wrote.hex()}, this one's is {have.hex()}"
                )
        wanted = channels_of(self.vae)
        if (
            1 << header.log2_stride != self.stride
            or header.channels != len(self.tables.channels)
            or header.colours not in {wanted, 1 if wanted == 3 else wanted}
        ):
            raise CorruptError("the header is damaged: it does not fit to the model that it names")

    def latents_for(self, header: Header, left: int, top: int, width: int, height: int) -> Box:
        """The latents that these pixels depend on; all of them for an autoencoder that sees the whole image."""
        h, w = header.latent_size
        if not self.exact:
            return 0, 0, h, w
        halo, f = self.vae.decoder_halo, self.stride
        return (
            max(top // f - halo, 0),
            max(left // f - halo, 0),
            min(-(-(top + height) // f) + halo, h),
            min(-(-(left + width) // f) + halo, w),
        )

    def read_latents(self, contents: Contents, box: Box, damage: list[str] | None) -> tuple[Floats, list[Box]]:
        """The latents of a box, and the tiles in it that are damaged."""
        header = contents.header
        names, boxes, coded, bad = [], [], [], []
        for index, part in enumerate(contents.tiles):
            tile = top, left, bottom, right = header.tile_box(index)
            if max(top, box[0]) >= min(bottom, box[2]) or max(left, box[1]) >= min(right, box[3]):
                continue
            try:
                payload = contents.read(part)
            except CompressedFileError as error:
                report(error, part.name, damage)
                bad.append(tile)
                continue
            names.append(part.name)
            boxes.append(tile)
            shape = (header.channels, bottom - top, right - left)
            coded.append(CodedTile(payload=payload, shape=shape, lanes=header.lanes))
        symbols = np.zeros((header.channels, box[2] - box[0], box[3] - box[1]), np.int32)
        decoded = decode_tiles(coded, self.tables.contexts_of(header.quality), workers=self.workers)
        for name, tile, found in zip(names, boxes, decoded, strict=True):
            if isinstance(found, CompressedFileError):
                report(found, name, damage)
                bad.append(tile)
            else:
                put(symbols, box, found, tile)
        return self.dequantise(symbols, header.quality), bad

    def read_sections(self, contents: Contents, damage: list[str] | None) -> tuple[Pixels | None, bytes, bytes]:
        """Alpha, ICC profile and EXIF."""
        header = contents.header
        found: dict[int, Any] = {}
        for kind, part in contents.sections.items():
            try:
                data = contents.read(part)
                if kind == bitstream.ALPHA:
                    dtype = np.dtype(np.uint16 if header.depth == 16 else np.uint8)
                    found[kind] = picture.unpack_alpha(data, header.height, header.width, dtype)
                elif kind in bitstream.SECTIONS:
                    found[kind] = picture.inflate(data, limit=MAX_METADATA, name=part.name)
            except CompressedFileError as error:
                if damage is None:
                    raise
                damage.append(str(error))
        return found.get(bitstream.ALPHA), found.get(bitstream.ICC, b""), found.get(bitstream.EXIF, b"")


def report(error: CompressedFileError, name: str, damage: list[str] | None) -> None:
    """Notes what is wrong with a part, or raises it when nobody takes notes."""
    if damage is None:
        raise type(error)(f"{name}: {error}") from None
    damage.append(f"{name}: {error}")


def put(symbols: np.ndarray[Any, Any], box: Box, found: np.ndarray[Any, Any], tile: Box) -> None:
    """Writes what a tile and a box share into the box's symbols."""
    top, left, bottom, right = max(tile[0], box[0]), max(tile[1], box[1]), min(tile[2], box[2]), min(tile[3], box[3])
    shared = found[:, top - tile[0] : bottom - tile[0], left - tile[1] : right - tile[1]]
    symbols[:, top - box[0] : bottom - box[0], left - box[1] : right - box[1]] = shared


def fixed_point(quality: float) -> int:
    """A quality as files hold it, 1/256 to 255. Raises ConfigError."""
    fixed = round(quality * QUALITY_ONE) if 0 < quality < 256 else 0
    if not 0 < fixed < 1 << 16:
        raise ConfigError(f"quality {quality} cannot be: it goes from 1/256 to 255, and 1 is the training's own")
    return fixed


def log2_lanes(num_symbols: int) -> int:
    """Lanes make decoding fast and cost two bytes each: few for a small tile."""
    return 2 if num_symbols < 1 << 13 else 4 if num_symbols < 1 << 18 else 5


def mark(pixels: Pixels, box: Sequence[int]) -> None:
    """Paints what could not be decoded."""
    top, left, bottom, right = (max(i, 0) for i in box)
    colour = np.array(MARK if pixels.shape[2] == 3 else [sum(MARK) // 3]) * (257 if pixels.dtype == np.uint16 else 1)
    pixels[top:bottom, left:right] = colour


def tables_folder(path: str) -> Path:
    """Where a model's tables are; those of a hub id are downloaded. Raises ModelError."""
    if not is_hub_id(path) or Path(path).is_dir():
        return Path(path) / "codec"
    try:
        return Path(snapshot_download(path, allow_patterns="codec/*")) / "codec"
    except Exception as error:  # no network, no such model, no permission
        raise ModelError(f"the tables of {path} could not be had from the hub: {str(error).splitlines()[0]}") from None
