from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies.first_grid import Config, main
from ldm_vae.errors import RunError


def test_the_wait_ends_with_the_grid_and_the_trainer_is_stopped(tmp_path: Path) -> None:
    main(Config(data="procedural:shapes", output=tmp_path, steps=(10,)))
    record = json.loads((tmp_path / "first_grid.json").read_text())
    assert 1 < record["seconds_to_the_grid_of_step_10"] < 300
    assert (tmp_path / "run" / "samples" / "step-10.png").stat().st_size > 1000
    assert not (tmp_path / "run" / "samples" / "step-2000.png").exists()


def test_a_trainer_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no grid of step 10"):
        main(Config(data=str(tmp_path / "nothing"), output=tmp_path / "out"))
