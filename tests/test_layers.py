"""Imports run one way, and no module is a drawer for junk."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("ldm_vae.errors", "ldm_vae.files", "ldm_vae.hub", "ldm_vae.progress", "ldm_vae.timing", "ldm_vae.runs.sharding"),
    ("ldm_vae.data", "ldm_vae.models", "ldm_vae.codec.rans", "ldm_vae.codec.bitstream"),
    ("ldm_vae.latents", "ldm_vae.runs", "ldm_vae.codec"),
    ("ldm_vae.objectives", "ldm_vae.metrics", "ldm_vae.report", "ldm_vae.grids", "ldm_vae.sampling", "ldm_vae.analysis"),
    ("ldm_vae.pipeline",),
    ("ldm_vae.commands", "ldm_vae.pillow_plugin"),
    ("ldm_vae.cli",),
    ("training", "pipelines", "benchmarks"),
)
BANNED = {"utils", "util", "common", "helpers", "helper", "misc"}


def layer(module: str) -> int:
    found = [(len(p), i) for i, names in enumerate(LAYERS) for p in names if (module + ".").startswith(p + ".")]
    return max(found)[1] if found else -1


def modules() -> list[Path]:
    return [p for top in ("ldm_vae", "training", "pipelines", "benchmarks") for p in sorted((ROOT / top).rglob("*.py"))]


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_its_own_layer_and_those_below(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert not BANNED & set(module.split("."))
    if module == "ldm_vae":
        return  # the public face imports on demand, from anywhere
    assert layer(module) >= 0, f"{module} has no place in LAYERS"
    for name in imports(path):
        assert not name.startswith("ldm_vae.") or name.count(".") > 1, f"{module}: name the home, not the public face"
        below = layer(name)
        assert below <= layer(module), f"{module} imports {name}, which is above it"
        package = module.rpartition(".")[0]
        beside = package.count(".") > 0 and name.startswith(package + ".") and "__main__" not in name
        is_script = below == len(LAYERS) - 1 and not beside
        assert not is_script, f"{module} imports the script {name}"
