"""The precision that autocast computes in. Weights, averages and optimizers are always float32."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

FAST_BF16 = {"avx512_bf16", "amx_bf16"}
"""Instructions with which a CPU multiplies in bf16; without them it is slower than float32."""


def fast_precision(device: torch.device) -> Literal["no", "bf16"]:
    """bf16 where the device computes it fast, otherwise float32 ("no")."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if device.type == "xpu" or (device.type == "cpu" and FAST_BF16 & cpu_flags()) else "no"


def cpu_flags() -> set[str]:
    """The instruction sets that Linux names; nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
