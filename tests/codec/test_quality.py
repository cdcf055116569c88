from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from ldm_vae.codec import bitstream
from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.fit_tables import STEPS
from ldm_vae.codec.quality import HALVING, USUAL_QUALITY, USUAL_STEP, quality_of_step, step_of_quality
from ldm_vae.errors import ConfigError


def fixed_step_of(data: bytes) -> int:
    return bitstream.unpack(data).header.step


def test_more_quality_is_a_finer_step_and_so_many_points_halve_it() -> None:
    steps = [step_of_quality(quality) for quality in range(1, 101)]
    assert steps == sorted(steps, reverse=True)
    assert step_of_quality(75) == USUAL_STEP
    assert step_of_quality(75 - HALVING) == pytest.approx(2 * USUAL_STEP)
    assert [quality_of_step(step) for step in steps] == pytest.approx(list(range(1, 101)))


@pytest.mark.parametrize("quality", [0, 0.99, 100.01, -1, float("nan"), float("inf")])
def test_a_quality_outside_1_to_100_is_refused(quality: float, codec: LatentCodec, photo: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="1 to 100"):
        codec.compress(photo, quality=quality)


def test_75_is_the_quality_unless_given(codec: LatentCodec, photo: np.ndarray) -> None:
    assert fixed_step_of(codec.compress(photo)) == round(256 * step_of_quality(75))
    assert fixed_step_of(codec.compress(photo, quality=60.5)) == round(256 * step_of_quality(60.5))
    assert USUAL_QUALITY == 75


def test_a_quality_and_a_step_together_are_refused(codec: LatentCodec, photo: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="not both"):
        codec.compress(photo, quality=75, step=1.0)


def test_of_a_quality_out_of_reach_the_nearest_is_taken_and_said(codec: LatentCodec, photo: np.ndarray) -> None:
    """The model's tables were fitted at steps from 0.375 to 2."""
    for quality, step, said in ((100, 96, "its finest, step 0.375"), (1, 512, "its coarsest, step 2 ")):
        with pytest.warns(UserWarning, match=f"quality {quality} is out of this model's reach: {said}"):
            assert fixed_step_of(codec.compress(photo, quality=quality)) == step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codec.compress(photo, step=0.2)


def test_the_guide_names_the_scale() -> None:
    page = Path(__file__).parents[2] / "docs" / "compression.md"
    assert f"75 is step {USUAL_STEP:g}, and {HALVING:g} points more halve it" in page.read_text()


def test_tables_fitted_as_usual_serve_every_quality() -> None:
    assert STEPS[0] == step_of_quality(100)
    assert STEPS[-1] == pytest.approx(step_of_quality(1))
