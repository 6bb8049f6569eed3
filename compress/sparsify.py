"""Weights that are zero, in a pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgepack.compress._tune import Tune
from edgepack.contracts import Pass, Run
from edgepack.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import nn

    from edgepack.task import Task

METHODS = ("data-aware", "magnitude")
ALLOCATIONS = ("global", "layerwise", "erk")
SCHEDULES = ("one-shot", "gradual")
SHARE = 0.5  # where nothing is said


@dataclass(frozen=True, kw_only=True)
class Sparsify(Pass):
    """Make weights of convolutions and linear layers zero, move the others so that little is lost, and keep it so.

    ::

        conv 3×3, 64 → 64, 36,864 weights      becomes      the same layer, 29,491 of its weights 0       (sparsity 0.8)

    What is zero stays zero through training, rounding and every export; the masks are in the plan. Whether anything
    gets smaller or faster is up to the format and the engine: the report says so for each.

    Attributes:
        sparsity: share of zeros in the layers that get any; 0.5 if nothing is said. N:M has its own.
        pattern: ``unstructured``; ``N:M``: of M neighbouring input channels N stay, such as ``2:4`` for NVIDIA's sparse
            tensor cores; ``1xN``: N neighbouring output channels are zero together, for sparse kernels: ``1x4`` in C,
            ``1x2`` for XNNPACK on 64-bit ARM (docs/sparsify.md).
        allocation: which layers get how many: ``global``: one threshold for all, no layer loses more than 95 %;
            ``layerwise``: all the same; ``erk``: fewer where a layer has few weights per channel.
        method: ``data-aware``: what a weight is worth, and how the others make up for it, follows from what the layer
            reads on the calibration data. ``magnitude``: the smallest go and the others stay as they are.
        samples: of the calibration data, for that.
        schedule: ``one-shot``, before training if there is any. ``gradual``: while training, as a cubic, by what the
            weights are worth then; settled after 70 % of it. Better where nearly all are to go (docs/sparsify.md).
        permute: with ``N:M``: exchange channels between layers first, where that changes nothing, so that more stays.
        layers: names of layers that get zeros, with ``*`` and ``?``; a name also covers what is inside it. Empty: every
            convolution and linear layer but depthwise ones, those that read an input of the network and those that
            give an output.
        tune: how to train afterwards, or meanwhile; without it nothing is trained.
    """

    stage: ClassVar[int] = 30

    sparsity: float | None = None
    pattern: str = "unstructured"
    allocation: str = "erk"
    method: str = "data-aware"
    samples: int = 256
    schedule: str = "one-shot"
    permute: bool = True
    layers: tuple[str, ...] = ()
    tune: Tune | None = None

    def __post_init__(self) -> None:
        from edgepack.compress._patterns import Pattern

        fixed = Pattern.read(self.pattern).sparsity
        for name, words in (("allocation", ALLOCATIONS), ("method", METHODS), ("schedule", SCHEDULES)):
            if (value := getattr(self, name)) not in words:
                raise ValueError(f"{name} is one of {', '.join(words)}, not {value!r}; {nearest(str(value), words)}")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity is above 0 and below 1, not {self.sparsity!r}")
        if fixed is not None and self.sparsity not in (None, fixed):
            raise ValueError(
                f"pattern = {self.pattern!r} has a sparsity of {fixed:g}; leave sparsity = {self.sparsity!r} out"
            )
        if self.samples < 1:
            raise ValueError(f"samples is a whole number from 1, not {self.samples!r}")
        if self.schedule == "gradual" and fixed is not None:
            raise ValueError(f"schedule = 'gradual' is for sparsity that can grow; {self.pattern!r} cannot")
        if self.schedule == "gradual" and self.tune is None:
            raise ValueError("schedule = 'gradual' makes weights zero while training: add a table tune")
        if isinstance(self.layers, str) or not all(isinstance(name, str) and name for name in self.layers):
            raise ValueError(f"layers is a list of layer names or patterns, not {self.layers!r}")
        object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def share(self) -> float:
        """Of zeros, also where nothing was said."""
        from edgepack.compress._patterns import Pattern

        fixed = Pattern.read(self.pattern).sparsity
        return fixed if fixed is not None else SHARE if self.sparsity is None else self.sparsity

    def check(self, module: nn.Module, task: Task) -> None:
        """Refuse a name in ``layers`` that no layer has, and a task without the data it takes."""
        from edgepack.compress._graph import named
        from edgepack.compress._tune_feed import training_data

        paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
        for pattern in self.layers:
            if not any(named(path, [pattern]) for path in paths):
                raise InputError(f"sparsify: layers: no layer is called {pattern!r}", nearest(pattern, paths))
        if self.method == "data-aware" and task.calibration is None:
            raise InputError("sparsify: the task has no calibration data",
                             "add calibration = {data = …} to [task], or take method = 'magnitude'")  # fmt: skip
        if self.tune is not None:
            training_data(task)

    def apply(self, module: nn.Module, task: Task, run: Run) -> nn.Module:
        from edgepack.compress._sparsifying import Sparsifying

        return Sparsifying(self, task, run).run(module.eval())
