from __future__ import annotations

import torch

from benchmarks.gpu_check import correctness


def test_every_way_to_compute_a_picture_agrees() -> None:
    found = correctness(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert found.pop("vae: bf16 - float32") < 0.05
    assert found.pop("pipeline: device - CPU") < 1e-3
    assert max(found.values()) < 1e-4, found
