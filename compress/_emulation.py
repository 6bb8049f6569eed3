"""A rounded network run beside variants of itself, each computed only from where it first differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from edgepack.compress._graph import operator_of, readers
from edgepack.compress._operators import FUSED, passes

Quantize = Callable[[fx.Node, Tensor], Tensor]
Parameters = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to run the network.

    Attributes:
        left: operators that compute in float on their weights as they were; what they alone write or read is not
            rounded.
        quantize: rounds results in place of the network's own way.
        exact: nothing is rounded at all.
    """

    left: frozenset[str] = frozenset()
    quantize: Quantize | None = None
    exact: bool = False


@dataclass(eq=False)
class Emulation:
    """A graph with rounded weights, and what it needs to take any of the rounding back.

    Attributes:
        module: the captured graph, on the rounded weights.
        before: rounded operator → its weight and bias before rounding; no bias where the operator's own stays.
        quantize: rounds each result as engines will.
        floats: operators on weights that are in float in any case.
    """

    module: fx.GraphModule
    before: Mapping[str, Parameters]
    quantize: Quantize
    floats: frozenset[str] = frozenset()
    nodes: list[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = list(self.module.graph.nodes)
        self._last_uses = fx.Interpreter(self.module).user_to_last_uses

    def run(self, inputs: Sequence[Tensor], variants: Sequence[Variant]) -> list[list[Tensor]]:
        """Float outputs of the rounded network, then of each variant."""
        starts: dict[fx.Node, list[int]] = {}
        for number, variant in enumerate(variants):
            starts.setdefault(self._start(variant), []).append(number)
        found: list[list[Tensor]] = [[] for _ in variants]
        run = _Run(self, Variant(), inputs)
        for index, node in enumerate(self.nodes):
            for number in starts.get(node, ()):
                branch = _Run(self, variants[number], inputs, run.copied())
                for later in self.nodes[index:]:
                    branch.step(later)
                found[number] = branch.outputs
            run.step(node)
        return [run.outputs, *found]

    def watch(
        self,
        inputs: Sequence[Tensor],
        show: Callable[[fx.Node, Mapping[fx.Node, Any]], None],
        variant: Variant = Variant(exact=True),
    ) -> list[Tensor]:
        """Run in float; ``show`` sees each node before it is computed, and every value that is still read."""
        run = _Run(self, variant, inputs)
        for node in self.nodes:
            show(node, run.env)
            run.step(node)
        return run.outputs

    def _start(self, variant: Variant) -> fx.Node:
        if variant.exact or variant.quantize is not None:
            return self.nodes[0]
        left = variant.left | self.floats
        return next(node for node in self.nodes if node.name in variant.left or unrounded(node, left))


class _Run(fx.Interpreter):
    """One pass over the nodes, step by step."""

    def __init__(
        self, emulation: Emulation, variant: Variant, inputs: Sequence[Tensor], env: dict[fx.Node, Any] | None = None
    ) -> None:
        super().__init__(emulation.module, garbage_collect_values=False)
        self._emulation, self._variant = emulation, variant
        self._quantize = variant.quantize or emulation.quantize
        self._left = variant.left | emulation.floats
        started = sum(node.op == "placeholder" for node in env or ())
        self.env = {} if env is None else env
        self.args_iter = iter(inputs[started:])
        self.outputs: list[Tensor] = []

    def copied(self) -> dict[fx.Node, Any]:
        """What is still read; the network's own tensors stay, the rest is copied, as operators may work in place."""
        return {
            node: value.clone() if isinstance(value, Tensor) and node.op != "get_attr" else value
            for node, value in self.env.items()
        }

    def step(self, node: fx.Node) -> None:
        self.env[node] = self.run_node(node)
        if node.op == "output":
            leaves = torch.utils._pytree.tree_leaves(self.env[node])
            self.outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for done in self._emulation._last_uses.get(node, ()):
            self.env.pop(done, None)

    def run_node(self, n: fx.Node) -> Any:
        exact = self._variant.exact
        if n.name in self._emulation.before and (exact or n.name in self._left):
            result = compute(n, self.env, *self._emulation.before[n.name])
        else:
            result = super().run_node(n)
        if exact or not isinstance(result, Tensor) or n.op not in ("call_function", "placeholder"):
            return result
        return result if self._left and unrounded(n, self._left) else self._quantize(n, result)


def compute(
    node: fx.Node, env: Mapping[fx.Node, Any], weight: Tensor, bias: Tensor | None, read: Tensor | None = None
) -> Tensor:
    """A weighted operator's result on another weight, and another bias and input where they are given."""
    given = dict(enumerate((read, weight, bias)))
    sources = fx.node.map_arg((node.args, node.kwargs), lambda source: env[source])
    args, kwargs = list(sources[0]), dict(sources[1])
    for index, value in given.items():
        if value is not None and index < len(args) and args[index] is not None:
            args[index] = value
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def unrounded(node: fx.Node, left: frozenset[str]) -> bool:
    """Whether a result is written by nothing but operators in ``left`` (or given) and read by nothing else."""
    return (_maker(node).op == "placeholder" or _maker(node).name in left) and _only_read_by(node, left)


def _maker(node: fx.Node) -> fx.Node:
    while (passes(node) or operator_of(node) in FUSED) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _only_read_by(node: fx.Node, left: frozenset[str]) -> bool:
    return all(reader.op == "output" or reader.name in left for reader in _readers(node))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for reader in readers(node):
        if passes(reader) or operator_of(reader) in FUSED:
            yield from _readers(reader)
        else:
            yield reader
