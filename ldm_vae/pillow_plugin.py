"""`Image.open("x.ldi")` and `image.save("x.ldi")`, once `register(model)` was called.

Pillow finds plugins by import alone: `import ldm_vae.pillow_plugin` is enough where $LDM_VAE_MODEL names the model.
"""

from __future__ import annotations

import os
from typing import IO, Any

from PIL import Image, ImageFile

from ldm_vae.codec import bitstream
from ldm_vae.errors import CompressedFileError, ConfigError

FORMAT, EXTENSION = "LDI", ".ldi"
MODEL_VARIABLE = "LDM_VAE_MODEL"
MODES = {(1, 8, False): "L", (1, 8, True): "LA", (3, 8, False): "RGB", (3, 8, True): "RGBA", (1, 16, False): "I;16"}
"""By colours, depth and whether there is alpha."""
state: dict[str, Any] = {}
"""The model's name, and the codec once it is needed."""


def register(model: str | None = None) -> None:
    """Names the model for all files: a run directory, model folder or hub id; $LDM_VAE_MODEL unless given."""
    state.clear()
    state["model"] = model


def codec() -> Any:
    """The codec, loaded when it is needed. Raises ConfigError when no model is named."""
    if "codec" not in state:
        from ldm_vae.codec.codec import LatentCodec

        model = state.get("model") or os.environ.get(MODEL_VARIABLE)
        if not model:
            raise ConfigError(f"no model for {EXTENSION} files: call register(model), or set ${MODEL_VARIABLE}")
        state["codec"] = LatentCodec.from_pretrained(model)
    return state["codec"]


class LdiImageFile(ImageFile.ImageFile):
    """Size and mode come from the header at once, pixels when they are asked for."""

    format, format_description = FORMAT, "Latents of an autoencoder"

    def _open(self) -> None:
        assert self.fp is not None
        self.data = self.fp.read()
        try:
            header = (contents := bitstream.unpack(self.data)).header
        except CompressedFileError as error:
            raise SyntaxError(str(error)) from None  # what Pillow expects of a plugin
        self._size = header.width, header.height
        try:
            self._mode = MODES[header.colours, header.depth, bitstream.ALPHA in contents.sections]
        except KeyError:
            raise SyntaxError(f"Pillow has no mode for {header.colours} channels of {header.depth} bits") from None

    def load(self) -> Any:
        if self.tile or not hasattr(self, "data"):
            return super().load()
        image = codec().decompress(self.data)
        del self.data
        self.im, self._mode, self.info = image.im, image.mode, {**self.info, **image.info}
        return super().load()


def save(image: Image.Image, file: IO[bytes], filename: str | bytes) -> None:
    """`image.save(file, quality=1.0, strip=False)`."""
    options = {k: v for k, v in image.encoderinfo.items() if k in ("quality", "strip")}
    file.write(codec().compress(image, **options))


def accepts(prefix: bytes) -> bool:
    return prefix.startswith(bitstream.MAGIC)


Image.register_open(FORMAT, LdiImageFile, accepts)
Image.register_save(FORMAT, save)
Image.register_extension(FORMAT, EXTENSION)
Image.register_mime(FORMAT, "image/x-ldi")
__all__ = ["LdiImageFile", "register"]
