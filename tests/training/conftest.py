"""An untrained VAE; and one thread, as in the processes that are launched, so that sums are taken in the same order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_vae.models.autoencoder import PatchAutoencoderKL


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained one of stride 8."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    PatchAutoencoderKL(block_out_channels=(16, 16)).save_pretrained(folder)
    return folder
