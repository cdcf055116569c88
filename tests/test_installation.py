"""What `python -m build` makes is all that an installation needs: commands, models of the box, trainers, pipelines."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
from PIL import Image

from tests.processes import launch

ROOT = Path(__file__).parent.parent
FOLDERS = {"ldm_vae": "ldm_vae", "training": "ldm_vae/training", "pipelines": "ldm_vae/pipelines"}
"""Of the repository, and where an installation has them."""
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])('..')"


def build(kind: str, source: Path) -> Path:
    """A wheel or an sdist of a copy of the sources, beside it; by setuptools alone, which `python -m build` asks."""
    subprocess.run([sys.executable, "-c", BUILD, f"build_{kind}"], cwd=source, check=True, capture_output=True)
    [file] = source.parent.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return file


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with nothing but the wheel that was built from the sdist."""
    source = tmp_path / "source"
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for file in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    with tarfile.open(build("sdist", source)) as sdist:
        sdist.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.glob("ldm_vae-*/")
    wheel = build("wheel", unpacked)
    files = {
        f"{place}/{file.relative_to(ROOT / folder)}"
        for folder, place in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with ZipFile(wheel) as packed:
        assert {name for name in packed.namelist() if ".dist-info/" not in name} == files
    assert not (unpacked / "tests").exists()
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", target, wheel], check=True)
    keep_compiled(ROOT / "ldm_vae" / "codec" / "loops.py", target / "ldm_vae" / "codec" / "loops.py")
    return target


def keep_compiled(module: Path, copy: Path) -> None:
    """What numba has compiled of a module serves its copy: that takes it seconds. It goes by the time of the file."""
    shutil.copystat(module, copy)
    (copy.parent / "__pycache__").mkdir()
    for file in (module.parent / "__pycache__").glob(f"{module.stem}.*.nb?"):
        shutil.copy(file, copy.parent / "__pycache__")


def use(installed: Path, elsewhere: Path) -> None:
    """In a process of its own: what a user does whose only copy is the installed one."""
    sys.path[:] = [str(installed), *(place for place in sys.path if Path(place).resolve() != ROOT.resolve())]
    os.chdir(elsewhere)
    for name in [name for name in sys.modules if name.split(".")[0] == "ldm_vae"]:
        del sys.modules[name]  # the repository's
    Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 50).convert("RGB").save("photo.png")
    from ldm_vae import pillow_plugin
    from ldm_vae.cli import main

    main(["compress", "photo.png"])
    main(["decompress", "photo.ldi", "again.png"])
    pillow_plugin.register()
    Image.open("photo.ldi").convert("RGB").save("opened.png")
    sys.argv = ["train_vae", "f8c4", "--help"]
    try:
        runpy.run_module("ldm_vae.training.train_vae", run_name="__main__", alter_sys=True)
    finally:
        ours = [module for name, module in sys.modules.items() if name.split(".")[0] == "ldm_vae"]
        assert all(installed in Path(str(module.__file__)).parents for module in ours if module.__file__)


def test_the_wheel_alone_compresses_opens_and_trains(installed: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = launch(use, installed, elsewhere)
    assert done.returncode == 0, done.stderr
    assert "--disc-start" in done.stdout
    with Image.open(elsewhere / "again.png") as again, Image.open(elsewhere / "opened.png") as opened:
        assert again.size == (24, 16)
        assert again.tobytes() == opened.tobytes()
