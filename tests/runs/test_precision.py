from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from ldm_vae.errors import RunError
from ldm_vae.runs.config import RunConfig, saved_config
from ldm_vae.runs.loop import FREE_ON_RESUME, fast_precision, start
from ldm_vae.runs.run import Run

OLD, NEW = {"sse2", "avx2", "avx512f"}, {"avx2", "avx512f", "avx512_bf16"}


def pretend(monkeypatch: pytest.MonkeyPatch, flags: set[str]) -> None:
    """Moves the process to a machine whose CPU has these flags."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("ldm_vae.runs.loop.cpu_flags", lambda: flags)


@pytest.mark.parametrize(
    ("flags", "precision"),
    [(set(), "no"), (OLD, "no"), (NEW, "bf16"), ({"amx_bf16", "amx_tile"}, "bf16"), ({"amx_tile", "amx_int8"}, "no")],
)
def test_a_cpu_computes_in_bf16_when_it_has_the_instructions(
    flags: set[str], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, flags)
    assert fast_precision(torch.device("cpu")) == precision


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "no")])
def test_a_gpu_that_only_emulates_bf16_computes_in_float32(
    native: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert fast_precision(torch.device("cuda")) == precision


@pytest.mark.parametrize(("flags", "precision"), [(OLD, "bf16"), (NEW, "no")])
def test_what_is_asked_for_is_taken_on_any_device(
    flags: set[str], precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, flags)
    asked = RunConfig(output=tmp_path / "run", tracker="none", mixed_precision=precision)
    assert start(asked)[1].mixed_precision == precision


def test_a_resumed_run_keeps_the_precision_that_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = RunConfig(output=tmp_path / "run", tracker="none")
    assert asked.mixed_precision == "auto"
    pretend(monkeypatch, NEW)
    config, accelerator = start(asked)
    assert (config.mixed_precision, accelerator.mixed_precision) == ("bf16", "bf16")
    assert "mixed precision: bf16" in capsys.readouterr().out
    Run(config.output, config).release()
    assert (saved_config(config.output) or {})["mixed_precision"] == "bf16"

    pretend(monkeypatch, OLD)  # another machine
    config, accelerator = start(asked)
    assert (config.mixed_precision, accelerator.mixed_precision) == ("bf16", "bf16")
    Run(config.output, config, free=FREE_ON_RESUME).release()
    pretend(monkeypatch, OLD)
    other, _ = start(replace(asked, mixed_precision="no"))
    with pytest.raises(RunError, match=r"holds a run with other settings .*mixed_precision: bf16 -> no"):
        Run(other.output, other, free=FREE_ON_RESUME)
    assert start(replace(asked, output=tmp_path / "new"))[0].mixed_precision == "no"
