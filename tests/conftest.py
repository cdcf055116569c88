"""Small images made on the spot, and a clean Accelerate for each test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from ldm_vae.data.sources import open_source

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for a network


@pytest.fixture(scope="session", autouse=True)
def in_a_hurry() -> None:
    from tests.processes import hurry  # not before the hub's library is told to stay offline

    hurry()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its settings in singletons: forget them, those of fixtures too, so that each test may choose."""
    forget_accelerate()
    yield
    forget_accelerate()


def forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 images of 72x60, in two classes."""
    folder = tmp_path_factory.mktemp("photos")
    source = open_source("procedural:dead-leaves@7", resolution=72)
    for i in range(12):
        path = folder / ("first class" if i % 2 else "zweite Klasse ü") / f"image {i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(source[i].pixels[:60]).save(path)
    return folder


@pytest.fixture
def here(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a folder of photos, enough of them to be held out and compared, and a photo.png."""
    monkeypatch.chdir(tmp_path)
    for i, file in enumerate(sorted(photos.rglob("*.png")) * 4):
        copy = tmp_path / "photos" / file.parent.name / f"{i}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    (tmp_path / "photo.png").write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A megabyte in memory; only root can mount it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
