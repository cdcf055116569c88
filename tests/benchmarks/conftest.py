from __future__ import annotations

import runpy
import sys
from collections.abc import Callable

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from ldm_vae.timing import ROOT


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """Stands in for `seconds_of_script`: runs the script in this process, which has imported torch already."""

    def run(script: str, *words: object) -> float:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, words)])
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return 1.0

    return run
