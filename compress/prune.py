"""Networks with fewer channels and attention heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgepack.compress._ratios import by_target, check_ratios
from edgepack.compress._tune import Tune
from edgepack.contracts import Pass, Run
from edgepack.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import nn

    from edgepack.task import Task

CRITERIA = ("taylor", "l1", "l2", "bn-scale")
BUDGETS = ("macs_ratio", "size_ratio", "latency_ratio")


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Remove channels and attention heads that matter least, and train what that loses back.

    ::

        conv 3×3, 64 → 64    becomes    conv 3×3, 64 → 40    and what reads it    conv 3×3, 40 → 64
        linear 192 → 768     becomes    linear 192 → 512     and what reads it    linear 512 → 192
        attention, 12 heads  becomes    attention, 8 heads

    Channels that are tied to one another (residual sums, concatenations, depthwise convolutions) go together. Only
    removals are made that are exact: the network computes what it computed with the weights of those channels at 0,
    which is tried for every group of channels. What cannot go so (the width of a network whose layer norms look at all
    channels together, such as a ViT's; outputs of the network) stays, and the report says why.

    Attributes:
        macs_ratio: multiply-accumulates over those of the network before; several budgets may be given, all are kept.
            One half if no budget is given.
        size_ratio: the same for parameters.
        latency_ratio: the same for measured latency, in every target; or a table target → ratio.
        criterion: what a channel is worth. ``taylor``: the expected square of what the outputs change by when it is
            taken out, to first order, on the task's data. ``l1``, ``l2``: magnitude of its weights, over the layer's
            mean. ``bn-scale``: |γ| of its batch norms. ``taylor`` if nothing is said and there are data, else ``l2``.
        reconstruct: solve the weights of layers that read fewer channels anew, by least squares, so that they give
            what they gave (He et al., arXiv:1707.06168); needs data. If nothing is said, where there are data.
        samples: of the training data, else of the calibration data, that ``taylor`` and ``reconstruct`` look at.
        multiple: channels stay in multiples of this, as processors like them; smaller ones keep more of the accuracy
            at as many multiply-accumulates, and less of the speed.
        least: smallest share of a layer's channels, or of its heads, that stays.
        layers: names of the only layers whose outputs become narrower, with ``*`` and ``?``; a name also covers what
            is inside it. Empty: all.
        leave: names of layers whose outputs stay as wide as they are.
        heads: remove attention heads too.
        targets: formats whose engines measure the network before and after; none: nothing is measured.
        tune: how to train afterwards; without it nothing is trained.
    """

    stage: ClassVar[int] = 20

    macs_ratio: float | None = None
    size_ratio: float | None = None
    latency_ratio: float | Mapping[str, float] | None = None
    criterion: str | None = None
    reconstruct: bool | None = None
    samples: int = 512
    multiple: int = 8
    least: float = 0.25
    layers: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    heads: bool = True
    targets: tuple[str, ...] = ("onnx",)
    tune: Tune | None = None

    def __post_init__(self) -> None:
        if self.criterion not in (None, *CRITERIA):
            raise ValueError(f"criterion is one of {', '.join(CRITERIA)}, not {self.criterion!r}; "
                             f"{nearest(str(self.criterion), CRITERIA)}")  # fmt: skip
        for name in ("layers", "leave", "targets"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) and item for item in value):
                raise ValueError(f"{name} is a list of names, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("multiple", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a whole number from 1, not {getattr(self, name)!r}")
        if not 0 <= self.least <= 1:
            raise ValueError(f"least is from 0 to 1, not {self.least!r}")
        self._check_budgets()

    def _check_budgets(self) -> None:
        check_ratios({name: getattr(self, name) for name in BUDGETS}, self.targets)
        if all(getattr(self, name) is None for name in BUDGETS):
            object.__setattr__(self, "macs_ratio", 0.5)

    def latency_limits(self) -> dict[str, float]:
        """The latency budget of each target that has one."""
        return by_target(self.latency_ratio, self.targets)

    def check(self, module: nn.Module, task: Task) -> None:
        """Refuse names that no layer has, a criterion without data, and training without data."""
        from edgepack.compress._graph import named

        paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
        for option in ("layers", "leave"):
            for pattern in getattr(self, option):
                if not any(named(path, [pattern]) for path in paths):
                    raise InputError(f"prune: {option}: no layer is called {pattern!r}", nearest(pattern, paths))
        if task.training is None and task.calibration is None:
            if self.criterion == "taylor":
                raise InputError("prune: criterion = 'taylor' looks at data, and the task has none",
                                 "add calibration = {data = …} to [task], or criterion = 'l2'")  # fmt: skip
            if self.reconstruct:
                raise InputError("prune: reconstruct looks at data, and the task has none",
                                 "add calibration = {data = …} to [task], or leave reconstruct out")  # fmt: skip
        if self.tune is not None and task.training is None:
            raise InputError("prune: tune: the task has no training data", "add training = {data = …} to [task]")

    def apply(self, module: nn.Module, task: Task, run: Run) -> nn.Module:
        from edgepack.compress._pruning import Pruning
        from edgepack.compress._tune import tune

        return tune(Pruning(self, task, run).run(module.eval()), task, run, self.tune)
