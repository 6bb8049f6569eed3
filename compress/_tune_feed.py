"""Training samples as tensors: in an order drawn anew for each epoch, varied as the task says, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from edgepack.augment import augmented, words_of
from edgepack.data import Batch
from edgepack.errors import InputError, Unsupported

if TYPE_CHECKING:
    from edgepack.data import Data
    from edgepack.task import Task


@dataclass(frozen=True)
class Samples:
    """Samples of one size as a network takes them; targets as the data give them.

    Attributes:
        others: targets of the samples that are mixed into these, None where none are.
        share: of the first ones in a mixture.
    """

    inputs: list[Tensor]
    targets: Tensor | None
    count: int
    others: Tensor | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Feed:
    """What a training sees.

    Attributes:
        data: of the task.
        rows: those of its samples that are trained on.
        size: samples per step.
        seeds: what every random choice depends on, with the number of the epoch.
        last: whether images are laid out channels last.
    """

    task: Task
    data: Data
    rows: np.ndarray[tuple[int], np.dtype[np.int64]]
    size: int
    seeds: tuple[int, ...]
    last: bool = False

    @property
    def steps(self) -> int:
        """Per epoch; what does not fill a step waits for another epoch."""
        return max(1, len(self.rows) // self.size)

    def epoch(self, number: int) -> Iterator[list[Samples]]:
        """The steps of an epoch, each as samples of one size or several."""
        random = np.random.default_rng([*self.seeds, number])
        order = random.permutation(self.rows)
        words = words_of(self.task.augment)
        for step in range(self.steps):
            chosen = order[step * self.size : (step + 1) * self.size]
            parts = [augmented(part, words, self.task.inputs, random) for part in self.data.take(chosen.tolist())]
            yield [self.tensors(part) for part in self._joined(parts)]

    def tensors(self, batch: Batch) -> Samples:
        inputs = [torch.from_numpy(np.ascontiguousarray(batch.inputs[item.name])) for item in self.task.inputs]
        targets = None if batch.targets is None else torch.from_numpy(np.ascontiguousarray(batch.targets))
        return Samples([laid_out(one) for one in inputs] if self.last else inputs, targets, len(batch))

    def mixed(self, samples: Samples) -> Samples:
        """Each with another of them mixed in, all in one share that is drawn evenly from 0 to 1.

        Raises:
            InputError: an input is no image or signal but numbers of things, which cannot be mixed.
        """
        if not all(one.is_floating_point() for one in samples.inputs):
            raise InputError("tune: mixup: an input holds whole numbers, which cannot be mixed", "leave mixup out")
        share, order = float(torch.rand(())), torch.randperm(samples.count)
        inputs = [torch.lerp(one.index_select(item.batch_axis, order), one, share)
                  for item, one in zip(self.task.inputs, samples.inputs, strict=True)]  # fmt: skip
        others = None if samples.targets is None else samples.targets[order]
        inputs = [laid_out(one) for one in inputs] if self.last else inputs
        return Samples(inputs, samples.targets, samples.count, others, share)

    def _joined(self, parts: list[Batch]) -> list[Batch]:
        """One batch where cropping has made all samples equal."""
        if len(parts) == 1 or len({_shapes(part) for part in parts}) > 1:
            return parts
        inputs = {item.name: np.concatenate([part.inputs[item.name] for part in parts], axis=item.batch_axis)
                  for item in self.task.inputs}  # fmt: skip
        raw = {item.name: inputs[item.name] for item in self.task.inputs}
        targets = [part.targets for part in parts if part.targets is not None]
        return [Batch(inputs, raw, np.concatenate(targets) if targets else None)]


def batch_size(task: Task, wanted: int) -> int:
    """Samples per step: as wanted, unless the network takes exactly some number. Raises Unsupported."""
    for item in task.inputs:
        if item.whole:
            raise Unsupported(f"tune: input {item.name!r} {list(item.shape)} has no batch axis", "tune is for batches")
    return next((item.rows for item in task.inputs if item.rows > 1), wanted)


def looked_at(task: Task) -> Data | None:
    """What a pass looks at that does not train: the training data, else the calibration data, None without either."""
    return task.training if task.training is not None else task.calibration


def drawn(task: Task, data: Data, count: int, seed: int, size: int) -> Iterator[Samples]:
    """Some samples of ``data``, at random, ``size`` at a time and as they are."""
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].numpy()
    feed, step = Feed(task, data, rows, size, (seed,)), batch_size(task, size)
    for start in range(0, len(rows), step):
        for batch in data.take(rows[start : start + step].tolist()):
            yield feed.tensors(batch)


def training_data(task: Task) -> Data:
    """Raises InputError where the task has none."""
    if task.training is None or not len(task.training):
        raise InputError("tune: the task has no training data", "add training = {data = …} to [task]")
    return task.training


def laid_out(tensor: Tensor) -> Tensor:
    """An image with its channels last in memory; anything else as it is."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


@contextmanager
def channels_last(networks: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Iterator[bool]:
    """Lay out the weights of convolutional networks so that they compute faster, if all of them bear it.

    Numbers change by rounding only. A network that views the memory of an image as a vector does not bear it.
    """
    wanted = any(isinstance(layer, nn.Conv2d) for network in networks for layer in network.modules())
    fits = wanted and all(_bears(network, [laid_out(one) for one in inputs]) for network in networks)
    for network in networks if fits else ():
        _lay_out(network, torch.channels_last)
    try:
        yield fits
    finally:
        for network in networks if fits else ():
            _lay_out(network, torch.contiguous_format)


def _bears(network: nn.Module, inputs: Sequence[Tensor]) -> bool:
    _lay_out(network, torch.channels_last)
    try:
        with torch.no_grad():
            network(*inputs)
    except RuntimeError:
        return False
    finally:
        _lay_out(network, torch.contiguous_format)
    return True


def _lay_out(network: nn.Module, form: torch.memory_format) -> None:
    network.to(memory_format=form)  # type: ignore[call-overload]


def _shapes(batch: Batch) -> tuple[tuple[int, ...], ...]:
    targets = () if batch.targets is None else batch.targets.shape[1:]
    return (*(array.shape[1:] for array in batch.inputs.values()), targets)
