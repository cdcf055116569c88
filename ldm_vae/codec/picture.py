"""One picture as a file holds it: colours, transparency, and what is written beside them."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image

from ldm_vae.data.images import MAX_PIXELS, Pixels, read_pixels
from ldm_vae.errors import BadImageError, ConfigError, CorruptError

ORIENTATION = 0x0112
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """`pixels` (H, W, C) of uint8 or uint16, `alpha` (H, W) of the same type or None, ICC profile and EXIF as bytes."""

    pixels: Pixels
    alpha: Pixels | None = None
    icc: bytes = b""
    exif: bytes = b""

    def whole(self) -> Pixels:
        """Colours and alpha together: (H, W, C or C + 1)."""
        return self.pixels if self.alpha is None else np.concatenate([self.pixels, self.alpha[:, :, None]], axis=2)

    def to_pil(self) -> Image.Image:
        """L, LA, RGB, RGBA, or I;16. Raises ConfigError for what PIL has no mode for: then take `whole()`."""
        values = self.whole()
        channels = values.shape[2]
        if (values.dtype == np.uint16 and channels > 1) or channels > 4:
            raise ConfigError(f"PIL has no images of {channels} channels with {values.dtype.itemsize * 8} bits")
        image = Image.fromarray(values[:, :, 0] if channels == 1 else values)
        image.info |= {k: v for k, v in (("icc_profile", self.icc), ("exif", self.exif)) if v}
        return image


def as_picture(image: Image.Image | Pixels | Picture) -> Picture:
    """From PIL's image, or pixels (H, W) or (H, W, C) of uint8 or uint16, where the last of 2 or 4 is alpha."""
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        plain = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
        plain.save(file, "PNG", compress_level=0, icc_profile=image.info.get("icc_profile") or None)
        return read_picture(file.getvalue(), max_pixels=max(MAX_PIXELS, image.width * image.height))
    return from_pixels(np.atleast_3d(image))


def from_pixels(values: Pixels, *, icc: bytes = b"", exif: bytes = b"") -> Picture:
    if values.ndim != 3 or values.dtype not in (np.uint8, np.uint16) or 0 in values.shape:
        raise BadImageError(f"{values.dtype} of shape {values.shape}: uint8 or uint16 (H, W, C) can be compressed")
    if values.shape[2] in (2, 4):
        return Picture(pixels=values[:, :, :-1], alpha=np.ascontiguousarray(values[:, :, -1]), icc=icc, exif=exif)
    return Picture(pixels=values, icc=icc, exif=exif)


def read_picture(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """From a file's bytes; the orientation that EXIF names is applied. Raises BadImageError."""
    values = read_pixels(data, channels=None, max_pixels=max_pixels)
    if values.dtype == np.float32:
        values = np.rint(values * 65535).astype(np.uint16)
    icc = exif = b""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ("CMYK", "YCbCr", "LAB"):  # converted, so its profile describes it no longer
                icc = image.info.get("icc_profile") or b""
            tags = image.getexif()
            tags.pop(ORIENTATION, None)
            exif = tags.tobytes() if len(tags) else b""
    except Exception:  # not PIL's kind of file, or odd metadata: the pixels are what counts
        pass
    return from_pixels(values, icc=icc, exif=exif.removeprefix(b"Exif\0\0"))


def png_bytes(picture: Picture) -> bytes:
    """An 8- or 16-bit PNG with its ICC profile and EXIF (PNG specification, third edition, 11.3.2.2 and 11.3.4.4)."""
    values = picture.whole()
    if values.shape[2] > 4:
        raise ConfigError(f"a PNG has no {values.shape[2]} channels: write .npy")
    plain = imagecodecs.png_encode(values[:, :, 0] if values.shape[2] == 1 else values)
    chunks = b""
    if picture.icc:
        chunks += chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc))
    if picture.exif:
        chunks += chunk(b"eXIf", picture.exif)
    after_header = len(PNG_SIGNATURE) + 25
    return bytes(plain[:after_header]) + chunks + bytes(plain[after_header:])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode_picture(picture: Picture, extension: str) -> bytes:
    """A file's bytes for an extension: .png and .npy hold everything, others what PIL makes of 8 bits.

    Raises:
        ConfigError: an extension that is not known, or cannot hold this picture.
    """
    if extension == ".npy":
        file = io.BytesIO()
        np.save(file, picture.whole())
        return file.getvalue()
    if extension == ".png":
        return png_bytes(picture)
    if extension not in Image.registered_extensions():
        raise ConfigError(f"{extension or 'no extension'}: name an image file, such as .png")
    file = io.BytesIO()
    kept = {k: v for k, v in (("icc_profile", picture.icc), ("exif", picture.exif)) if v}
    try:
        picture.to_pil().save(file, Image.registered_extensions()[extension], **kept)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{extension} cannot hold this picture ({error}): write .png") from None
    return file.getvalue()


def pack_alpha(alpha: Pixels) -> bytes:
    """Losslessly, as a grey PNG."""
    return bytes(imagecodecs.png_encode(alpha, level=9))


def unpack_alpha(data: bytes, height: int, width: int, dtype: np.dtype) -> Pixels:
    """What `pack_alpha` made. Raises CorruptError, before anything is allocated where the size is another one."""
    if data[:8] != PNG_SIGNATURE or struct.unpack_from(">II", data.ljust(24, b"\0"), 16) != (width, height):
        raise CorruptError("alpha is damaged: it is no PNG of the image's size")
    try:
        alpha = imagecodecs.png_decode(data)
    except Exception as error:  # the decoder raises its own kinds
        raise CorruptError(f"alpha is damaged: {error}") from None
    if alpha.shape != (height, width) or alpha.dtype != dtype:
        raise CorruptError("alpha is damaged: it has another size or depth than the image")
    return alpha


def inflate(data: bytes, *, limit: int, name: str) -> bytes:
    """What zlib made smaller, up to a limit. Raises CorruptError."""
    decompressor = zlib.decompressobj()
    try:
        found = decompressor.decompress(data, limit)
    except zlib.error as error:
        raise CorruptError(f"{name} is damaged: {error}") from None
    if not decompressor.eof or decompressor.unused_data:
        raise CorruptError(f"{name} is damaged, or has more than {limit} bytes")
    return found


def extension_of(file: Path) -> str:
    return file.suffix.lower()
