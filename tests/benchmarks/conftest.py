from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """Stands for `seconds_of_script`: the same script with the same words in this process, which has torch already."""

    def run(script: Path, *words: object) -> float:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(script), *map(str, words)])
            runpy.run_path(str(script), run_name="__main__")
        return 1.0

    return run
