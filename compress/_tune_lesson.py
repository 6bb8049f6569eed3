"""What a network in training learns from: labels, a teacher's answers, a teacher's inner results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgepack.compress._teach import check_alike, matching, output_index, output_names
from edgepack.compress._teach_features import FeatureLoss, FeaturePair, Watch, pair_features
from edgepack.errors import InputError
from edgepack.graph import flatten
from edgepack.losses import Loss, classifies, loss_of

if TYPE_CHECKING:
    from edgepack.compress._tune_feed import Samples
    from edgepack.compress._tune_loop import Training
    from edgepack.compress._tune_norms import Pair


@dataclass(frozen=True)
class Lesson:
    """What the network learns from: the sum of the losses for some samples.

    Attributes:
        loss: of the labels, None where they are not used.
        output: index of the output that the loss reads.
        scores: index of the output that holds class scores, None where none does.
        features: feature losses; they and ``hold.beside`` are what is trained beside the network.
        watches: of the network's and the teacher's inner results, where features are matched.
    """

    training: Training
    teacher: nn.Module | None
    loss: Loss | None
    output: int
    scores: int | None
    features: FeatureLoss
    watches: tuple[Watch, ...]

    @classmethod
    def of(cls, training: Training, teacher: nn.Module | None, pairs: Sequence[Pair], first: Samples) -> Lesson:
        """``first`` are some samples to try it on.

        Raises:
            InputError: there is nothing to learn from, or a teacher, output or layer that does not fit.
        """
        module, task, inputs = training.module, training.task, first.inputs
        with torch.no_grad():
            result = module(*inputs)
            if teacher is not None:
                check_alike(flatten(result), flatten(teacher(*inputs)))
        loss = _label_loss(training, teacher, first)
        wanted = loss_of(task)
        output = output_index(output_names(module, result, task), wanted.output if wanted else None, "loss")
        found: list[FeaturePair] = []
        watches: tuple[Watch, ...] = ()
        if training.settings.features and teacher is not None:
            found = pair_features(training.settings.features, module, teacher, inputs, [pair.path for pair in pairs])
            ours, theirs = [pair.student for pair in found], [pair.teacher for pair in found]
            watches = (Watch(module, ours), Watch(teacher, theirs))
        return cls(training, teacher, loss, output, output if classifies(task) else None, FeatureLoss(found), watches)

    @cached_property
    def beside(self) -> nn.Module:
        """What is trained along and is no part of the network."""
        return nn.ModuleList([self.features, *([] if (own := self.training.hold.beside) is None else [own])])

    def close(self) -> None:
        for watch in self.watches:
            watch.close()

    def plain(self, samples: Samples) -> Tensor:
        """The loss of the outputs alone: labels and teacher."""
        settings = self.training.settings
        learning = torch.is_grad_enabled()
        outputs = self._outputs(self.training.module, samples, learning)
        share = 0.0 if self.teacher is None else settings.share if self.loss is not None else 1.0
        total = torch.zeros(())
        if self.loss is not None and share < 1:
            total = total + (1 - share) * self._labels(self.loss, outputs[self.output], samples)
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self._outputs(self.teacher, samples, learning)
            total = total + share * matching(outputs, wanted, self.scores, settings.temperature)
        return total

    @staticmethod
    def _labels(loss: Loss, output: Tensor, samples: Samples) -> Tensor:
        assert samples.targets is not None
        first = loss(output, samples.targets)
        return first if samples.others is None else torch.lerp(loss(output, samples.others), first, samples.share)

    def _outputs(self, network: nn.Module, samples: Samples, learning: bool) -> list[Tensor]:
        with _bfloat16() if learning and self.training.settings.precision == "bfloat16" else nullcontext():
            outputs = flatten(network(*samples.inputs))
        return [one.float() if one.dtype == torch.bfloat16 else one for one in outputs]

    def whole(self, samples: Samples) -> Tensor:
        """Everything that a step makes smaller."""
        total = self.plain(samples)
        if self.watches:
            ours, theirs = (watch.seen for watch in self.watches)
            total = total + self.training.settings.feature_weight * self.features(ours, theirs)
        for term in self.training.hold.losses:
            total = total + term()
        return total


@contextmanager
def _bfloat16() -> Iterator[None]:
    """Convolutions and products in bfloat16; attention as plain products, as its fused backward pass is slow there."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def _label_loss(training: Training, teacher: nn.Module | None, first: Samples) -> Loss | None:
    if not training.settings.labels:
        return None
    loss = loss_of(training.task)
    if loss is not None and first.targets is not None:
        return loss
    why = "the task names no loss" if loss is None else "the training data have no targets"
    if teacher is None:
        raise InputError(f"{training.name}: without a teacher there is nothing to learn from: {why}",
                         "give loss = … and targets, or leave teacher = 'none' out")  # fmt: skip
    training.run.note(f"{training.name}: without labels: {why}")
    return None
