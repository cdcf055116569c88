"""`Image.open("x.ldi")` and `image.save("x.ldi")`: `import ldm_vae.pillow_plugin` is enough.

The model is $LDM_VAE_MODEL, or box:codec; `register(model)` names another.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import IO, Any

from PIL import Image, ImageFile

from ldm_vae.codec.bitstream import ALPHA, DEFAULT_MODEL, EXTENSION, MAGIC, METADATA, MODEL_VARIABLE, TUNINGS, unpack
from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.picture import as_picture, pil_info
from ldm_vae.codec.sections import unpack_metadata
from ldm_vae.codec.transparency import smooth_transparent
from ldm_vae.data.metadata import without_layout
from ldm_vae.errors import ConfigError

FORMAT = "LDI"
MODES = {(1, 8, False): "L", (1, 8, True): "LA", (3, 8, False): "RGB", (3, 8, True): "RGBA", (1, 16, False): "I;16"}
"""By colours, depth and whether there is alpha."""
state: dict[str, Any] = {}
"""The model's name, and the codec once it is needed."""


def register(model: str | None = None) -> None:
    """Names the model for all files: a run directory, model folder, hub id or box:NAME; $LDM_VAE_MODEL unless given."""
    state.clear()
    state["model"] = model


def codec(tune: str = TUNINGS[0]) -> Any:
    """The codec, loaded when it is needed."""
    if tune not in state:
        model = state.get("model") or os.environ.get(MODEL_VARIABLE, DEFAULT_MODEL)
        state[tune] = LatentCodec.from_pretrained(model, tune=tune)
    return state[tune]


class LdiImageFile(ImageFile.ImageFile):
    """Size, mode and metadata come from the file at once, without a model; pixels when they are asked for."""

    format, format_description = FORMAT, "Latents of an autoencoder"

    def _open(self) -> None:
        """Raises CompressedFileError for a file that begins like ours and is not whole."""
        assert self.fp is not None
        self.data = self.fp.read()
        contents = unpack(self.data)
        header = contents.header
        self._size = header.width, header.height
        try:
            self._mode = MODES[header.colours, header.depth, ALPHA in contents.sections]
        except KeyError:
            raise ConfigError(f"Pillow has no mode for {header.colours} channels of {header.depth} bits") from None
        if METADATA in contents.sections:
            metadata = unpack_metadata(contents.read(contents.sections[METADATA]))
            self.info.update(dict(metadata.text) | pil_info(metadata))

    def load(self) -> Any:
        if hasattr(self, "data"):
            image = codec().decompress(self.data)
            del self.data
            self.im, self._mode = image.im, image.mode
            if self.fp is not None and self._exclusive_fp:  # as Pillow does for its own
                self.fp.close()
            self.fp = None
        return super().load()


def save(image: Image.Image, file: IO[bytes], filename: str | bytes) -> None:
    """`image.save(file, quality=75, effort=0, strip=False, exact=False, tune="visual", icc_profile=..., exif=...)`.

    `quality` is 1 to 100, as in `LatentCodec.compress`, and `step=1.0` takes its place; with `exact`, the colours of
    fully transparent pixels are kept, too.
    """
    flags = image.encoderinfo
    encoder = codec(flags.get("tune", TUNINGS[0]))
    picture = as_picture(image, channels=encoder.network.channels)
    metadata = picture.metadata
    if "icc_profile" in flags:
        metadata = replace(metadata, icc=flags["icc_profile"] or b"")
    if "exif" in flags:
        exif = flags["exif"].tobytes() if isinstance(flags["exif"], Image.Exif) else flags["exif"] or b""
        metadata = replace(metadata, exif=without_layout(exif))  # the pixels are upright already
    picture = replace(picture, metadata=metadata)
    if not flags.get("exact", False):
        picture = smooth_transparent(picture)
    given = {name: flags[name] for name in ("quality", "step", "effort", "strip") if name in flags}
    file.write(encoder.compress(picture, **given))


Image.register_open(FORMAT, LdiImageFile, lambda prefix: prefix.startswith(MAGIC))
Image.register_save(FORMAT, save)
Image.register_extension(FORMAT, EXTENSION)
Image.register_mime(FORMAT, "image/x-ldi")
