"""LatentCodec: pictures to bytes and back through an autoencoder and tables that were fitted for it.

compress: picture -> posterior mean -> int32 symbols -> tiles of bytes -> file; decompress goes the same way back.
Floats end at `quantise`: which bytes are written for given symbols, and read for given bytes, is integers alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.codec import bitstream, picture
from ldm_vae.codec.bitstream import Header, Limits
from ldm_vae.codec.boxes import Box, mark, put
from ldm_vae.codec.contexts import INT32
from ldm_vae.codec.picture import Picture, as_picture
from ldm_vae.codec.reading import MAX_METADATA, Reader
from ldm_vae.codec.tables import DIGEST_BYTES, QUALITY_ONE, Tables, load_tables
from ldm_vae.codec.tiles import TileCoder
from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.images import Pixels
from ldm_vae.data.large import let_go
from ldm_vae.errors import BadImageError, ConfigError, CorruptError, ModelError, ModelMismatchError
from ldm_vae.models.interface import channels_of, encode_moments, fingerprint, stride_of
from ldm_vae.models.loading import load_autoencoder, local_folder
from ldm_vae.models.tiles import TILE, spans

LOG2_TILE = 7
"""Tiles of 128 x 128 latents: each is coded by itself."""
FAR = 8
"""A quality by so much finer or coarser than any that tables were fitted at is a mistake."""
AT_ONCE = 16
"""Tiles whose symbols are in memory together."""
Floats = np.ndarray[Any, Any]


class LatentCodec:
    """Compresses pictures with an autoencoder and its tables.

    Args:
        vae: any diffusers autoencoder with a posterior.
        tables: fitted for it, see `fitting.fit_tables`.
        workers: processes for the tiles of one large picture (1024 x 1024 pixels each, at stride 8).
        dtype: in which the network computes (autocast). Rounding moves a symbol now and then; any reads all files.

    Raises:
        ModelMismatchError: the tables were fitted for another autoencoder.
    """

    def __init__(
        self,
        vae: Any,
        tables: Tables,
        *,
        workers: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.vae, self.tables, self.workers = vae.eval(), tables, workers
        found = fingerprint(vae)
        if found != tables.vae:
            raise ModelMismatchError(
                f"the tables were fitted for the autoencoder {tables.vae[:16]}, this one is {found[:16]}: "
                "fit them anew with `ldm-vae fit-codec`"
            )
        self.weights = bytes.fromhex(found)[:DIGEST_BYTES]
        self.log2_tile = LOG2_TILE
        self.dtype = dtype
        self.stride = stride_of(vae)
        self.exact = hasattr(vae, "decoder_halo")  # it sees only so far: tiles give what the whole gives

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        device: str | torch.device = "cpu",
        workers: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The codec of a run directory, a model folder or a hub id: its VAE, and its tables in `codec/`.

        Raises:
            ModelError: there is no such model, or it has no tables.
        """
        vae = load_autoencoder(path).to(device)
        return cls(vae, load_tables(local_folder(path, ["codec/*"]) / "codec"), workers=workers, dtype=dtype)

    def compress(
        self,
        image: Image.Image | Pixels | Picture,
        *,
        quality: float = 1.0,
        strip: bool = False,
        limits: Limits | None = None,
    ) -> bytes:
        """A file's bytes.

        Args:
            image: PIL's, a `Picture`, or uint8 or uint16 (H, W) or (H, W, C), where the last of 2 or 4 is alpha.
            quality: the quantiser's step in posterior deviations * sqrt(12): more is coarser and smaller.
            strip: leave out ICC profile and EXIF.
            limits: on the picture's size; Limits() unless given, as in `decompress`.

        Raises:
            ConfigError: a quality that a file cannot hold.
            LimitExceededError: a picture that the same limits would not let anybody decompress.
            BadImageError, ModelError: an image that cannot be compressed, or not with this model.
        """
        given = as_picture(image, channels=channels_of(self.vae))
        (limits or Limits()).check(given.pixels.shape[1], given.pixels.shape[0])
        fixed = self.fixed_quality(quality)
        if self.exact:
            return self.pack(given, partial(self.latents_in, given), fixed, strip=strip)
        return self.pack(given, partial(cut, self.latents_of(given)), fixed, strip=strip)

    def fixed_quality(self, quality: float) -> int:
        """As files hold it. Raises ConfigError for one far from those that the tables were fitted at."""
        fixed = fixed_point(quality)
        low, high = self.tables.qualities[0], self.tables.qualities[-1]
        if not low / FAR <= fixed <= high * FAR:
            raise ConfigError(
                f"quality {quality:g} is a step in units of the posterior's deviation, and far from those that the "
                f"tables were fitted at, {low / QUALITY_ONE:g} to {high / QUALITY_ONE:g}: more is coarser"
            )
        return fixed

    def decompress(self, data: bytes, *, limits: Limits | None = None) -> Image.Image:
        """The image of a file's bytes, as PIL's. See `decompress_picture` for errors and for what PIL cannot hold."""
        return self.decompress_picture(data, limits=limits).to_pil()

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
        parts = self.parts(data, region=region, limits=limits, damage=damage)
        return filled(next(parts), parts)

    def parts(
        self,
        data: bytes,
        *,
        region: tuple[int, int, int, int] | None = None,
        limits: Limits | None = None,
        damage: list[str] | None = None,
    ) -> Iterator[Any]:
        """What `decompress_picture` gives, in parts: the picture, of which the pixels are still empty, and then those.

        They come from top to bottom, (h, width, C), each from so many rows of tiles as lie in memory together.
        """
        contents = bitstream.unpack(data, limits=limits, salvage=damage is not None)
        header = contents.header
        self.check(header)
        left, top, width, height = region or (0, 0, header.width, header.height)
        if min(left, top) < 0 or min(width, height) < 1 or left + width > header.width or top + height > header.height:
            raise ConfigError(
                f"the region {left} {top} {width} {height} is not within the picture's {header.width}x{header.height}"
            )
        with TileCoder(self.tables.contexts_of(header.quality), self.workers) as coder:
            reader = Reader(contents, coder, damage)
            alpha, icc, exif = reader.sections()
            dtype = np.uint16 if header.depth == 16 else np.uint8
            yield Picture(
                pixels=np.empty((height, width, header.colours), dtype),
                alpha=None if alpha is None else np.ascontiguousarray(alpha[top : top + height, left : left + width]),
                icc=icc,
                exif=exif,
            )
            for above, below in self.rows_of_tiles(header, top, top + height):
                yield self.part(reader, (above, left, below, left + width))

    def rows_of_tiles(self, header: Header, top: int, bottom: int) -> Iterator[tuple[int, int]]:
        """The rows of pixels from top to bottom, divided where so many tiles end as lie in memory together."""
        rows = max(AT_ONCE // header.grid[1], 1) * (self.stride << header.log2_tile)
        if not self.exact:
            rows = header.height
        edges = [top, *range(top - top % rows + rows, bottom, rows), bottom]
        return pairwise(edges)

    def part(self, reader: Reader, wanted: Box) -> Pixels:
        """The pixels (h, w, colours) of a box of pixels; what is damaged is marked."""
        f, header = self.stride, reader.header
        top, left, bottom, right = wanted
        cells = (top // f, left // f, -(-bottom // f), -(-right // f))
        box = self.latents_for(header, cells)
        symbols, bad_tiles = reader.symbols(box)
        pixels = self.pixels_of(symbols, header, box, cells if self.exact else box)
        y, x = (cells[0] * f, cells[1] * f) if self.exact else (0, 0)
        for tile in bad_tiles:
            reach = self.vae.decoder_halo if self.exact else 0  # what it made wrong around it
            grown = [f * (tile[i] + (reach if i > 1 else -reach)) for i in range(4)]
            mark(pixels, [grown[0] - y, grown[1] - x, grown[2] - y, grown[3] - x])
        if bad_tiles and reader.damage is not None and not self.exact:
            reader.damage.append("this autoencoder sees the whole image: what is not marked may differ, too")
        return np.ascontiguousarray(pixels[top - y : bottom - y, left - x : right - x])

    # Image to latents and back --------------------------------------------------------------------------------------

    def latents_of(self, given: Picture) -> Floats:
        """The posterior's mean, float32 (c, h, w). What is missing to the stride continues the last row and column."""
        return self.latents_in(given, (0, 0, *self.size_in_latents(given)))

    def size_in_latents(self, given: Picture) -> tuple[int, int]:
        height, width = given.pixels.shape[:2]
        return -(-height // self.stride), -(-width // self.stride)

    @torch.inference_mode()
    def latents_in(self, given: Picture, box: Box) -> Floats:
        """The latents of a box."""
        latents = np.empty((len(self.tables.sigma), box[2] - box[0], box[3] - box[1]), np.float32)
        halo = -(-self.vae.encoder_halo // self.stride) if self.exact else 0
        for inner, outer in self.network_tiles(box, self.size_in_latents(given), halo):
            images = to_images(self.pixels_below(given, outer))[None]
            with self.autocast():
                mean = encode_moments(self.vae, self.on_device(images)).chunk(2, dim=1)[0][0].float().cpu().numpy()
            put(latents, box, mean, outer, inner)
        return latents

    def pixels_below(self, given: Picture, box: Box) -> Pixels:
        """The pixels of a box of latents, continued beyond the picture's last row and column."""
        f = self.stride
        pixels = self.in_model_channels(given.pixels[box[0] * f : box[2] * f, box[1] * f : box[3] * f])
        down, right = (box[2] - box[0]) * f - pixels.shape[0], (box[3] - box[1]) * f - pixels.shape[1]
        return np.pad(pixels, ((0, down), (0, right), (0, 0)), mode="edge") if down or right else pixels

    @torch.inference_mode()
    def pixels_of(self, symbols: np.ndarray[Any, Any], header: Header, box: Box, wanted: Box) -> Pixels:
        """Symbols (C, h, w) of a box of latents -> pixels (H, W, colours) of another one within it.

        The depth is what the header names.
        """
        dtype = np.uint16 if header.depth == 16 else np.uint8
        f = self.stride
        target = [f * edge for edge in wanted]
        pixels = np.empty((header.colours, target[2] - target[0], target[3] - target[1]), dtype)
        for inner, outer in self.network_tiles(wanted, header.latent_size, self.vae.decoder_halo if self.exact else 0):
            y, x = box[:2]
            part = symbols[:, outer[0] - y : outer[2] - y, outer[1] - x : outer[3] - x]
            latents = torch.from_numpy(self.dequantise(part, header.quality))[None]
            with self.autocast():
                images = self.vae.decode(self.on_device(latents)).sample.float()
            if header.colours == 1:
                images = images.mean(dim=1, keepdim=True)
            made = np.moveaxis(to_pixels(images[0], dtype), 2, 0)
            inside, around = ([f * edge for edge in tile] for tile in (inner, outer))
            put(pixels, target, made, around, inside)
        return np.moveaxis(pixels, 0, 2)

    def network_tiles(self, box: Box, size: tuple[int, int], halo: int) -> Iterator[tuple[Box, Box]]:
        """What the network makes of a box at a time, without and with what it sees around that in latents of a size.

        An autoencoder that sees the whole image makes the whole box.
        """
        side = TILE if self.exact else max(size)
        for top, bottom, _, _ in spans(box[2] - box[0], side, 0):
            for left, right, _, _ in spans(box[3] - box[1], side, 0):
                inner = (box[0] + top, box[1] + left, box[0] + bottom, box[1] + right)
                yield inner, grown(inner, halo, size)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.vae.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def on_device(self, values: Tensor) -> Tensor:
        parameter = next(self.vae.parameters())
        return values.to(parameter.device, parameter.dtype)

    def in_model_channels(self, pixels: Pixels) -> Pixels:
        """Grey goes three times into a model of colours; whatever else differs is a ModelError."""
        have, wanted = pixels.shape[2], channels_of(self.vae)
        if have != wanted and (have, wanted) != (1, 3):
            raise ModelError(f"the picture has {have} channels and the model {wanted}: it cannot be compressed with it")
        return np.repeat(pixels, wanted // have, axis=2)

    # Latents to bytes and back --------------------------------------------------------------------------------------

    def pack(self, given: Picture, latents_in: Callable[[Box], Floats], quality: int, *, strip: bool = False) -> bytes:
        """A file's bytes from a picture and the latents of each box of it, at a fixed-point quality."""
        header = self.header_of(given, quality)
        boxes = [header.tile_box(i) for i in range(header.grid[0] * header.grid[1])]
        tiles: list[bytes] = []
        with TileCoder(self.tables.contexts_of(quality), self.workers) as coder:
            for first in range(0, len(boxes), AT_ONCE):
                symbols = [self.quantise(latents_in(box), quality) for box in boxes[first : first + AT_ONCE]]
                tiles += coder.encode(symbols, lanes=header.lanes)
                let_go(given.pixels)
        sections = {}
        if given.alpha is not None:
            sections[bitstream.ALPHA] = picture.pack_alpha(given.alpha)
        for kind, metadata in ((bitstream.ICC, given.icc), (bitstream.EXIF, given.exif)):
            if len(metadata) > MAX_METADATA and not strip:
                name = bitstream.SECTIONS[kind]
                raise BadImageError(f"{name} of {len(metadata)} bytes is over {MAX_METADATA}: leave it out (strip)")
            if metadata and not strip:
                sections[kind] = zlib.compress(metadata, 9)
        return bitstream.pack(header, sections, tiles)

    def header_of(self, given: Picture, quality: int) -> Header:
        height, width, colours = given.pixels.shape
        side = self.stride << self.log2_tile  # of a tile, in pixels
        largest = -(-min(height, side) // self.stride) * -(-min(width, side) // self.stride)
        channels = len(self.tables.channels)
        return Header(
            width=width,
            height=height,
            colours=colours,
            depth=8 * given.pixels.dtype.itemsize,
            log2_stride=self.stride.bit_length() - 1,
            channels=channels,
            log2_tile=self.log2_tile,
            log2_lanes=log2_lanes(channels * largest),
            quality=quality,
            tables=self.tables.digest,
            weights=self.weights,
        )

    def quantise(self, latents: Floats, quality: int) -> np.ndarray[Any, Any]:
        """float (c, h, w) -> int32 symbols (C, h, w) of the coded channels: the nearest multiple of each one's step."""
        steps, means = self.tables.steps(quality), self.tables.means
        symbols = np.empty((len(steps), *latents.shape[1:]), np.int32)
        for i, c in enumerate(self.tables.channels):
            exact = np.rint((latents[c].astype(np.float64) - means[c]) / steps[i])
            if not np.isfinite(exact).all():
                raise ModelError("the autoencoder's latents are not finite")
            symbols[i] = np.clip(exact, *INT32)
        return symbols

    def dequantise(self, symbols: np.ndarray[Any, Any], quality: int) -> Floats:
        """Back to float32 latents (c, h, w); a channel that is not coded is its mean everywhere."""
        steps, means = self.tables.steps(quality), self.tables.means
        latents = np.empty((len(means), *symbols.shape[1:]), np.float32)
        latents[:] = means[:, None, None]
        for i, c in enumerate(self.tables.channels):
            latents[c] = means[c] + symbols[i] * steps[i]
        return latents

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

    def latents_for(self, header: Header, box: Box) -> Box:
        """The latents that the pixels of a box depend on; all for an autoencoder that sees the whole image."""
        if not self.exact:
            return 0, 0, *header.latent_size
        return grown(box, self.vae.decoder_halo, header.latent_size)


def filled(given: Picture, parts: Iterator[Pixels]) -> Picture:
    """The picture with its pixels, which come from top to bottom, put in."""
    row = 0
    for part in parts:
        given.pixels[row : row + len(part)] = part
        row += len(part)
    return given


def grown(box: Box, halo: int, size: tuple[int, int]) -> Box:
    """A box with so much around it as there is in latents of a size (h, w)."""
    top, left, bottom, right = box
    return max(top - halo, 0), max(left - halo, 0), min(bottom + halo, size[0]), min(right + halo, size[1])


def cut(latents: Floats, box: Box) -> Floats:
    return latents[:, box[0] : box[2], box[1] : box[3]]


def fixed_point(quality: float) -> int:
    """A quality as files hold it, 1/256 to 255. Raises ConfigError."""
    fixed = round(quality * QUALITY_ONE) if 0 < quality < 256 else 0
    if not 0 < fixed < 1 << 16:
        raise ConfigError(f"quality {quality} cannot be: it goes from 1/256 to 255, and 1 is the training's own")
    return fixed


def log2_lanes(num_symbols: int) -> int:
    """Lanes make decoding fast and cost three bytes each: few for a small tile; in a large one 2^16 symbols each."""
    return 2 if num_symbols < 1 << 13 else max(3, (num_symbols - 1).bit_length() - 16)
