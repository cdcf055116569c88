from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_vae.codec.codec import LatentCodec

SLOW = (
    "diffusers",
    "transformers",
    "torch._dynamo",
    "accelerate",
    "scipy.optimize",
    "torchvision",
    "huggingface_hub",
    "gradio",
)


def test_compress_and_decompress_import_nothing_slow_but_torch(
    codec: LatentCodec, photo: np.ndarray, tmp_path: Path
) -> None:
    codec.vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "codec").mkdir()
    codec.tables.save(tmp_path / "codec")
    Image.fromarray(photo).save(tmp_path / "a.png")
    code = (
        "import sys; from ldm_vae.cli import main; folder, *slow = sys.argv[1:];"
        "main(['compress', f'{folder}/a.png', f'{folder}/a.ldi', '--model', folder]);"
        "main(['decompress', f'{folder}/a.ldi', f'{folder}/b.png', '--model', folder]);"
        "print([name for name in slow if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *SLOW]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
    data = codec.compress(photo)
    assert (tmp_path / "a.ldi").read_bytes() == data
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), np.asarray(codec.decompress(data)))
