"""Two machines, played by two launches that meet over the loopback: as one, and with one of them lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from ldm_vae.models.unet import make_denoiser
from tests.processes import ROOT, Forked, largest_difference, launch_machines, metrics, state, trainer_below, wait_for
from training import train_diffusion, train_vae

SMALL = "--steps 24 --batch-size 4 --resolution 32 --num-workers 0 --learning-rate 1e-4 --mixed-precision no".split()
SMALL += "--log-every 1 --checkpoint-every 5 --sample-every 100 --tracker none".split()


@pytest.mark.parametrize("name", ["train_vae", pytest.param("train_diffusion", marks=pytest.mark.slow)])
def test_a_lost_machine_ends_the_launch_and_the_same_command_goes_on(
    name: str, photos: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_diffusion, "make_denoiser", make_denoiser)  # as wide as in what is launched
    script = str(ROOT / "training" / f"{name}.py")
    if name == "train_vae":
        words = ["demo", "--data", str(photos), *SMALL, "--perceptual", "none", "--adversarial", "none"]
        trainer, part = train_vae, "vae"
    else:
        words = ["demo", "--vae", str(vae), "--data", str(photos), *SMALL]
        trainer, part = train_diffusion, "unet"
    run = tmp_path / "run"
    nodes = launch_machines(script, [*words, "--output", str(run)], 2)
    checkpoints = run / "checkpoints"
    wait_for(lambda: checkpoints.is_dir() and any(checkpoints.glob("step-*/state.safetensors")), nodes[0])
    os.kill(trainer_below(nodes[1]), signal.SIGKILL)
    began = time.monotonic()
    said = [ended(node) for node in nodes]
    assert time.monotonic() - began < 60
    assert "error: another process of this launch is gone" in said[0]
    assert "SIGKILL" in said[1]
    steps = [m["step"] for m in metrics(run) if "images_per_second" in m]
    last = max(int(c.name.removeprefix("step-")) for c in checkpoints.glob("step-*"))
    assert last < 24
    before = [m for m in metrics(run) if m["step"] <= last]
    config = train_vae.parse_config(trainer.PRESETS, description="", args=[*words, "--output", str(run)])
    trainer.main(config)  # on one process
    assert metrics(run)[: len(before)] == before  # seconds, too: none was done again
    again = [m["step"] for m in metrics(run) if "images_per_second" in m][len(steps) :]
    assert again == list(range(last + 1, 25))  # nothing is lost but the steps since the checkpoint
    alone = tmp_path / "alone"
    trainer.main(train_vae.parse_config(trainer.PRESETS, description="", args=[*words, "--output", str(alone)]))
    assert largest_difference(state(run, 24), state(alone, 24), (part, "ema")) < 1e-4


def ended(node: Forked) -> str:
    done = node.wait()
    assert done.returncode != 0
    return done.stdout + done.stderr
