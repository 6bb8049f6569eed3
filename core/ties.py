"""How near the choices of a network come to a tie.

Where a network keeps the k largest of several scores, engines that agree to the last digits may still keep different
ones when the k-th and the next are nearly equal; all that follows differs then, and no operator is wrong. So it is
where a binary network takes the sign of a float: a value on the threshold falls to either side of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.samples import Array, in_batches

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

    from edgepack.contracts import Arrays, Graph

CHOICES = ("topk", "gather", "ge", "gt", "le", "lt", "where")  # operators at which artifacts may part in a tie: it, or
# the first that reads its places
COMPARISONS = ("aten.ge.", "aten.gt.", "aten.le.", "aten.lt.")
SHARE = 0.01  # of what outputs may differ by: floats before a comparison agree so well


def margins(graph: Graph, inputs: Arrays) -> Array | None:
    """Per sample the smallest margin of all its choices; None where the network makes none.

    The margin of a top-k is (s_k − s_(k+1)) / |s_k|, of scores s in falling order; that of comparisons
    |x − t| / max |x|, in hundredths: of so many values some are near, and only the nearest excuse a sample.

    Args:
        inputs: a stack of samples.
    """
    import torch

    module = graph.program.module(check_guards=False)
    choices = [node for node in module.graph.nodes if _chooses(node)]
    if not choices:
        return None
    rows: list[Array] = []

    class Watcher(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            if n in choices:
                args, _ = self.fetch_args_kwargs_from_env(n)
                rows[-1] = np.minimum(rows[-1], _near(*args[:2]) if _compares(n) else _margins(n, args[0]))
            return super().run_node(n)

    with torch.no_grad():
        for batch in in_batches(graph.inputs, inputs, 16):
            rows.append(np.array(np.inf))
            Watcher(module).run(*(torch.from_numpy(batch[spec.name]) for spec in graph.inputs))
    return np.concatenate([np.atleast_1d(row) for row in rows])


def _chooses(node: Node) -> bool:
    """Whether a node keeps some, not all, of float scores that have one row or more per sample."""
    if node.op == "call_function" and _compares(node):
        return _decides(node)
    if node.op != "call_function" or str(node.target) != "aten.topk.default":
        return False
    value: torch.Tensor = node.all_input_nodes[0].meta["val"]
    axis = _axis(node, value.ndim)
    return value.is_floating_point() and axis > 0 and bool(node.args[1] != value.shape[axis])


def _compares(node: Node) -> bool:
    return str(node.target).startswith(COMPARISONS)


def _decides(node: Node) -> bool:
    """Whether a comparison of computed floats chooses between two numbers."""
    source: torch.Tensor = node.all_input_nodes[0].meta["val"]
    return source.is_floating_point() and any(str(user.target).startswith("aten.where.") for user in node.users)


def _near(values: torch.Tensor, threshold: torch.Tensor | float) -> Array:
    apart = (values - threshold).abs().flatten(1).amin(1)
    found: Array = (apart / values.abs().flatten(1).amax(1).clamp_min(1e-30) / SHARE).numpy()
    return found


def _axis(node: Node, ndim: int) -> int:
    given: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", -1)
    return int(given) % ndim


def _margins(node: Node, scores: torch.Tensor) -> Array:
    largest = node.args[3] if len(node.args) > 3 else node.kwargs.get("largest", True)
    kept: Any = node.args[1]
    ordered = scores.movedim(_axis(node, scores.ndim), -1).sort(dim=-1, descending=bool(largest)).values
    last, next_ = ordered[..., kept - 1], ordered[..., kept]
    margin = (last - next_).abs() / last.abs().clamp_min(1e-30)
    found: Array = margin.flatten(1).amin(1).numpy() if margin.ndim > 1 else margin.numpy()
    return found
