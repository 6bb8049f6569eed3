"""The optimizer of a training: which parameters decay, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from edgepack.compress._tune import Tune

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def seed_of(*numbers: int) -> int:
    """One seed for PyTorch out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def rate_at(step: int, steps: int, settings: Tune) -> float:
    """Learning rate: a straight rise over the warm-up, then half a cosine to 0."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return settings.rate * (step + 1) / (warm + 1)
    return settings.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves: those that ask for it, all of a network where none does."""
    named = {name: value for name, value in module.named_parameters() if value.dtype.is_floating_point}
    return {name: value for name, value in named.items() if value.requires_grad} or named


def build(module: nn.Module, beside: nn.Module, settings: Tune) -> torch.optim.Optimizer:
    """The optimizer over the network and what is trained beside it."""
    weights = set(_multiplying(module)) | set(_multiplying(beside))
    moved = [*trained(module).values(), *beside.parameters()]
    groups = [
        {"params": [value for value in moved if value in weights], "weight_decay": settings.weight_decay},
        {"params": [value for value in moved if value not in weights], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.rate)
    nesterov = settings.momentum > 0
    return torch.optim.SGD(groups, lr=settings.rate, momentum=settings.momentum, nesterov=nesterov)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What an optimizer remembers, by ``parameter number/name``."""
    state: Mapping[int, Mapping[str, object]] = optimizer.state_dict()["state"]
    return {f"{number}/{name}": value for number, entry in state.items() for name, value in entry.items()
            if isinstance(value, torch.Tensor)}  # fmt: skip


def restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give an optimizer its memory back, laid out like its parameters so that it goes on bit by bit the same."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    for key, value in tensors.items():
        number, _, name = key.partition("/")
        parameter = parameters[int(number)]
        like = parameter.shape == value.shape
        optimizer.state[parameter][name] = torch.empty_like(parameter).copy_(value).detach() if like else value.clone()


def _multiplying(module: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of layers that multiply: matrices and kernels, also where a parametrization holds them."""
    for layer in module.modules():
        if isinstance(layer, NORMS):
            continue
        for name, value in layer.named_parameters(recurse=False):
            if value.dim() > 1 and (name.endswith("weight") or name.startswith("original")):
                yield value
