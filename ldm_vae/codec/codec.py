"""LatentCodec: pictures to bytes and back through an autoencoder and tables that were fitted for it.

compress: picture -> posterior mean -> int32 symbols -> tiles of bytes -> file; decompress goes the same way back.
Floats end at `Tables.quantise`: the bytes of given symbols, and the symbols of given bytes, are integers alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from ldm_vae.codec import bitstream
from ldm_vae.codec.bitstream import MODEL_BYTES, TUNINGS, Box, Contents, Header, Limits
from ldm_vae.codec.network import Network
from ldm_vae.codec.picture import Picture, as_picture, fill
from ldm_vae.codec.quality import USUAL_QUALITY
from ldm_vae.codec.sections import pack_sections, unpack_sections
from ldm_vae.codec.separable import SeparableAutoencoder, load_separable
from ldm_vae.codec.tables import Floats, Tables, load_tables
from ldm_vae.codec.tiles import decode_tiles, encode_tiles
from ldm_vae.data.images import Pixels
from ldm_vae.errors import ConfigError, CorruptError, ModelMismatchError
from ldm_vae.models.loading import check_device, load_for_inference, local_folder

if TYPE_CHECKING:
    import torch

EFFORTS = range(4)


class LatentCodec:
    """Compresses pictures with an autoencoder and its tables.

    Args:
        vae: any diffusers autoencoder with a posterior, or a SeparableAutoencoder, which needs no torch.
        tables: fitted for it, see `fit_tables`.
        workers: threads for one picture, of a large one for its tiles (1024 x 1024 pixels each, at stride 8).
        dtype: in which the network computes (autocast). Rounding moves a symbol now and then; any reads all files.
            Torch's float32 unless given.
        tuning: what files say of it, an index of TUNINGS.
        other: gives the codec of another tuning of the same model, or None; for the files that it wrote.

    Raises:
        ModelMismatchError: the tables were fitted for another autoencoder.
    """

    log2_tile = 7
    """Tiles of 128 x 128 latents: each is coded by itself."""

    def __init__(
        self,
        vae: Any,
        tables: Tables,
        *,
        workers: int = 1,
        dtype: torch.dtype | None = None,
        tuning: int = 0,
        other: Callable[[int], LatentCodec | None] = lambda tuning: None,
    ) -> None:
        autoencoder = vae if isinstance(vae, SeparableAutoencoder) else in_torch(vae, dtype)
        digest = autoencoder.fingerprint
        if digest != tables.vae:
            raise ModelMismatchError(
                f"the tables were fitted for the autoencoder {tables.vae[:16]}, this one is {digest[:16]}: "
                "fit them anew with `ldm-vae fit-codec`"
            )
        self.vae, self.tables, self.workers, self.tuning, self.other = vae, tables, workers, tuning, other
        self.network = Network(autoencoder)
        self.digest = tables.digest[:MODEL_BYTES]

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        tune: str = TUNINGS[0],
        device: str | torch.device = "cpu",
        workers: int = 1,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The codec of a run directory, a model folder or a hub id: its VAE, and its tables in `codec/`.

        A model may hold a second network with tables of its own in `psnr/`: the tuning of that name. Whichever is
        loaded decodes the files of both.

        Raises:
            ModelError: there is no such model, or it has no tables.
            ConfigError: a tuning that the model does not have, or a device that is not there.
        """

        @cache
        def tuned(tuning: int) -> Any:  # of this class, or None
            folder = path
            if tuning > 0:
                folder = str(local_folder(path, [f"{TUNINGS[tuning]}/*"]) / TUNINGS[tuning])
                if not Path(folder).is_dir():
                    return None
            vae = load_separable(folder, workers) if str(device) == "cpu" and dtype is None else None
            if vae is None:
                check_device(str(device))
                vae = load_for_inference(folder).to(device)
            tables = load_tables(local_folder(folder, ["codec/*"]) / "codec")
            return cls(vae, tables, workers=workers, dtype=dtype, tuning=tuning, other=tuned)

        if tune not in TUNINGS:
            raise ConfigError(f"tuning {tune} cannot be: try {' or '.join(TUNINGS)}")
        codec: Self | None = tuned(TUNINGS.index(tune))
        if codec is None:
            raise ConfigError(f"{path} has a single tuning: leave out {tune}")
        return codec

    def compress(
        self,
        image: Image.Image | Pixels | Picture,
        *,
        quality: float | None = None,
        step: float | None = None,
        effort: int = 0,
        strip: bool = False,
        limits: Limits | None = None,
    ) -> bytes:
        """A file's bytes.

        Args:
            image: PIL's, a `Picture`, or uint8 or uint16 (H, W) or (H, W, C), where the last of 2 or 4 is alpha.
            quality: 1 to 100, more is better, 75 unless given; a warning says when the model does not reach it.
            step: instead, the quantiser's step in posterior deviations * sqrt(12): more is coarser and smaller.
            effort: 0 to 3: more seconds for fewer bytes of the same look (needs torch, and its decoder's gradients).
            strip: leave out all metadata.
            limits: on the picture's size; Limits() unless given, as in `decompress`.

        Raises:
            ConfigError: a quality, step or effort that cannot be, or both of the former.
            LimitExceededError: a picture that the same limits would not let anybody decompress.
            BadImageError, ModelError: an image that cannot be compressed, or not with this model.
        """
        picture = as_picture(image, channels=self.network.channels)
        (limits or Limits()).check(picture.pixels.shape[1], picture.pixels.shape[0])
        if step is None:
            notes: list[str] = []
            step = self.tables.step_at(USUAL_QUALITY if quality is None else quality, notes)
            for note in notes:
                warnings.warn(note, stacklevel=2)
        elif quality is not None:
            raise ConfigError("give a quality or a step, not both")
        header = self.header_of(picture, self.tables.fixed_step(step))
        return self.file_of(picture, header, self.latents(picture.pixels, header, effort), strip)

    def latents(self, pixels: Pixels, header: Header, effort: int) -> Iterator[Floats]:
        """Of each tile of a picture, float32 (c, h, w). Raises ConfigError for an effort that cannot be."""
        if effort == 0:
            return self.network.latents(pixels, header.tile_boxes)
        if effort not in EFFORTS:
            raise ConfigError(
                f"effort {effort} cannot be: it goes from {EFFORTS[0]} to {EFFORTS[-1]}, more takes longer"
            )
        from ldm_vae.codec.effort import refined_latents  # it needs torch

        return refined_latents(self, pixels, header, effort)

    def file_of(self, picture: Picture, header: Header, latents: Iterable[Floats], strip: bool) -> bytes:
        """A file's bytes, from the latents of each tile, float32 (c, h, w)."""
        symbols = (self.tables.quantise(tile, header.step) for tile in latents)  # int32 (C, h, w)
        payloads = encode_tiles(symbols, self.tables.contexts_of(header.step), self.workers)
        return bitstream.pack(header, pack_sections(picture, strip=strip), payloads)

    def header_of(self, picture: Picture, step: int) -> Header:
        """Of the file of a picture at a fixed-point step."""
        height, width, colours = picture.pixels.shape
        return Header(
            width=width,
            height=height,
            colours=colours,
            depth=8 * picture.pixels.dtype.itemsize,
            log2_stride=self.network.stride.bit_length() - 1,
            channels=len(self.tables.channels),
            log2_tile=self.log2_tile,
            step=step,
            model=self.digest,
            tuning=self.tuning,
        )

    def decompress(self, data: bytes, *, limits: Limits | None = None) -> Image.Image:
        """The image of a file's bytes, as PIL's. See `decompress_picture` for errors and for what PIL cannot hold."""
        return self.decompress_picture(data, limits=limits).to_pil()

    def decompress_picture(
        self,
        data: bytes,
        *,
        region: Box | None = None,
        limits: Limits | None = None,
        damage: list[str] | None = None,
    ) -> Picture:
        """The picture of a file's bytes.

        Args:
            region: left, top, width and height in pixels of the part to decode; only its tiles are decoded where the
                autoencoder's receptive field allows.
            limits: on what the file may ask for.
            damage: takes a message for each tile and section that is damaged. A damaged tile is marked, a damaged
                section left out. Without this list the first one is an error.

        Raises:
            CompressedFileError: see `ldm_vae.errors`; a file of another model is a ModelMismatchError.
            ConfigError: a region outside the picture.
        """
        return fill(*self.decompress_bands(data, region=region, limits=limits, damage=damage))

    def decompress_bands(
        self,
        data: bytes,
        *,
        region: Box | None = None,
        limits: Limits | None = None,
        damage: list[str] | None = None,
    ) -> tuple[Picture, Iterator[Pixels]]:
        """What `decompress_picture` gives, for little memory: the picture with empty pixels, and its pixels in bands.

        The bands (h, width, C) come from top to bottom.
        """
        contents = bitstream.unpack(data, limits=limits, salvage=damage is not None)
        header = contents.header
        wrote = self.other(header.tuning) if header.tuning != self.tuning else None
        if wrote is not None:
            return wrote.decompress_bands(data, region=region, limits=limits, damage=damage)
        self.check(header)
        left, top, width, height = region or (0, 0, header.width, header.height)
        if min(left, top) < 0 or min(width, height) < 1 or left + width > header.width or top + height > header.height:
            raise ConfigError(
                f"the region {left} {top} {width} {height} is not within the picture's {header.width}x{header.height}"
            )
        box = (top, left, top + height, left + width)
        alpha, metadata = unpack_sections(contents, damage)
        if alpha is not None:
            alpha = np.ascontiguousarray(alpha[top : box[2], left : box[3]])
        pixels = np.empty((height, width, header.colours), np.uint16 if header.depth == 16 else np.uint8)
        return Picture(pixels=pixels, alpha=alpha, metadata=metadata), self.unpack(contents, box, damage)

    def unpack(self, contents: Contents, box: Box, damage: list[str] | None) -> Iterator[Pixels]:
        """A box of pixels from a file, in bands from top to bottom."""
        header = contents.header
        bands = self.network.bands(header, box)
        boxes, contexts = [band.latents for band in bands], self.tables.contexts_of(header.step)
        damaged: list[Box] = []
        decoded = decode_tiles(contents, boxes, contexts, self.workers, damage)
        for band, (symbols, damaged) in zip(bands, decoded, strict=True):
            latents = self.tables.dequantise(symbols, header.step)  # float32 (c, h, w)
            pixels = self.network.decode(latents, band, header)
            self.network.mark(pixels, band, damaged)
            yield pixels
        if damaged and damage is not None and not self.network.finite:
            damage.append("this autoencoder sees the whole image: what is not marked may differ, too")

    def check(self, header: Header) -> None:
        """Raises ModelMismatchError or CorruptError for a file that this codec cannot have written."""
        if header.model != self.digest:
            raise ModelMismatchError(
                f"the file was written with another model, {header.model.hex()}: this one is {self.digest.hex()}"
            )
        channels = self.network.channels
        if (
            1 << header.log2_stride != self.network.stride
            or header.channels != len(self.tables.channels)
            or header.colours not in {channels, 1 if channels == 3 else channels}
        ):
            raise CorruptError("the header is damaged: it does not fit to the model that it names")


def in_torch(vae: Any, dtype: torch.dtype | None) -> Any:
    """A diffusers autoencoder, computing in `dtype`."""
    import torch  # its import takes longer than a picture: only where it is needed

    from ldm_vae.codec.torch_autoencoder import TorchAutoencoder

    return TorchAutoencoder(vae, dtype or torch.float32)
