"""The one training loop: what every pass that trains offers as its ``tune`` table, and the one function it calls.

A pass writes ``tune: Tune | None = None`` among its options and, where its network is ready to be trained::

    return tune(module, task, run, self.tune, Hold(project=[mask]))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepack.contracts import Run
from edgepack.errors import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgepack.task import Task

OPTIMIZERS = {"sgd": 0.01, "adamw": 1e-3}  # with the learning rate that is used where none is given
NORMS = ("tune", "eval", "train")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Tune:
    """How to train a compressed network so that it regains what it lost.

    Attributes:
        epochs: times the training data are seen.
        lr: highest learning rate; it rises during ``warmup`` and falls to 0 as a cosine. None: 0.01 for ``sgd``,
            0.001 for ``adamw``.
        optimizer: ``sgd`` (Nesterov momentum) or ``adamw``.
        momentum: of ``sgd``.
        weight_decay: of weights that multiply; never of norms, biases and embeddings of positions.
        warmup: share of all steps.
        batch: samples per step.
        clip: largest norm of the gradient.
        teacher: ``original``: the network before the first pass. ``none``. Or another network: ``file.py:callable``,
            ``timm:NAME``, a ``.pt2`` …
        teacher_weights: of that other network: safetensors, or a .pt that holds tensors only.
        share: of the teacher in the loss, where there are labels too.
        temperature: at which the teacher's class probabilities are matched.
        features: names of layers whose results are matched as well; ``student=teacher`` where the names differ;
            ``auto`` pairs the last layers of the last two resolutions.
        feature_weight: of the feature losses, beside the rest.
        mixup: train on mixtures of two samples, in shares drawn from 0 to 1 anew for each step (H. Zhang et al.,
            arXiv:1710.09412), which few training data and a teacher are good for (L. Beyer et al., arXiv:2106.05237).
        labels: use the data's targets; without them only the teacher is followed.
        norms: batch norms ``tune`` (running statistics stay, merged with the layer before them in each step: the
            gradients of ``eval`` in less memory), ``eval``, or ``train`` (statistics of the batch).
        precision: of the arithmetic in training: ``float32``, or ``bfloat16`` for convolutions and matrix products,
            which is faster where the processor has it; weights, their updates, losses and scores stay float32.
        held_out: samples on which the best epoch is chosen, and as many others on which it is reported, out of the
            evaluation data, by the task's metric (else of the training data, by the loss); 0: the last epoch is taken.
        patience: stop after this many epochs without a better one; None: never.
        minutes: stop when they are over, with the best epoch so far; fewer epochs, all of them done, are better.
        seed: of the order of samples, augmentation, and whatever is random in the network.
    """

    epochs: int = 5
    lr: float | None = None
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.05
    batch: int = 64
    clip: float = 1.0
    teacher: str = "original"
    teacher_weights: str | None = None
    share: float = 0.9
    temperature: float = 4.0
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    mixup: bool = False
    labels: bool = True
    norms: str = "tune"
    precision: str = "float32"
    held_out: int = 1000
    patience: int | None = None
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, words in (("optimizer", tuple(OPTIMIZERS)), ("norms", NORMS), ("precision", PRECISIONS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is one of {', '.join(words)}, not {getattr(self, name)!r}; "
                                 f"{nearest(str(getattr(self, name)), words)}")  # fmt: skip
        for name, least in (("epochs", 1), ("batch", 1), ("held_out", 0), ("patience", 1), ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is a whole number from {least}, not {value}")
        for name in ("lr", "temperature", "clip", "minutes"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        for name, most in (("share", 1.0), ("warmup", 1.0), ("momentum", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is from 0 to 1, not {getattr(self, name)}")
        if self.weight_decay < 0 or self.feature_weight < 0:
            raise ValueError("weight_decay and feature_weight are not below 0")
        if isinstance(self.features, str) or not all(isinstance(name, str) and name for name in self.features):
            raise ValueError(f"features is a list of layer names, not {self.features!r}")
        object.__setattr__(self, "features", tuple(self.features))
        if self.teacher == "none" and (self.features or not self.labels):
            raise ValueError("without a teacher there must be labels and no features")
        if self.teacher_weights is not None and self.teacher in ("none", "original"):
            raise ValueError("teacher_weights are of a teacher that is another network")

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return OPTIMIZERS[self.optimizer] if self.lr is None else self.lr


@dataclass(frozen=True, kw_only=True)
class Hold:
    """What a pass asks of each step of its training.

    Attributes:
        project: called after each step, and before the first: put the weights back where they must be.
        losses: called in each step after the network: further terms of the loss, already weighted.
        schedule: called before each step with how far training has come, 0…1; 1.0 once at the very end.
        settled: progress from which the schedules stand still: only later epochs may be chosen.
        beside: a module trained along with the network and not part of it, such as learned scales. What is random in
            it must come from ``run.seed``, or a killed training cannot go on.
    """

    project: Sequence[Callable[[], None]] = ()
    losses: Sequence[Callable[[], Tensor]] = ()
    schedule: Sequence[Callable[[float], None]] = ()
    settled: float = 0.0
    beside: nn.Module | None = None

    def enforce(self, progress: float) -> None:
        """Bring the schedules to this point and the weights where they must be."""
        import torch

        with torch.no_grad():
            for advance in self.schedule:
                advance(progress)
            for project in self.project:
                project()


def tune(
    module: nn.Module, task: Task, run: Run, settings: Tune | None, hold: Hold | None = None, name: str = "tune"
) -> nn.Module:
    """Train ``module`` in place and return it, in inference mode.

    It is trained in the mode it is in: as it will be deployed, without dropout, unless the pass calls ``train()``.
    Without settings nothing is trained and only what ``hold`` asks is enforced. ``name`` is for a pass that trains
    several times: its checkpoints and its findings in the report are under it. A run that was killed goes on from the
    last epoch it finished, to the same weights.

    Raises:
        InputError: no training data; nothing to learn from; targets that do not fit; the loss is no longer finite.
    """
    hold = Hold() if hold is None else hold
    if settings is None:
        hold.enforce(1.0)
        return module.eval()
    from edgepack.compress._tune_loop import Training

    return Training(module, task, run, settings, hold, name).run_all()
