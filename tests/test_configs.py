"""Accelerate's own reading of configs/*.yaml, and what its environment makes of the one for FSDP."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env

from ldm_vae.models.unet import make_denoiser

CONFIGS = Path(__file__).parent.parent / "configs"
PROCESSES = {"one_gpu": (1, 1), "eight_gpus": (8, 1), "nodes": (32, 4), "fsdp_unet": (8, 1)}


def arguments(name: str, *more: str):
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), *more, "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def test_there_is_a_file_for_each_and_no_other() -> None:
    assert {file.stem for file in CONFIGS.iterdir()} == PROCESSES.keys()


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_takes_them(name: str) -> None:
    found = arguments(name)
    assert (found.num_processes, int(found.num_machines)) == PROCESSES[name]
    assert found.mixed_precision == "bf16"
    assert found.use_fsdp == (name == "fsdp_unet")


def test_each_machine_says_its_own_rank_and_where_the_main_one_is() -> None:
    found = arguments("nodes", "--machine_rank", "3", "--main_process_ip", "10.0.0.1")
    assert (found.machine_rank, found.main_process_ip) == (3, "10.0.0.1")


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_the_parts_of_every_denoiser_are_divided(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in prepare_multi_gpu_env(arguments("fsdp_unet")).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    unet = make_denoiser(preset, latent_channels=4, sample_size=(8, 8), num_classes=2)
    plugin.set_auto_wrap_policy(unet)
    divides = fsdp2_prepare_auto_wrap_policy(plugin, unet)
    assert divides is not None
    assert sum(divides(m) for m in unet.modules()) > 5
