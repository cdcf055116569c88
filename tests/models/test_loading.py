from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

import ldm_vae
from ldm_vae.errors import ModelError
from ldm_vae.models.loading import find_saved, local_folder

VAE, PIPELINE = {"_class_name": "AutoencoderKL"}, {"_class_name": "LatentDiffusionPipeline"}


def write(file: Path, content: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's own config.json, its VAE and its pipeline, which holds the VAE once more."""
    write(tmp_path / "run" / "config.json", {"config": "of the run"})
    write(tmp_path / "run" / "vae" / "config.json", VAE)
    write(tmp_path / "run" / "pipeline" / "model_index.json", PIPELINE)
    write(tmp_path / "run" / "pipeline" / "vae" / "config.json", VAE)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("part", "name", "place"),
    [
        ("vae", "", "vae"),
        ("vae", "vae", "vae"),
        ("vae", "pipeline", "pipeline/vae"),
        ("pipeline", "", "pipeline"),
        ("pipeline", "pipeline", "pipeline"),
    ],
)
def test_a_run_and_each_folder_in_it_name_what_they_hold(
    part: Literal["vae", "pipeline"], name: str, place: str, run: Path
) -> None:
    assert find_saved(str(run / name), part) == (run / place, {"vae": VAE, "pipeline": PIPELINE}[part]["_class_name"])


def test_of_a_hub_id_only_the_files_of_the_part_are_downloaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "owner/name"
        asked.append(allow_patterns)
        return str(run)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_saved("owner/name", "vae") == (run / "vae", "AutoencoderKL")
    assert local_folder("owner/name", ["codec/*"]) == run
    assert "vae/config.json" in asked[0]
    assert not [pattern for pattern in asked[0] if pattern.startswith("*")]  # checkpoints beside it can be large
    assert asked[1] == ["codec/*"]


def test_what_cannot_be_found_is_said_in_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "vae" / "config.json").unlink()
    for name, message in (
        (str(run / "nothing"), "no such model"),
        (str(run), r"has no readable config\.json \(has its run saved yet\?\): KeyError"),
        (str(run / "vae"), r"has no readable config\.json .*FileNotFoundError"),
        ("owner/name", "owner/name could not be had from the hub"),
    ):
        with pytest.raises(ModelError, match=message) as raised:
            find_saved(name, "vae")
        assert "\n" not in str(raised.value)


def test_finding_a_model_imports_no_network(run: Path) -> None:
    program = f"""
import sys
from ldm_vae.models.loading import find_saved
find_saved({str(run)!r}, "vae")
sys.exit(bool({{"torch", "diffusers"}} & set(sys.modules)))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_every_public_name_is_where_the_package_says() -> None:
    for name in ldm_vae.__all__:
        assert getattr(ldm_vae, name).__name__ == name
