"""Shows that a refactor changed no number: the same commands on two commits give the same bits.

python -m tests.endurance.same_bits [--before COMMIT --steps 6 --only NAME ...]

Each preset is trained for a few steps by the code of an older commit and by the code here. Weights must be equal tensor
by tensor, and so must the bytes of compressed files, the pixels of their images, and samples from fixed seeds. Both
sides compute in float32 on one thread of the same machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from safetensors.numpy import load_file

from ldm_vae.data.procedural import ProceduralSource
from ldm_vae.errors import ConfigError, DataError, one_line_errors

ROOT = Path(__file__).parent.parent.parent
FLOAT32 = "--batch-size 4 --num-workers 0 --tracker none --mixed-precision no"
IMAGES = "--data procedural:dead-leaves --resolution 64"
LOSSES = "--perceptual random --lpips-backbone squeeze --disc-start 2"
CODEC = "train_codec-f8c32"

TRAINERS = {
    "train_vae-demo": ("train_vae.py demo --disc-start 2", None),
    "train_vae-f8c4": (f"train_vae.py f8c4 {LOSSES}", None),
    "train_vae-f8c8": (f"train_vae.py f8c8 {LOSSES}", None),
    "train_vae-f16c16": (f"train_vae.py f16c16 {LOSSES}", None),
    "train_vae-f4c3": (f"train_vae.py f4c3 {LOSSES}", None),
    "train_vae-f8c4-large": (f"train_vae.py f8c4-large {LOSSES}", None),
    "train_vae-decoder": (
        "train_vae.py f8c4 --init OUT/train_vae-f8c4 --train decoder --perceptual none --adversarial none",
        None,
    ),
    CODEC: ("train_codec.py f8c32", "train_vae.py f8c32-codec"),
    "train_codec-f8c8": ("train_codec.py f8c32 --latent-channels 8 --target-bpp 0.2", "train_vae.py f8c8-codec"),
    "train_codec-f16c64": ("train_codec.py f16c64", "train_vae.py f16c64-codec"),
    "train_codec-f8c64": ("train_codec.py f8c64", "train_vae.py f8c64-codec"),
    "train_autoencoder-plain": ("train_autoencoder.py plain", "train_vae.py plain"),
    "train_autoencoder-vector": (
        "train_autoencoder.py plain --global-latent 16 --posterior gaussian --kl-weight 0.001",
        "train_vae.py plain --global-latent 16 --posterior gaussian --kl-weight 0.001",
    ),
    "train_autoencoder-sparse": ("train_autoencoder.py sparse", "train_vae.py sparse"),
    "train_autoencoder-denoise": ("train_autoencoder.py denoise", "train_vae.py denoise"),
    "train_autoencoder-find": ("train_autoencoder.py find", "train_vae.py find"),
    "train_diffusion-demo": ("train_diffusion.py demo --latents OUT/cache", None),
    "train_diffusion-images": (
        "train_diffusion.py tiny --data procedural:shapes --resolution 32 --vae OUT/train_vae-demo",
        None,
    ),
}
"""Name -> a trainer's command, and what it was where that differs (docs/decisions/018)."""

OTHERS = {
    "cache": "training/cache_latents.py --vae OUT/train_vae-demo --data procedural:shapes --num-images 64 "
    "--resolution 32 --output OUT/cache",
    "samples": "pipelines/generate.py --model OUT/train_diffusion-demo --output OUT/samples --num-images 4 --steps 4 "
    "--guidance-scale 2",
    "reconstructed": "pipelines/reconstruct.py --vae OUT/train_vae-f8c4 --input OUT/images --output OUT/reconstructed",
    "denoised": "pipelines/denoise.py --vae OUT/train_autoencoder-denoise --input OUT/images --output OUT/denoised",
    "tables": f"-m ldm_vae.cli fit-codec --vae OUT/{CODEC} --data OUT/images --output OUT/tables",
    "compressed": "-m ldm_vae.cli compress OUT/images OUT/compressed --model OUT/tables --workers 1",
    "decompressed": "-m ldm_vae.cli decompress OUT/compressed OUT/decompressed --model OUT/tables --workers 1",
}
ORDER = [*[n for n in TRAINERS if "diffusion" not in n], "cache", *[n for n in TRAINERS if "diffusion" in n], *OTHERS]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the comparison."""

    before: str = "a7bfff7"
    """The older commit: the last one before the three trainers, unless given."""
    steps: int = 6
    only: tuple[str, ...] = ()
    """Names of the comparisons to make, with what they depend on; all unless given."""


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A worktree of a commit, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        add = ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), commit]
        done = subprocess.run(add, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"--before {commit}: {done.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def command_of(name: str, steps: int, *, former: bool) -> str:
    """The words behind `python`, with OUT for the folder of results."""
    if name in OTHERS:
        return OTHERS[name]
    now, before = TRAINERS[name]
    command = before if former and before else now
    images = "" if "diffusion" in name else IMAGES
    every = f"--steps {steps} --log-every 1 --sample-every 1000 --checkpoint-every 1000"
    return f"training/{command} {images} {FLOAT32} --output OUT/{name} {every}"


def run(tree: Path, out: Path, command: str) -> None:
    """Raises DataError for a command that fails."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    words = [word.replace("OUT", str(out)) for word in command.split()]
    done = subprocess.run([sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"{tree}: {command} failed: {done.stderr.strip().splitlines()[-1]}")


def contents(file: Path) -> dict[str, np.ndarray]:
    """What must be equal in a file: its tensors, pixels or bytes."""
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".png":
        return {"pixels": np.asarray(Image.open(file))}
    return {"bytes": np.frombuffer(file.read_bytes(), np.uint8)}


def compare(before: Path, now: Path) -> tuple[int, list[str]]:
    """The number of arrays that both sides have, and the names of those that differ."""
    compared, different = 0, []
    for file in sorted(before.rglob("*")):
        if file.suffix not in (".safetensors", ".png", ".ldi"):
            continue
        old, new = contents(file), contents(now / file.relative_to(before))
        if old.keys() != new.keys() and file.name != "state.safetensors":  # a checkpoint may hold more, or less
            different.append(f"{file.relative_to(before)}: other names")
        for name in old.keys() & new.keys():
            compared += 1
            if not np.array_equal(old[name], new[name]):
                different.append(f"{file.relative_to(before)}: {name}")
    return compared, different


def main(config: Config) -> None:
    unknown = set(config.only) - set(ORDER)
    if unknown:
        raise ConfigError(f"--only {' '.join(sorted(unknown))}: there are {' '.join(ORDER)}")
    failures = []
    with checkout(config.before) as tree, tempfile.TemporaryDirectory() as folder:
        sides = {"before": tree, "now": ROOT}
        for side in sides:
            images = Path(folder) / side / "images"
            images.mkdir(parents=True)
            source = ProceduralSource("dead-leaves", seed=1, size=96, channels=3)
            for i in range(8):
                Image.fromarray(source[i].pixels[: 96 - i, : 70 + i]).save(images / f"{i}.png")
        for name in ORDER:
            if config.only and name not in config.only:
                continue
            for side, root in sides.items():
                run(root, Path(folder) / side, command_of(name, config.steps, former=side == "before"))
            compared, different = compare(*(Path(folder) / side / name for side in sides))
            print(f"{name:28} {compared:4} arrays, {len(different)} differ {' '.join(different[:3])}", flush=True)
            failures += different or ([name] if not compared else [])
    if failures:
        raise DataError(f"{len(failures)} differences between {config.before} and the code here")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Config))
