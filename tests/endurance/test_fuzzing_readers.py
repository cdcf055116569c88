"""The fuzzer of the readers, with few files. `python -m tests.endurance.fuzzing.readers` takes 10,000 a reader."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from ldm_vae.errors import ConfigError
from tests.endurance.fuzzing import codec, readers
from tests.endurance.fuzzing.readers import FOLDERS, fuzz


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_nothing_that_is_read_crashes_or_is_taken_for_something_else(count: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = fuzz(count, 0, tmp_path)
    assert set(FOLDERS) < set(outcomes)
    for name, outcome in outcomes.items():
        assert (outcome.crashed, outcome.first, outcome.slow) == (0, "", 0), name
        assert outcome.read + outcome.refused > 0
    assert sum(o.refused for o in outcomes.values()) > count


@pytest.mark.parametrize("fuzzer", [codec, readers])
def test_no_files_at_all_are_not_a_success(fuzzer) -> None:
    with pytest.raises(ConfigError, match="--count is 0"):
        fuzzer.main(fuzzer.Config(count=0))
