"""An AutoencoderKL in a single file, as other tools save it: under the names of CompVis' code, or diffusers'."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ldm_vae.errors import ModelError

FIRST_CONVOLUTION = re.compile(r"encoder\.(?:down|down_blocks)\.(\d+)\.(?:block|resnets)\.(\d+)\.conv1\.weight$")
"""Of a block: its resolution and its number there, in CompVis' names and in diffusers'."""
OTHER_ATTENTION = re.compile(r"coder\.(?:down|up)\.\d+\.attn\.|coder\.(?:down|up)_blocks\.\d+\.attentions\.")
"""Beside that in the middle, which is the only one that AutoencoderKL has."""


def load_single_file(name: str) -> Any:
    """The AutoencoderKL in a .safetensors file, or in that of a whole Stable Diffusion, in float32 for inference.

    Its configuration is read off the shapes of its weights, so that nothing is fetched. The scale of its latents, which
    no file holds, is none.

    Raises:
        ModelError: there is no such file, it is damaged, or it holds something else.
    """
    from diffusers import AutoencoderKL

    file = Path(name)
    if not file.is_file():
        raise ModelError(f"no such model: {name}")
    try:
        with safe_open(file, "np") as weights, tempfile.TemporaryDirectory() as folder:
            config = config_of({key: weights.get_slice(key).get_shape() for key in weights.keys()})  # noqa: SIM118
            (Path(folder) / "config.json").write_text(json.dumps({"_class_name": AutoencoderKL.__name__, **config}))
            vae = AutoencoderKL.from_single_file(str(file), config=folder, local_files_only=True)
    except ModelError as error:
        raise ModelError(f"{name} cannot be loaded: {error}") from None
    except Exception as error:  # damaged files raise many kinds
        raise ModelError(f"cannot load an AutoencoderKL from {name}: {type(error).__name__}: {error}") from None
    if any(parameter.is_meta for parameter in vae.parameters()):
        raise ModelError(f"cannot load an AutoencoderKL from {name}: some of its weights are missing")
    return vae.float().eval()


def config_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """AutoencoderKL's arguments by the shapes of its weights. Raises ModelError."""
    blocks = {(int(m[1]), int(m[2])): shapes[key] for key in shapes if (m := FIRST_CONVOLUTION.search(key))}
    ends = {key.removeprefix("first_stage_model.").removeprefix("vae."): shape for key, shape in shapes.items()}
    needed = ("encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_out.weight")
    if (0, 0) not in blocks or not ends.keys() >= set(needed):
        raise ModelError("its weights are not named as an AutoencoderKL's")
    if any(OTHER_ATTENTION.search(key) for key in shapes):
        raise ModelError("it has attention elsewhere than in the middle")
    first, last, output = (ends[name] for name in needed)
    widths = [blocks[level, 0][0] for level in range(1 + max(level for level, _ in blocks))]
    return {
        "in_channels": first[1],
        "out_channels": output[0],
        "latent_channels": last[0] // 2,
        "block_out_channels": widths,
        "layers_per_block": sum(level == 0 for level, _ in blocks),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "use_quant_conv": "quant_conv.weight" in ends,
        "use_post_quant_conv": "post_quant_conv.weight" in ends,
        "mid_block_add_attention": any(re.match(r"encoder\.mid(_block)?\.att", key) for key in ends),
        "scaling_factor": 1.0,
    }
