"""Imports run one way, room by room, and no module is a drawer for junk."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("ldm_vae.errors", "ldm_vae.hub", "ldm_vae.progress"),
    ("ldm_vae.files", "ldm_vae.timing"),
    ("ldm_vae.data",),
    ("ldm_vae.models",),
    ("ldm_vae.codec", "ldm_vae.grids", "ldm_vae.metrics", "ldm_vae.runs"),
    ("ldm_vae.latents", "ldm_vae.report"),
    ("ldm_vae.objectives", "ldm_vae.sampling"),
    ("ldm_vae.analysis", "ldm_vae.pipeline"),
    ("ldm_vae.commands", "ldm_vae.pillow_plugin"),
    ("ldm_vae.page",),
    ("ldm_vae.cli",),
    ("training", "pipelines", "benchmarks"),
)
"""A room imports from itself, and from rooms on the layers above its own in this list: never from beside or below."""
BANNED = {"utils", "util", "common", "helpers", "helper", "misc"}


def room_of(module: str) -> str:
    """ldm_vae.data.images -> ldm_vae.data, training.train_vae -> training; "" where there is none."""
    return next((r for layer in LAYERS for r in layer if (module + ".").startswith(r + ".")), "")


def layer_of(room: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if room in layer)


@cache
def modules() -> dict[str, Path]:
    files = [
        p for top in ("ldm_vae", "training", "pipelines", "benchmarks") for p in sorted((ROOT / top).rglob("*.py"))
    ]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


@cache
def imports(module: str) -> list[str]:
    """The modules that it imports, anywhere in its file; names of other packages as they are."""
    names = []
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if name in modules() else str(node.module) for name in whole]
    return names


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_from_its_own_room_and_those_of_lower_layers(module: str) -> None:
    assert not BANNED & set(module.split("."))
    if module == "ldm_vae":
        return  # the public face imports on demand, from anywhere
    room = room_of(module)
    assert room, f"{module} has no place in LAYERS"
    for name in imports(module):
        assert name != "ldm_vae", f"{module}: name the home, not the public face"
        other = room_of(name)
        if other in LAYERS[-1]:
            pytest.fail(f"{module} imports the script {name}")
        if other and other != room:
            assert layer_of(other) < layer_of(room), f"{module} imports {name}, which is not on a lower layer"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: set(imports(module)) & set(modules()) - {module} for module in modules()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
