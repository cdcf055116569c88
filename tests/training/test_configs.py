"""Accelerate's own reading of configs/*.yaml, what its environment makes of the one for FSDP."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env

from ldm_vae.errors import ConfigError
from ldm_vae.models.unet import make_denoiser
from ldm_vae.runs.config import parse_config
from ldm_vae.runs.loop import start
from training import train_autoencoder, train_codec, train_diffusion, train_vae

CONFIGS = Path(__file__).parent.parent.parent / "configs"
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


def test_fsdp_is_of_version_2_and_for_the_denoiser_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Accelerate has FSDP on GPUs alone: what it would say of itself there."""

    def launched(version: int) -> None:
        said = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=version == 2, num_processes=8)
        said.device, said.print = torch.device("cuda"), print
        monkeypatch.setattr("ldm_vae.runs.loop.Accelerator", lambda **_: said)

    config = replace(train_diffusion.PRESETS["tiny"][1], output=tmp_path, latents=tmp_path)
    launched(1)
    with pytest.raises(ConfigError, match=r"FSDP 1 cannot be used: launch with configs/fsdp_unet\.yaml"):
        start(config)
    launched(2)
    assert start(config)[1].is_fsdp2
    with pytest.raises(ConfigError, match="an autoencoder is not divided among processes"):
        train_vae.main(replace(train_vae.PRESETS["demo"][1], output=tmp_path, data=("procedural:shapes",)))


@pytest.mark.parametrize("trainer", [train_vae, train_codec, train_autoencoder, train_diffusion])
def test_a_trainer_has_36_flags_at_most(trainer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(trainer.PRESETS, description="", args=[next(iter(trainer.PRESETS)), "--help"])
    assert 20 < len(re.findall(r"^. --[a-z]", capsys.readouterr().out, flags=re.M)) <= 36
