"""HEIC, by the optional pillow-heif."""

from __future__ import annotations

import io

import numpy as np

from ldm_vae.data.boxes import facts_of
from ldm_vae.data.image_files import HEIF_ADVICE, heif_is_there
from ldm_vae.data.images import Pixels, check_size, full_scale
from ldm_vae.data.metadata import Metadata, as_bytes
from ldm_vae.errors import BadImageError


def read_heif(data: bytes, max_pixels: int) -> tuple[Pixels, Metadata, tuple[str, ...]]:
    """Pixels of the primary image, turned as the file says; metadata; and notes. Raises BadImageError."""
    if not heif_is_there():
        raise BadImageError(f"HEIC: {HEIF_ADVICE}")
    import pillow_heif

    file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False, hdr_to_16bit=False)
    image = file[file.primary_index]
    width, height = image.size
    check_size(width, height, max_pixels)
    pixels = np.atleast_3d(np.asarray(image))
    if pixels.dtype == np.uint16:
        pixels = full_scale(pixels, image.info["bit_depth"])
    facts = facts_of(data)
    icc = image.info.get("icc_profile") or b""
    metadata = Metadata(
        icc=icc,
        cicp=None if icc else facts.cicp,
        exif=image.info.get("exif") or b"",
        xmp=as_bytes(image.info.get("xmp") or b""),
    )
    notes = (f"image 1 of {len(file)}",) if len(file) > 1 else ()
    return pixels, metadata, notes + ("its gain map (HDR) was left out",) * facts.gain_map
