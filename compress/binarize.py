"""Binary layers: ±1 weights on ±1 inputs, trained so that a spanning tree of their channels is short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgepack.compress._tune import Tune
from edgepack.contracts import Pass, Run
from edgepack.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import nn

    from edgepack.task import Task

PULLS = ("tree", "centre", "none")


@dataclass(frozen=True, kw_only=True)
class Binarize(Pass):
    """Give convolutions and linear layers ±1 weights and ±1 inputs, and train the network again.

    ::

        conv → norm → relu      becomes   sign → ±1 conv → scale (+ what sign read) → norm → relu

    XNOR-Net's layers with the learned thresholds of ReActNet and the shortcuts of Bi-Real Net. A binary network has to
    be trained: give the table ``tune``; batch norms then learn the statistics of the batches. ``fold`` comes after it:
    batch norms behind binary layers are what makes them trainable.

    Binary layers of brevitas (``QuantConv1d``, ``QuantConv2d``, ``QuantLinear`` with 1-bit weights behind a 1-bit
    ``QuantIdentity`` or ``QuantHardTanh``) are taken over as they were trained; ``layers`` then says which others are
    made binary, by default none.

    Attributes:
        layers: names of layers to make binary, with ``*`` and ``?``; a name also covers what is inside it. Empty: every
            convolution and linear layer but the first and the last.
        mst: what shortens the trees of the layers' channels while they are trained: ``tree`` pulls each channel to
            its parent in the tree, ``centre`` all to their majority, ``none`` nothing (MST-compression, ICCV 2023).
        mst_weight: of that term in the loss.
        mst_density: share of places in which channels may go on differing from what they are pulled to: a layer that
            has come so far is left alone. Storing a weight takes some 0.5 bits at 0.1, 0.65 at 0.15, 0.8 at 0.2.
        mst_projection: share of the weights in which a channel differs from its parent that are flipped after training,
            the smallest latent ones; what it costs is measured on the evaluation data and noted.
        shortcuts: add to a layer's result what it read, where they have one shape.
        tune: how to train. Without it the network is made binary and not trained, which no network survives.
    """

    stage: ClassVar[int] = 10

    layers: tuple[str, ...] = ()
    mst: str = "tree"
    mst_weight: float = 1.0
    mst_density: float = 0.0
    mst_projection: float = 0.0
    shortcuts: bool = True
    tune: Tune | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not all(isinstance(name, str) and name for name in self.layers):
            raise ValueError(f"layers is a list of layer names or patterns, not {self.layers!r}")
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.mst not in PULLS:
            raise ValueError(f"mst is one of {', '.join(PULLS)}, not {self.mst!r}; {nearest(self.mst, PULLS)}")
        if self.mst_weight < 0:
            raise ValueError(f"mst_weight is not below 0: {self.mst_weight}")
        for name in ("mst_density", "mst_projection"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is from 0 to 1, not {getattr(self, name)}")

    def check(self, module: nn.Module, task: Task) -> None:
        """Refuse a name in ``layers`` that no layer has, and training without data."""
        from edgepack.compress._graph import named
        from edgepack.compress._tune_feed import training_data

        paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
        for pattern in self.layers:
            if not any(named(path, [pattern]) for path in paths):
                raise InputError(f"binarize: layers: no layer is called {pattern!r}", nearest(pattern, paths))
        if self.tune is not None:
            training_data(task)

    def apply(self, module: nn.Module, task: Task, run: Run) -> nn.Module:
        from edgepack.compress._binarizing import Binarizing

        return Binarizing(self, task, run).run_all(module.eval())
