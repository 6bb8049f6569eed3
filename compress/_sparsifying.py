"""The steps of ``sparsify``: find the layers, score their weights, choose, make good, hold while training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgepack.compress._allocation import ERK, GLOBAL, by_shape, by_threshold, evenly
from edgepack.compress._eliminate import eliminate
from edgepack.compress._filters import rows_of
from edgepack.compress._graph import GraphView
from edgepack.compress._masks import plan_masks
from edgepack.compress._patterns import Pattern
from edgepack.compress._permute import LARGEST, best_order, chain_before
from edgepack.compress._response import moments
from edgepack.compress._sparse_layers import Sparse, find, second_moments
from edgepack.compress._tune import Hold, tune
from edgepack.errors import Unsupported, counted

if TYPE_CHECKING:
    from edgepack.compress.sparsify import Sparsify
    from edgepack.contracts import Run
    from edgepack.task import Task

SETTLED = 0.7  # of the training: from then on the masks stay
STAIRS = 100  # times that a growing mask is chosen again


@dataclass(eq=False)
class Sparsifying:
    """One run of the pass."""

    options: Sparsify
    task: Task
    run_: Run
    layers: list[Sparse] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    masks: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # of the weights' shapes, 1 or 0

    def run(self, module: nn.Module) -> nn.Module:
        view = GraphView.of(module, self.task)
        self.layers, self.left = find(view, self.pattern, self.options.layers)
        if not self.layers:
            why = next((f" ({path}: {reason})" for path, reason in self.left.items()), "")
            raise Unsupported(f"sparsify: {type(module).__name__} has no layer for {self.options.pattern}{why}")
        self._look(module)
        if self.options.permute and 0 < self.pattern.of <= LARGEST:
            self._permute(view)
        if self.options.schedule == "one-shot":
            self._at_once()
        with self._held() as hold:
            module = tune(module, self.task, self.run_, self.options.tune, hold)
        plan_masks(self.run_.plan, GraphView.of(module, self.task), self.masks)
        self._say()
        if filters := list(rows_of(module, self.run_.original)):
            self.run_.record("filters", {"rows": filters})
        return module

    @cached_property
    def pattern(self) -> Pattern:
        return Pattern.read(self.options.pattern)

    def _look(self, module: nn.Module) -> None:
        """Find out what weights are worth."""
        seen: dict[nn.Module, Tensor] = {}
        aware = self.options.method == "data-aware"
        if aware:
            seen = moments(module, self.task, list(second_moments(self.layers).values()), self.options.samples)
        for one in self.layers:
            one.look(seen.get(one.layer), relative=aware)

    def _permute(self, view: GraphView) -> None:
        """Exchange input channels where another layer can make them in another order."""
        gains = []
        step = self.run_.progress("exchanging channels", len(self.layers))
        for one in self.layers:
            chain = chain_before(view, one.layer)
            if chain is not None:
                channels = one.weight.shape[1]
                scores = one.scores().reshape(-1, channels)
                order = best_order(scores, self.pattern.kept, self.pattern.of)
                gains.append(kept(scores[:, order], self.pattern) / kept(scores, self.pattern) - 1)
                chain.permute(order)
                one.exchange(order)
            step(1)
        if gains:
            self.run_.note(f"exchanged input channels of {counted(len(gains), 'layer')}, whose {self.options.pattern} "
                           f"groups then keep {sum(gains) / len(gains):.1%} more on average")  # fmt: skip

    def _say(self) -> None:
        rows = [{"layer": one.path, "weights": one.weight.numel(), "zeros": int((one.weight == 0).sum())}
                for one in self.layers]  # fmt: skip
        zeros, weights = (sum(row[name] for row in rows) for name in ("zeros", "weights"))  # type: ignore[misc]
        self.run_.note(f"{zeros} of {weights} weights are 0 ({zeros / weights:.1%}) in {counted(len(rows), 'layer')}; "
                       f"left dense: {counted(len(self.left), 'layer')}")  # fmt: skip
        self.run_.record("sparsity", {"pattern": self.options.pattern, "layers": rows, "dense": self.left})

    def _at_once(self) -> None:
        """Choose what goes, and let what stays make up for it."""
        step = self.run_.progress("making weights zero", len(self.layers))
        for one, kept in zip(self.layers, self._choose(self.options.share), strict=True):
            with torch.no_grad():
                if one.moments is not None:
                    found, kept = eliminate(one.matrix(one.weight), kept, one.moments, self.pattern)
                    one.weight.copy_(one.shaped(found))
                self.masks[one.weight] = one.shaped(kept).to(one.weight.dtype)
                one.weight.mul_(self.masks[one.weight])
            step(1)

    def _choose(self, share: float) -> list[Tensor]:
        """What stays of each layer, (groups, rows, columns), when this share of all goes."""
        scores = [one.scores() for one in self.layers]
        units = [self.pattern.units(score) for score in scores]
        sizes = [unit.numel() for unit in units]
        if self.pattern.of:
            zeros = [0] * len(sizes)
        elif self.options.allocation == GLOBAL:
            zeros = by_threshold(units, share)
        elif self.options.allocation == ERK:
            zeros = by_shape(sizes, [one.weight.shape for one in self.layers], share)
        else:
            zeros = evenly(sizes, share)
        rows = self.pattern.rows
        return [self.pattern.lowest(score, count * rows) for score, count in zip(scores, zeros, strict=True)]

    @contextmanager
    def _held(self) -> Iterator[Hold]:
        """What keeps the zeros while training; masked weights have no gradients either, nor a share in their norm."""
        gradual = self.options.schedule == "gradual"

        def project() -> None:
            for weight, mask in self.masks.items():
                weight.mul_(mask)

        def masked(weight: nn.Parameter) -> Callable[[Tensor], Tensor]:
            return lambda slope: slope * self.masks[weight] if weight in self.masks else slope

        asked = [one.weight.requires_grad for one in self.layers]
        for one in self.layers:
            one.weight.requires_grad_(True)
        hooks = [one.weight.register_hook(masked(one.weight)) for one in self.layers]  # type: ignore[no-untyped-call]
        try:
            yield Hold(
                project=[project], schedule=[Stairs(self)] if gradual else [], settled=SETTLED if gradual else 0.0
            )
        finally:
            for hook in hooks:
                hook.remove()
            for one, before in zip(self.layers, asked, strict=True):
                one.weight.requires_grad_(before)

    def grow(self, share: float) -> None:
        """Masks for this share of zeros, by what the weights are worth now; what is zero stays zero."""
        for one, kept in zip(self.layers, self._choose(share), strict=True):
            self.masks[one.weight] = one.shaped(kept).to(one.weight.dtype)


@dataclass(eq=False)
class Stairs:
    """A schedule: the share of zeros rises as a cubic, fast at first.

    After M. Zhu and S. Gupta, "To prune, or not to prune" (arXiv:1710.01878). A mask follows from the weights alone, so
    that a training that was killed goes on to the same masks.
    """

    owner: Sparsifying
    step: int = -1

    def __call__(self, progress: float) -> None:
        step = round(STAIRS * min(progress / SETTLED, 1.0))
        if step != self.step:
            self.step = step
            self.owner.grow(share_at(step / STAIRS, self.owner.options.share))


def kept(scores: Tensor, pattern: Pattern) -> float:
    """Sum of what a pattern N:M keeps."""
    return float(scores.reshape(len(scores), -1, pattern.of).topk(pattern.kept, -1).values.sum())


def share_at(progress: float, final: float) -> float:
    """Of zeros, when the growth has come this far (0…1)."""
    return final * (1 - (1 - progress) ** 3)
