"""A denoiser whose parameters are divided among two processes: Accelerate does that on GPUs alone, so FSDP2 is put in
its place by hand. All else is the trainer as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from diffusers import UNet2DModel

from ldm_vae.runs.config import parse_config
from tests.processes import ROOT, largest_difference, launch, metrics, state
from training import train_diffusion

PROGRAM = """
import sys
from types import SimpleNamespace
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

def prepare(self, unet, optimizer):
    assert self.state.fsdp_plugin.mixed_precision_policy is None
    unet.register_forward_pre_hook(lambda _, given: print(given[1].dtype, torch.is_autocast_enabled("cpu")))
    mesh = init_device_mesh("cpu", (self.num_processes,))
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(unet, mesh=mesh)
    group = optimizer.param_groups[0]
    group["params"] = list(unet.parameters())
    return unet, SimpleNamespace(optimizer=optimizer)

Accelerator.prepare = prepare
Accelerator.is_fsdp2 = True
AcceleratorState.fsdp_plugin = SimpleNamespace(mixed_precision_policy="everything becomes bf16")
sys.path.insert(0, {root!r})
from ldm_vae.runs.config import parse_config
from training import train_diffusion
train_diffusion.main(parse_config(train_diffusion.PRESETS, description=""))
"""
SMALL = (
    "--batch-size 4 --resolution 32 --num-workers 0 --learning-rate 1e-4 --mixed-precision no --tracker none".split()
)
SMALL += "--tracker none --log-every 1 --checkpoint-every 2 --sample-every 4 --steps 6".split()


@pytest.mark.slow
def test_sharded_training_is_that_of_one_process(photos: Path, vae: Path, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(PROGRAM.replace("{root!r}", repr(str(ROOT))))
    words = ["tiny", "--vae", str(vae), "--data", str(photos), *SMALL]
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"

    def run_alone(output: Path) -> None:
        given = [*words, "--output", str(output)]
        train_diffusion.main(parse_config(train_diffusion.PRESETS, description="", args=given))

    run_alone(alone)
    done = launch(str(script), [*words, "--output", str(sharded)], processes=2)
    assert done.returncode == 0, done.stderr
    assert largest_difference(state(sharded, 6), state(alone, 6), ("unet", "ema")) < 1e-4
    losses = [[m["loss"] for m in metrics(run) if "loss" in m] for run in (sharded, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    validation = [[m["val_loss"] for m in metrics(run) if "val_loss" in m] for run in (sharded, alone)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-4)
    unets = [UNet2DModel.from_pretrained(run / "pipeline" / "unet").state_dict() for run in (sharded, alone)]
    assert max(float((unets[0][k] - unets[1][k]).abs().max()) for k in unets[1]) < 1e-4
    for folder in (sharded / "checkpoints").glob("step-6"):  # gone on with by one process, from the checkpoint before
        shutil.rmtree(folder)
    run_alone(sharded)
    assert largest_difference(state(sharded, 6), state(alone, 6), ("unet", "ema")) < 1e-4
    shutil.rmtree(alone / "checkpoints" / "step-6")  # and the other way
    assert launch(str(script), [*words, "--output", str(alone)], processes=2).returncode == 0
    assert largest_difference(state(sharded, 6), state(alone, 6), ("unet", "ema")) < 1e-4
    bf16 = [*words, "--output", str(tmp_path / "bf16"), "--mixed-precision", "bf16", "--steps", "1"]
    done = launch(str(script), bf16, processes=2)
    assert done.returncode == 0, done.stderr
    assert {line for line in done.stdout.splitlines() if line.startswith("torch.")} == {"torch.float32 True"}
