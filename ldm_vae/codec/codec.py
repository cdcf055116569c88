"""LatentCodec: pictures to bytes and back through an autoencoder, and how its tables are fitted.

compress: picture -> posterior mean -> int32 symbols -> tiles of bytes -> file; decompress goes the same way back.
Floats end at `quantise`: which bytes are written for given symbols, and read for given bytes, is integers alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from ldm_vae.codec import bitstream, picture
from ldm_vae.codec.bitstream import Contents, Header, Limits
from ldm_vae.codec.boxes import Box, mark, put
from ldm_vae.codec.contexts import INT32
from ldm_vae.codec.picture import Picture, as_picture
from ldm_vae.codec.tables import DIGEST_BYTES, QUALITY_ONE, Tables, load_tables
from ldm_vae.codec.tiles import CodedTile, decode_tiles, encode_tiles
from ldm_vae.data.images import Pixels, to_images, to_pixels
from ldm_vae.errors import BadImageError, CompressedFileError, ConfigError, CorruptError, ModelError, ModelMismatchError
from ldm_vae.files import is_hub_id
from ldm_vae.models.pretrained import channels_of, encode_moments, fingerprint, load_autoencoder, stride_of
from ldm_vae.models.tiling import TILE, spans

LOG2_TILE = 7
"""Tiles of 128 x 128 latents: each is coded by itself."""
FAR = 8
"""A quality by so much finer or coarser than any that tables were fitted at is a mistake."""
MAX_METADATA = 1 << 24
"""Bytes of an ICC profile or of EXIF."""
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
        return cls(vae, load_tables(tables_folder(path)), workers=workers, dtype=dtype)

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
        return self.pack(given, self.latents_of(given), self.fixed_quality(quality), strip=strip)

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
        contents = bitstream.unpack(data, limits=limits, salvage=damage is not None)
        header = contents.header
        self.check(header)
        left, top, width, height = region or (0, 0, header.width, header.height)
        if min(left, top) < 0 or min(width, height) < 1 or left + width > header.width or top + height > header.height:
            raise ConfigError(
                f"the region {left} {top} {width} {height} is not within the picture's {header.width}x{header.height}"
            )
        box = self.latents_for(header, left, top, width, height)
        symbols, bad_tiles = self.read_symbols(contents, box, damage)
        pixels = self.pixels_of(symbols, header)  # of the whole box
        for tile in bad_tiles:
            reach = self.vae.decoder_halo if self.exact else 0  # what it made wrong around it
            grown = (tile[0] - reach, tile[1] - reach, tile[2] + reach, tile[3] + reach)
            mark(pixels, [self.stride * (grown[i] - box[i % 2]) for i in range(4)])
        if bad_tiles and damage is not None and not self.exact:
            damage.append("this autoencoder sees the whole image: what is not marked may differ, too")
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
        f = self.stride
        padded = np.pad(pixels, ((0, -height % f), (0, -width % f), (0, 0)), mode="edge")
        halo = -(-self.vae.encoder_halo // f) if self.exact else 0
        latents = np.empty((len(self.tables.sigma), padded.shape[0] // f, padded.shape[1] // f), np.float32)
        for inner, outer in self.network_tiles(latents.shape[1], latents.shape[2], halo):
            images = to_images(padded[outer[0] * f : outer[2] * f, outer[1] * f : outer[3] * f])[None]
            with self.autocast():
                mean = encode_moments(self.vae, self.on_device(images)).chunk(2, dim=1)[0][0].float().cpu().numpy()
            put(latents, (0, 0, *latents.shape[1:]), mean, outer, inner)
        return latents

    @torch.inference_mode()
    def pixels_of(self, symbols: np.ndarray[Any, Any], header: Header) -> Pixels:
        """Symbols (C, h, w) -> pixels (h*f, w*f, colours) of the depth that the header names."""
        dtype = np.uint16 if header.depth == 16 else np.uint8
        height, width = symbols.shape[1:]
        f = self.stride
        pixels = np.empty((header.colours, height * f, width * f), dtype)
        for inner, outer in self.network_tiles(height, width, self.vae.decoder_halo if self.exact else 0):
            latents = self.dequantise(symbols[:, outer[0] : outer[2], outer[1] : outer[3]], header.quality)
            with self.autocast():
                images = self.vae.decode(self.on_device(torch.from_numpy(latents)[None])).sample.float()
            if header.colours == 1:
                images = images.mean(dim=1, keepdim=True)
            made = np.moveaxis(to_pixels(images[0], dtype), 2, 0)
            inside, around = ([f * edge for edge in box] for box in (inner, outer))
            put(pixels, (0, 0, height * f, width * f), made, around, inside)
        return np.moveaxis(pixels, 0, 2)

    def network_tiles(self, height: int, width: int, halo: int) -> Iterator[tuple[Box, Box]]:
        """What the network makes at a time, without and with what it sees around that; the whole if it is not exact."""
        side = TILE if self.exact else max(height, width)
        for top, bottom, above, below in spans(height, side, halo):
            for left, right, before, behind in spans(width, side, halo):
                yield (top, left, bottom, right), (above, before, below, behind)

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

    def pack(self, given: Picture, latents: Floats, quality: int, *, strip: bool = False) -> bytes:
        """A file's bytes from a picture and its latents, at a fixed-point quality."""
        symbols = self.quantise(latents, quality)
        header = self.header_of(given, quality)
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

    def read_symbols(
        self, contents: Contents, box: Box, damage: list[str] | None
    ) -> tuple[np.ndarray[Any, Any], list[Box]]:
        """The symbols of a box, 0 in the tiles that are damaged, and those tiles."""
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
                put(symbols, box, found, tile, box)
        return symbols, bad

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
                    found[kind] = picture.inflate(data, limit=MAX_METADATA)
            except CompressedFileError as error:
                report(error, part.name, damage)
        return found.get(bitstream.ALPHA), found.get(bitstream.ICC, b""), found.get(bitstream.EXIF, b"")


def report(error: CompressedFileError, name: str, damage: list[str] | None) -> None:
    """Notes what is wrong with a part, or raises it when nobody takes notes."""
    if damage is None:
        raise type(error)(f"{name}: {error}") from None
    damage.append(f"{name}: {error}")


def fixed_point(quality: float) -> int:
    """A quality as files hold it, 1/256 to 255. Raises ConfigError."""
    fixed = round(quality * QUALITY_ONE) if 0 < quality < 256 else 0
    if not 0 < fixed < 1 << 16:
        raise ConfigError(f"quality {quality} cannot be: it goes from 1/256 to 255, and 1 is the training's own")
    return fixed


def log2_lanes(num_symbols: int) -> int:
    """Lanes make decoding fast and cost three bytes each: few for a small tile; in a large one 2^16 symbols each."""
    return 2 if num_symbols < 1 << 13 else max(3, (num_symbols - 1).bit_length() - 16)


def tables_folder(path: str) -> Path:
    """Where a model's tables are; those of a hub id are downloaded. Raises ModelError."""
    if not is_hub_id(path) or Path(path).is_dir():
        return Path(path) / "codec"
    try:
        return Path(snapshot_download(path, allow_patterns="codec/*")) / "codec"
    except Exception as error:  # no network, no such model, no permission
        raise ModelError(f"the tables of {path} could not be had from the hub: {str(error).splitlines()[0]}") from None
