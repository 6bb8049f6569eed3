"""Pruned networks beside the originals with the same channels silenced where they are read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgepack.compress._channels import Survey
from edgepack.compress._cutting import IN, Group, depthwise, union
from edgepack.compress._heads import rewrite
from edgepack.compress.prune import Prune
from edgepack.compressing import PassRun
from edgepack.data import Arrays
from edgepack.graph import flatten
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Input, Task
from edgepack.tracing import example_inputs

ITEM = Input("x", (1, 3, 12, 12))
TASK = Task((ITEM,))
ONE = torch.zeros(1, 3, 12, 12)


class Residual(nn.Module):
    """A stem, a block with a shortcut and a depthwise layer, two branches side by side, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide, self.deep = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.thin = nn.Conv2d(32, 16, 1)
        self.left, self.right = nn.Conv2d(16, 16, 3, 2), nn.Conv2d(16, 24, 3, 2)
        self.act, self.out = nn.PReLU(40), nn.Linear(40 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.thin(torch.relu(self.deep(self.wide(x))))
        x = self.act(torch.cat([self.left(x), self.right(x)], 1))
        return self.out(torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return shaken(Residual())


def data(count: int = 64) -> Arrays:
    random = np.random.default_rng(0)
    return Arrays(
        (ITEM,), {"x": random.normal(size=(count, 12, 12, 3)).astype(np.float32)}, random.integers(0, 5, count)
    )


def prune(module: nn.Module, folder: Path, task: Task, **options: Any) -> tuple[nn.Module, PassRun]:
    """The pass on a copy, nothing measured unless ``targets`` says so."""
    run = PassRun(folder, 0, Plan(), Silent(), module, task)
    item, copied = Prune(**{"targets": (), **options}), copy.deepcopy(module)
    item.check(copied, task)
    return item.apply(copied, task, run), run


def rows(run: PassRun) -> dict[str, dict[str, Any]]:
    return {row["layer"]: row for row in run.findings["channels"]["layers"]}


def gap(before: nn.Module, after: nn.Module, run: PassRun, task: Task) -> float:
    """Largest difference on fresh inputs, over the largest value, where the original reads zeros for what went."""
    inputs = example_inputs(task.specs)
    whole = copy.deepcopy(before)
    rewrite(whole, inputs)
    groups = {group.name: group for group in Survey(whole, inputs, (), (), True).run().groups}
    gone = union(groups[name].cut(row["gone"]) for name, row in rows(run).items())
    silent = {path: sorted(channels) for (path, what), channels in gone.items() if what == IN}
    torch.manual_seed(1)
    fresh = [torch.randn_like(one) if one.is_floating_point() else one for one in inputs]
    with torch.no_grad(), silenced(whole, silent):
        wanted, found = flatten(whole(*fresh)), flatten(after(*fresh))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@contextmanager
def silenced(module: nn.Module, channels: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Let layers read zeros in place of some channels."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        axis = -1 if isinstance(layer, nn.Linear) else 1
        return (inputs[0].index_fill(axis, torch.tensor(wanted[layer]), 0.0), *inputs[1:])

    wanted = {module.get_submodule(path): own for path, own in channels.items()}
    hooks = [layer.register_forward_pre_hook(hook) for layer in wanted if not depthwise(layer)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def shaken(module: nn.Module) -> nn.Module:
    """Random statistics and biases, which hide nothing as those of a new network do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith(("running_mean", "bias")):
                value.normal_(0, 0.2, generator=generator)
            elif name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
                value.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith(("gamma", "layer_scale", "pos_embed", "pos_embedding", "token")):
                value.normal_(0, 1, generator=generator)
    return module.eval()


def groups_of(module: nn.Module) -> list[Group]:
    return Survey(module, (torch.randn(2, 3, 12, 12),), (), (), True).run().groups
