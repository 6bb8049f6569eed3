"""What training makes small: (outputs, targets) → one number with a gradient. Named as metrics are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack import usercode
from edgepack.errors import InputError, nearest
from edgepack.metrics import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

    from edgepack.task import Task

IMPLIED = {
    "top1": "cross_entropy",
    "top5": "cross_entropy",
    "mean_iou": "cross_entropy",
    "psnr": "mse",
    "psnr_y": "mse",
    "rmse": "mse",
}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One training loss.

    Attributes:
        name: as the recipe calls it.
        compute: (outputs, targets) → their mean loss, differentiable; call the loss itself, which checks.
        classifies: the outputs are scores of classes (on axis 1), so that a teacher's probabilities can be matched.
        output: the output that is trained, the first by default.
    """

    name: str
    compute: Callable[[Tensor, Tensor], Tensor]
    classifies: bool = False
    output: str | None = None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Raises InputError where outputs and targets do not fit the loss."""
        with usercode.blaming(f"loss {self.name} of outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}"):
            found = self.compute(outputs, targets)
        if getattr(found, "shape", None) != ():
            raise InputError(f"loss {self.name}: gives {type(found).__name__} {getattr(found, 'shape', '')}, "
                             "expected a tensor with one number")  # fmt: skip
        return found


def find(spec: str | Mapping[str, Any], folder: Path) -> Loss:
    """The loss a recipe names: a word, ``file.py:callable``, or a table with ``use`` and options.

    A callable takes (outputs, targets) as tensors and returns a tensor with one number; its table may say
    ``classifies``. Every table may say ``output``.

    Raises:
        InputError: no such loss or option, with the nearest.
    """
    options = {"use": spec} if isinstance(spec, str) else dict(spec)
    use, output = str(options.pop("use", "")), options.pop("output", None)
    code = usercode.is_source(use)
    if not code and use not in LOSSES:
        raise InputError(f"there is no loss {use!r}", nearest(use, LOSSES))
    known = ("classifies",) if code else LOSSES[use][1]
    for key, value in options.items():
        if key not in known:
            raise InputError(f"loss {use}: unknown option {key!r}", nearest(key, (*known, "output")))
        if not code and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise InputError(f"loss {use}: {key} is a number, not {value!r}")
    if code:
        return Loss(name=use, compute=usercode.load(use, folder), output=output, **options)
    compute = partial(LOSSES[use][0], **options)
    return Loss(name=use, compute=compute, classifies=use == "cross_entropy", output=output)


def loss_of(task: Task) -> Loss | None:
    """The task's loss, else the one its metric implies, on the same output; None where nothing is implied."""
    if task.loss is not None or task.metric is None or task.metric.name not in IMPLIED:
        return task.loss
    return find({"use": IMPLIED[task.metric.name], "output": task.metric.output}, Path())


def classifies(task: Task) -> bool:
    """Whether the outputs are scores of classes, as far as loss and metric tell."""
    loss = loss_of(task)
    return loss.classifies if loss is not None else task.metric is not None and task.metric.name == "agreement"


def cross_entropy(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0, ignore: int = IGNORED) -> Tensor:
    """Of class scores (N, classes, …) and integer classes (N, …); targets equal to ``ignore`` do not count."""
    from torch.nn import functional

    labels = targets.long()
    if labels.dim() == outputs.dim():  # (N, 1)
        labels = labels.squeeze(1)
    counted = labels[labels != ignore]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < outputs.shape[1]:
        raise ValueError(f"labels reach from {int(counted.min())} to {int(counted.max())}, the output has "
                         f"{outputs.shape[1]} classes")  # fmt: skip
    return functional.cross_entropy(outputs, labels, ignore_index=ignore, label_smoothing=label_smoothing)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error."""
    return (outputs - _like(outputs, targets)).square().mean()


def l1(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error."""
    return (outputs - _like(outputs, targets)).abs().mean()


def smooth_l1(outputs: Tensor, targets: Tensor, beta: float = 1.0) -> Tensor:
    """Squared error below ``beta``, absolute error above it."""
    from torch.nn import functional

    return functional.smooth_l1_loss(outputs, _like(outputs, targets), beta=beta)


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each score (before the sigmoid) and its 0…1 target."""
    from torch.nn import functional

    return functional.binary_cross_entropy_with_logits(outputs, _like(outputs, targets))


def _like(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.shape != targets.shape:
        raise ValueError("outputs and targets differ in shape")
    return targets.to(outputs.dtype)


LOSSES: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "cross_entropy": (cross_entropy, ("label_smoothing", "ignore")),
    "mse": (mse, ()),
    "l1": (l1, ()),
    "smooth_l1": (smooth_l1, ("beta",)),
    "bce": (bce, ()),
}
