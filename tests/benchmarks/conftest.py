from __future__ import annotations

from collections.abc import Callable

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from tests.pages import parsed


@pytest.fixture
def in_process() -> Callable[..., float]:
    """Stands in for `seconds_of_script`: runs the script in this process, which has imported torch already."""

    def run(script: str, *words: object) -> float:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        module, config = parsed([script, *map(str, words)])
        module.main(config)
        return 1.0

    return run
