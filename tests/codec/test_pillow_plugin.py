from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_vae import pillow_plugin
from ldm_vae.codec.codec import LatentCodec
from ldm_vae.errors import ConfigError, TruncatedError


def test_pillow_opens_and_saves(codec: LatentCodec, photo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec.vae.save_pretrained(tmp_path)
    (tmp_path / "codec").mkdir()
    codec.tables.save(tmp_path / "codec")
    file = tmp_path / "x.ldi"
    monkeypatch.delenv("LDM_VAE_MODEL", raising=False)
    pillow_plugin.register()
    Image.fromarray(photo).save(file)
    with Image.open(file) as image:
        assert image.convert("RGB").size == (120, 80)  # by the model that comes with the package
    pillow_plugin.register(str(tmp_path))
    Image.fromarray(photo).save(file, quality=60)
    with Image.open(file) as image:
        assert (image.format, image.size, image.mode) == ("LDI", (120, 80), "RGB")
        assert np.array_equal(np.asarray(image), np.asarray(codec.decompress(codec.compress(photo, quality=60))))
    Image.fromarray(photo).save(file, quality=60, effort=1)
    assert file.read_bytes() == codec.compress(photo, quality=60, effort=1)
    alpha = Image.fromarray(np.dstack([photo, photo[:, :, :1]]))
    exif = Image.Exif()
    exif[0x010E] = "a description"
    alpha.save(file, exif=exif, icc_profile=b"a profile")
    with Image.open(file) as image:
        assert image.mode == "RGBA"
        assert image.getexif()[0x010E] == "a description"  # before a pixel is decoded
        assert image.info["icc_profile"] == b"a profile"
        assert np.array_equal(np.asarray(image)[:, :, 3], photo[:, :, 0])
    exif[0x0112] = 6
    turned = tmp_path / "turned.png"
    Image.fromarray(photo).save(turned, exif=exif)
    with Image.open(turned) as image:
        image.save(file, exif=image.info["exif"])  # people's habit
    with Image.open(file) as image:
        assert image.size == (80, 120)  # upright, and no longer to be turned
        assert dict(image.getexif()) == {0x010E: "a description"}
    for mode in ("L", "LA", "I;16"):
        Image.fromarray(photo).convert("LA" if mode == "LA" else "L").convert("I" if mode == "I;16" else mode).save(
            file
        )
        with Image.open(file) as image:
            assert image.mode == mode
            image.load()
    image = Image.open(file)
    opened = image.fp
    image.load()
    assert opened is not None
    assert opened.closed  # Pillow's promise for what it has opened itself
    image.close()
    for flags in ({"quality": 0}, {"quality": 101}, {"quality": 75, "step": 1.0}):
        with pytest.raises(ConfigError, match="quality"):
            Image.fromarray(photo).save(file, **flags)
    Image.fromarray(photo).save(file, step=0.5)
    assert file.read_bytes() == codec.compress(photo, step=0.5)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(TruncatedError):
        Image.open(file)
