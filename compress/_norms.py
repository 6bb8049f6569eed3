"""Folding every batch norm of a module that can be folded, shared layers included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgepack.compress._folding import Folding
from edgepack.compress._graph import GraphView
from edgepack.compress._sharing import separate

if TYPE_CHECKING:
    from torch import nn

    from edgepack.contracts import Run
    from edgepack.task import Task

ROUNDS = 3


def fold_norms(view: GraphView, task: Task, run: Run, leave: Sequence[str] = ()) -> tuple[nn.Module, list[Folding]]:
    """Fold, give shared layers a copy per use where that helps, and fold again."""
    module, done = view.module, []
    while True:
        folding = Folding(view, leave)
        folding.run()
        done.append(folding)
        separated = separate(view, folding.shared, task, run) if folding.shared and len(done) <= ROUNDS else None
        if separated is None:
            return module, done
        module, view = separated, GraphView.of(separated, task)
