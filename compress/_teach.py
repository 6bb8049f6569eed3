"""What a teacher adds to the loss: its class probabilities, its outputs, and its inner results."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgepack import models
from edgepack.errors import InputError, nearest
from edgepack.graph import flatten

if TYPE_CHECKING:
    from edgepack.compress._tune import Tune
    from edgepack.contracts import Run
    from edgepack.task import Task


def teacher_of(settings: Tune, run: Run) -> nn.Module | None:
    """The network to follow: a copy that nothing else uses, frozen, in inference mode; None for none."""
    if settings.teacher == "none":
        return None
    if settings.teacher == "original":
        teacher = copy.deepcopy(run.original)
    else:
        teacher = models.load(settings.teacher, run.folder, settings.teacher_weights)
    return teacher.eval().requires_grad_(False)


def output_names(network: nn.Module, result: Any, task: Task) -> list[str]:
    """Names of the tensors of a network's result, as its graph calls them."""
    count = len(flatten(result))
    meta = getattr(network, "meta", None)
    lifted = list(meta.get("output_names", ())) if isinstance(meta, dict) else []
    keys = [str(key) for key in result] if isinstance(result, Mapping) else []
    plain = ["output"] if count == 1 else [f"output_{index}" for index in range(count)]
    return next(names for names in (list(task.output_names), lifted, keys, plain) if len(names) == count)


def output_index(names: Sequence[str], wanted: str | None, who: str) -> int:
    """Which output is meant, the first by default. Raises InputError where there is none of that name."""
    if wanted is not None and wanted not in names:
        raise InputError(f"{who}: no output {wanted!r}", nearest(wanted, names))
    return 0 if wanted is None else names.index(wanted)


def check_alike(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Raises InputError where a network cannot follow the teacher because their outputs differ in shape."""
    ours, theirs = ([tuple(one.shape) for one in outputs] for outputs in (student, teacher))
    if ours != theirs:
        raise InputError(f"tune: the teacher's outputs are {theirs}, the network's {ours}",
                         "take a teacher for the same task, or teacher = 'original'")  # fmt: skip


def matching(student: Sequence[Tensor], teacher: Sequence[Tensor], scores: int | None, temperature: float) -> Tensor:
    """How far the student's outputs are from the teacher's.

    ``scores`` is the index of the output that holds class scores (on axis 1), None where there is none: its
    probabilities are matched, all other outputs themselves.
    """
    terms = [torch.zeros(())]
    for index, (one, other) in enumerate(zip(student, teacher, strict=True)):
        if not one.is_floating_point():
            continue
        terms.append(divergence(one, other, temperature) if index == scores else distance(one, other))
    return torch.stack(terms).sum()


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(t/T) ‖ softmax(s/T)), mean over samples and positions (Hinton et al., arXiv:1503.02531)."""
    ours, theirs = (F.log_softmax(scores / temperature, dim=1) for scores in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1).mean()


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference, as a share of the teacher's mean square."""
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(torch.finfo(teacher.dtype).tiny)
