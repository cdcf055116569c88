"""Training state as a flat dictionary of tensors and back, so that a checkpoint needs no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm_vae.runs.sharding import is_sharded, put, whole

Part: TypeAlias = nn.Module | torch.optim.Optimizer | EMAModel | Tensor


def state_tensors(parts: Mapping[str, Part], *, keep: bool = True) -> dict[str, Tensor]:
    """Modules, optimizers, EMA models and plain tensors as one flat dictionary, `part/key`.

    Learning rates and the like are left out: they are functions of the configuration and the step. Where parameters
    are sharded, all processes call this; those that do not `keep` the tensors get none.
    """
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        for key, tensor in part_tensors(part).items():
            full = whole(tensor)
            if keep:
                tensors[f"{name}/{key}"] = full if full is tensor else full.cpu()
    return tensors


def part_tensors(part: Part) -> dict[str, Tensor]:
    if isinstance(part, nn.Module):
        return dict(part.state_dict())
    if isinstance(part, torch.optim.Optimizer):
        state = part.state_dict()["state"]
        return {f"{index}/{key}": value for index, entries in state.items() for key, value in entries.items()}
    if isinstance(part, EMAModel):
        shadow = {f"shadow/{i}": p for i, p in enumerate(part.shadow_params)}
        return {**shadow, "optimization_step": torch.tensor(part.optimization_step)}
    return {"value": part}


def load_state(parts: Mapping[str, Part], tensors: Mapping[str, Tensor]) -> None:
    """Restores what `state_tensors` gave, in place."""
    for name, part in parts.items():
        own = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
        if isinstance(part, nn.Module) and is_sharded(part):
            for key, target in part.state_dict().items():
                put(target, own[key])
        elif isinstance(part, nn.Module):
            part.load_state_dict(own)
        elif isinstance(part, torch.optim.Optimizer):
            load_optimizer(part, own)
        elif isinstance(part, EMAModel):
            part.optimization_step = int(own["optimization_step"])
            for i, shadow in enumerate(part.shadow_params):
                put(shadow.data, own[f"shadow/{i}"])
        else:
            part.data.copy_(own["value"])


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape and key != "step":
            target = torch.empty_like(parameter)  # in the parameter's memory layout and sharding
            put(target, tensor)
            tensor = target
        elif optimizer.defaults.get("fused"):
            tensor = tensor.to(parameter.device)
        optimizer.state[parameter][key] = tensor
