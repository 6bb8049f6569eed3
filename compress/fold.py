"""Fold batch norms into the layers beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgepack.contracts import Pass, Run
from edgepack.errors import InputError, ParityError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from edgepack.compress._folding import Folding
    from edgepack.task import Task

LIMIT = 1e-4
ROUNDINGS = 8  # a network that amplifies its own rounding may move by this many times what one ulp does …
WORST_LIMIT = 1e-2  # … but never by more than this
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Merge batch norms into the convolutions and linear layers next to them; the answers stay the same.

    ::

        conv → norm → relu      becomes   conv' → relu
        norm → linear           becomes   linear'
        norm → norm → conv      becomes   conv'              (where conv pads nothing)

    A batch norm goes when it uses running statistics and is the only neighbour of a convolution (transposed, grouped
    or not), linear layer or batch norm, with nothing but reshaping between; never across a non-linearity. Before a
    layer it goes only where that is exact: a layer that pads zeros would see other borders. Layers shared by several
    places get a copy for each where that lets a batch norm go. The report names what was left alone, and why.

    Attributes:
        leave: names of layers to leave alone, with ``*`` and ``?``; a name also covers what is inside it.
    """

    stage: ClassVar[int] = 10

    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.leave, str) or not all(isinstance(name, str) and name for name in self.leave):
            raise ValueError(f"leave is a list of layer names or patterns, not {self.leave!r}")
        object.__setattr__(self, "leave", tuple(self.leave))

    def check(self, module: nn.Module, task: Task) -> None:
        """Refuse a name in ``leave`` that no layer has."""
        from edgepack.compress._graph import named

        paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
        for pattern in self.leave:
            if not any(named(path, [pattern]) for path in paths):
                raise InputError(f"fold: leave: no layer is called {pattern!r}", nearest(pattern, paths))

    def apply(self, module: nn.Module, task: Task, run: Run) -> nn.Module:
        from torch.nn.modules.batchnorm import _BatchNorm

        from edgepack.compress._equal import results
        from edgepack.compress._graph import GraphView
        from edgepack.compress._norms import fold_norms

        module.eval()
        if not any(isinstance(layer, _BatchNorm) for layer in module.modules()):
            run.note("nothing to fold: the network has no batch norm")
            return module
        view = GraphView.of(module, task)
        original = results(module, view.inputs)
        size = _numbers(module)
        module, foldings = fold_norms(view, task, run, self.leave)
        found = _verify(module, view.inputs, original, foldings)
        _report(foldings, found, _numbers(module) - size, run)
        return module


def _verify(
    module: nn.Module, inputs: Sequence[Tensor], original: Sequence[Tensor], foldings: Sequence[Folding]
) -> float:
    """Relative difference to the original's answers. Raises ParityError where rounding does not explain it."""
    from edgepack.compress._equal import difference, results, rounding

    found, limit = difference(results(module, inputs), original, LIMIT)
    if found > limit:
        limit = max(limit, min(ROUNDINGS * rounding(module, inputs), WORST_LIMIT))
    if found > limit:
        suspect = max(folding.largest for folding in foldings)[1]
        raise ParityError(
            f"fold changed the network's answers by {found:.1e} (relative; at most {limit:.1e} is allowed)",
            f"leave the culprit alone, for example leave = [{suspect!r}] (the largest scale)",
        )
    return found


def _report(foldings: list[Folding], found: float, grown: int, run: Run) -> None:
    folded = [path for folding in foldings for path in folding.folded]
    left = foldings[-1].left
    if folded:
        scale, path = max(folding.largest for folding in foldings)
        run.note(
            f"folded {_count(len(folded))}, left {len(left)}; outputs within {found:.1e} (relative); "
            f"largest scale {scale:.3g} at {path}"
        )
    for reason in dict.fromkeys(left.values()):
        paths = [path for path in left if left[path] == reason]
        shown = ", ".join(paths[:SHOWN]) + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")
        run.note(f"left {shown}: {reason}")
    if len(foldings) > 1 and grown > 0:
        run.note(f"separate copies of shared layers made the network {grown:,} parameters larger")


def _count(number: int) -> str:
    return "1 batch norm" if number == 1 else f"{number} batch norms"


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
