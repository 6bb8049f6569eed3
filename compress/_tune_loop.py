"""One training from beginning to end: what is set up around the epochs, and taken down again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from edgepack.compress._graph import GraphView
from edgepack.compress._teach import teacher_of
from edgepack.compress._tune_epochs import Epochs
from edgepack.compress._tune_feed import Feed, batch_size, channels_last, training_data
from edgepack.compress._tune_lesson import Lesson
from edgepack.compress._tune_norms import Pair, pairs_of, tuned
from edgepack.compress._tune_steps import seed_of, trained
from edgepack.errors import EdgepackError

if TYPE_CHECKING:
    from edgepack.compress._tune import Hold, Tune
    from edgepack.contracts import Run
    from edgepack.task import Task


@dataclass(frozen=True)
class Training:
    """One training: what it is about. ``run_all`` does it."""

    module: nn.Module
    task: Task
    run: Run
    settings: Tune
    hold: Hold
    name: str

    def run_all(self) -> nn.Module:
        data = training_data(self.task)
        feed = Feed(self.task, data, np.arange(len(data)), batch_size(self.task, self.settings.batch), self._seeds)
        first = feed.tensors(next(iter(data.take(range(min(feed.size, len(data)))))))
        self.hold.enforce(0.0)
        teacher = teacher_of(self.settings, self.run)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(seed_of(*self._seeds))
            pairs = stack.enter_context(self._norms())
            networks = [self.module] if teacher is None else [self.module, teacher]
            feed = replace(feed, last=stack.enter_context(channels_last(networks, first.inputs)))
            lesson = Lesson.of(self, teacher, pairs, first)
            stack.callback(lesson.close)
            stack.enter_context(_moving(self.module))
            Epochs(self, lesson, feed).run_all()
        return self.module.eval()

    @property
    def _seeds(self) -> tuple[int, int]:
        return self.run.seed, self.settings.seed

    @contextmanager
    def _norms(self) -> Iterator[list[Pair]]:
        """Batch norms in the mode that the settings say, for a while."""
        norms = [layer for layer in self.module.modules() if isinstance(layer, _NormBase)]
        pairs: list[Pair] = []
        modes = [(layer, layer.training) for layer in self.module.modules()]
        if norms and self.settings.norms == "tune":
            try:
                pairs = pairs_of(GraphView.of(self.module, self.task))
            except EdgepackError as error:
                self.run.note(f"{self.name}: batch norms are trained apart from their layers: {error.message}")
        for layer, training in modes:
            layer.training = training
        for norm in norms:
            norm.train(self.settings.norms == "train")
        with tuned(pairs):
            yield pairs


@contextmanager
def _moving(module: nn.Module) -> Iterator[None]:
    """Let the parameters that are trained have gradients, and only them; afterwards as before."""
    asked = {value: value.requires_grad for value in module.parameters()}
    for value in trained(module).values():
        value.requires_grad_(True)
    try:
        yield
    finally:
        for value, before in asked.items():
            value.requires_grad_(before)
            value.grad = None
