"""What comes with the package is listed, with a card that names its licence, and is whole."""

from __future__ import annotations

import pytest

from ldm_vae.models.loading import BOX
from tests.command_line import run

LIMITS = {"codec": 10e6}
"""Bytes that a model may take."""


def test_the_models_of_the_box_are_listed_with_size_licence_and_card(capsys: pytest.CaptureFixture) -> None:
    run("models")
    said = capsys.readouterr().out
    for name, limit in LIMITS.items():
        size = sum(file.stat().st_size for file in (BOX / name).rglob("*") if file.is_file())
        assert size <= limit
        line = next(line for line in said.splitlines() if line.startswith(f"box:{name} "))
        assert f"{size / 1e6:.1f} MB" in line
        assert "cc-by-sa-4.0" in line
        assert str(BOX / name / "README.md") in said
    assert {folder.name for folder in BOX.iterdir() if folder.is_dir()} == set(LIMITS)
