"""What is exported computes in onnxruntime what the autoencoder computes in torch, at any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ldm_vae.models import onnx_export
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.reconstruction import reconstruct
from tests.command_line import fails, run
from tests.pages import ROOT, blocks, run_commands

SIZES = ((1, 16, 24), (3, 40, 8))
"""Batch, height, width."""


def check_equal_to_torch(vae: Any, file: Path) -> None:
    """Raises AssertionError unless an exported encoder or decoder gives what that of `vae` gives, to 1e-4."""
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    [name] = [value.name for value in session.get_inputs()]
    assert session.get_inputs()[0].shape[2:] == ["height", "width"]
    for batch, height, width in SIZES:
        images = torch.rand(batch, 3, height, width) * 2 - 1
        with torch.inference_mode():
            latents = vae.encode(images).latent_dist.mode()
            given, wanted = (images, latents) if name == "images" else (latents, vae.decode(latents).sample)
        [got] = session.run(None, {name: given.numpy()})
        assert np.abs(got - wanted.numpy()).max() < 1e-4


def test_the_decoder_of_the_box_gives_in_onnxruntime_what_it_gives_in_torch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    run("export", "box:codec", tmp_path / "decoder.onnx")
    check_equal_to_torch(load_autoencoder("box:codec"), tmp_path / "decoder.onnx")


@pytest.mark.slow
def test_an_autoencoder_of_diffusers_is_exported_with_its_attention_and_group_norms(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    for part in ("encoder", "decoder"):
        run("export", tmp_path, tmp_path / f"{part}.onnx", "--part", part)
        check_equal_to_torch(vae, tmp_path / f"{part}.onnx")


@pytest.mark.slow
def test_the_example_of_the_guide_runs(here: Path) -> None:
    pytest.importorskip("onnxscript")
    page = (ROOT / "docs" / "onnx.md").read_text()
    assert run_commands(page) == 2
    vae = load_autoencoder("box:codec")
    check_equal_to_torch(vae, here / "encoder.onnx")
    [example] = blocks(page, "python")
    scope: dict[str, np.ndarray] = {}
    exec(example, scope)
    with torch.inference_mode():
        wanted = reconstruct(vae, torch.from_numpy(scope["images"])).numpy()
    assert np.abs(scope["decoded"] - wanted).max() < 1e-4
    assert np.array_equal(np.asarray(Image.open("decoded.png")), scope["pixels"])
    assert scope["pixels"].shape == scope["photo"].shape


def test_without_the_packages_a_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(onnx_export, "find_spec", lambda _: None)
    said = fails(capsys, "export", "box:codec", tmp_path / "decoder.onnx")
    assert said == "error: ONNX needs two packages that are not installed: pip install 'ldm-vae[onnx]'"
    assert not list(tmp_path.iterdir())
