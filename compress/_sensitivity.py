"""Where a rounded network loses: per layer, with the cause, and remedies tried on a few samples.

Two figures per layer. Its own: the SQNR of its result when it alone is rounded and reads float values. Its cost: by
how many decibels the network's outputs come closer to the float network's when only this layer is float again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from edgepack.compress._causes import DEAD, Row, Values, decibel
from edgepack.compress._emulation import Emulation, Parameters, Quantize, Variant, compute
from edgepack.compress._graph import argument, operator_of, owner_path
from edgepack.compress._observe import first_batches
from edgepack.compress._operators import aten, floating, fused, only_reader, word

if TYPE_CHECKING:
    from edgepack.contracts import Graph
    from edgepack.task import Task

SHARE = 0.8  # of the runs that calibration took
ROWS_COST = 8  # runs per sample for the layers' own figures
LEAST, MOST = 12, 64  # samples
LEAVES = 3  # layers left in float, tried one more at a time
WORTH_DB = 0.5  # what a remedy must bring to be advised
ADDS = (aten.add, aten.add_)
Range = tuple[float, float]


@dataclass(eq=False)
class Sensitivity:
    """What to explain.

    Attributes:
        graph: captured, on the rounded weights.
        before: rounded operator → weight and bias before.
        quantize: rounds results as engines will.
        ranges: of results and inputs, by their names in the plan.
        names: placeholder → name in the plan.
        others: words for another way to round results → that way.
        floats: operators with weights that are in float already.
        leave: what names them.
    """

    graph: Graph
    before: Mapping[str, Parameters]
    quantize: Quantize
    ranges: Mapping[str, Range]
    names: Mapping[str, str]
    others: Mapping[str, Quantize]
    floats: frozenset[str] = frozenset()
    leave: Sequence[str] = ()

    def explain(self, task: Task, progress: Callable[[str, int], Callable[[int], None]]) -> dict[str, Any]:
        """The whole finding, as JSON values; deterministic."""
        self.emulation = Emulation(
            self.graph.program.module(check_guards=False), self.before, self.quantize, self.floats
        )
        self.rows = {row.node: row for row in map(self._row, self.emulation.nodes) if row is not None}
        layers = self._layers()
        samples = self._samples(task, len(layers))
        with torch.no_grad():
            step = progress("explaining: layers alone", samples)
            for inputs in first_batches(self.graph, task, samples):
                self.emulation.watch(inputs, self._look)
                step(len(inputs[0]))
            singles = {name: Variant(left) for name, left in layers.items()}
            step = progress("explaining: layers restored", samples)
            base, gained = self._measured(task, samples, singles, step)
            tries = self._tries(layers, gained, base)
            step = progress("explaining: remedies", samples)
            _, tried = self._measured(task, samples, {text: variant for text, variant, _ in tries}, step)
        advice = [
            {"change": text, "from_db": base, "to_db": tried[text], "size_ratio": size} for text, _, size in tries
        ]
        return {"samples": samples, "sqnr_db": base, "layers": self._table(base, gained), "advice": _judged(advice)}

    def _samples(self, task: Task, layers: int) -> int:
        assert task.calibration is not None
        given = len(task.calibration)
        wanted = int(SHARE * given / (layers / 2 + ROWS_COST))
        return min(given, max(LEAST, min(MOST, wanted)))

    def _layers(self) -> dict[str, frozenset[str]]:
        """What ``leave`` can name → the operators it would leave in float."""
        owners = {node.name: owner_path(node) for node in self.emulation.nodes if node.name in self.before}
        return {
            path: frozenset(name for name, owner in owners.items() if owner == path or owner.startswith(f"{path}."))
            for path in dict.fromkeys(owners.values())
            if path
        }

    def _row(self, node: fx.Node) -> Row | None:
        behind = _behind(node)
        around = self.ranges.get(behind.name)
        if node.name in self.before:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            axis = -1 if operator_of(node) is aten.linear else 1
            values = {
                "input": Values(axis, self.ranges.get(self._name(source))),
                "result": Values(axis, around),
            }
            return Row(node.name, owner_path(node), word(node), values, self.before[node.name][0])
        if operator_of(node) not in ADDS or not _sums(node):
            return None
        sources = tuple((self._name(source), self.ranges.get(self._name(source))) for source in node.args[:2])
        known = tuple((name, pair) for name, pair in sources if pair is not None)
        values = {"result": Values(1 if node.meta["val"].dim() == 4 else -1, around)}
        return Row(node.name, owner_path(node), word(node), values, sources=known)

    def _name(self, node: Any) -> str:
        return self.names.get(node.name, node.name)

    def _look(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
        row = self.rows.get(node.name)
        if row is None:
            return
        results = self._weighted(node, env, row) if row.weight is not None else self._sum(node, env)
        behind = _behind(node)
        reference, *others = (_finished(node, behind, value) for value in results.values())
        found = dict(zip(list(results)[1:], others, strict=True))
        rounded = self.quantize(behind, reference)
        row.values["result"].see(reference, rounded)
        row.add(reference, {**found, "all": self.quantize(behind, found["all"]), "result": rounded})

    def _weighted(self, node: fx.Node, env: Mapping[fx.Node, Any], row: Row) -> dict[str, Tensor]:
        weight, bias = self.before[node.name]
        source, rounded = node.args[0], env[argument(node, "weight")]
        assert isinstance(source, fx.Node)
        read = env[source]
        grid = self.quantize(source, read)
        row.values["input"].see(read, grid)
        return {
            "float": compute(node, env, weight, bias, read),
            "all": compute(node, env, rounded, bias, grid),
            "weight": compute(node, env, rounded, bias, read),
            "input": compute(node, env, weight, bias, grid),
        }

    def _sum(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> dict[str, Tensor]:
        sources: Any = node.args[:2]
        exact = [env[source].clone() for source in sources]
        rounded = self.quantize(sources[0], exact[0]).clone(), self.quantize(sources[1], exact[1])
        target: Any = node.target
        total = target(*rounded, **node.kwargs)
        return {"float": target(*exact, **node.kwargs), "all": total, "input": total.clone()}

    def _measured(
        self, task: Task, samples: int, variants: Mapping[str, Variant], step: Callable[[int], None]
    ) -> tuple[float | None, dict[str, float | None]]:
        """SQNR of the outputs of the rounded network, and of each variant."""
        runs = [Variant(exact=True), *variants.values()]
        signal, noise = 0.0, [0.0] * len(runs)
        for inputs in first_batches(self.graph, task, samples):
            rounded, exact, *others = self.emulation.run(inputs, runs)
            signal += sum(float(value.double().square().sum()) for value in exact)
            for index, found in enumerate([rounded, *others]):
                noise[index] += sum(
                    float((a.double() - b.double()).square().sum()) for a, b in zip(found, exact, strict=True)
                )
            step(len(inputs[0]))
        base, *found_db = (decibel(signal, value) for value in noise)
        return base, dict(zip(variants, found_db, strict=True))

    def _tries(
        self, layers: Mapping[str, frozenset[str]], found: Mapping[str, float | None], base: float | None
    ) -> list[tuple[str, Variant, float]]:
        """Words, the network changed that way, and its size over the rounded one's."""
        tries = [(text, Variant(quantize=quantize), 1.0) for text, quantize in self.others.items()]
        gaining = [name for name in layers if base is not None and (found[name] or 0.0) > base]
        chosen: list[str] = []
        left: frozenset[str] = frozenset()
        for name in sorted(gaining, key=lambda name: -(found[name] or 0.0)):
            if layers[name] <= left or len(chosen) == LEAVES:
                continue
            chosen.append(name)
            left |= layers[name]
            tries.append((f"leave = {[*self.leave, *chosen]}", Variant(left), self._size_ratio(left)))
        return tries

    def _size_ratio(self, left: frozenset[str]) -> float:
        """Bytes of all weights with these in float over bytes without, each weight counted once."""
        rounded = {id(weight): (weight.numel(), name in left) for name, (weight, _) in self.before.items()}
        values = sum(parameter.numel() for parameter in self.emulation.module.parameters())
        whole = 4 * values - 3 * sum(count for count, _ in rounded.values())
        return (whole + 3 * sum(count for count, is_left in rounded.values() if is_left)) / whole

    def _table(self, base: float | None, found: Mapping[str, float | None]) -> list[dict[str, Any]]:
        rows = []
        for row in self.rows.values():
            restored = found.get(row.layer) if row.weight is not None else None
            gain = None if restored is None or base is None else restored - base
            rows.append({**row.to_json(), "gain_db": gain})
        return sorted(rows, key=lambda row: (-(row["gain_db"] or 0.0), row["sqnr_db"] or 1e3))


def remember(graph: Graph, tensors: Mapping[str, Tensor], rounded: Mapping[str, Any]) -> dict[str, Parameters]:
    """Copies of the parameters of operators about to be rounded; a weight that several read is copied once."""
    copies: dict[int, Tensor] = {}
    found = {}
    for node in graph.program.graph.nodes:
        if node.name in rounded:
            held = [tensors.get(getattr(argument(node, what), "name", "")) for what in ("weight", "bias")]
            kept = [None if one is None else copies.setdefault(id(one), one.detach().clone()) for one in held]
            assert kept[0] is not None
            found[node.name] = kept[0], kept[1]
    return found


def sentences(finding: Mapping[str, Any]) -> list[str]:
    """The finding in a few notes."""
    base = finding["sqnr_db"]
    if base is None:
        return []
    worst = [row for row in finding["layers"] if (row["gain_db"] or 0.0) >= WORTH_DB][:LEAVES]
    found = [f"{row['layer']} costs {row['gain_db']:.1f} dB: {_reason(row)}" for row in worst]
    found = found or [f"no layer alone costs {WORTH_DB} dB"]
    mismatched = [cause["text"] for row in finding["layers"] for cause in row["causes"] if cause["where"] == "sum"]
    advice = [
        f"tried on {finding['samples']} samples: {one['change']} brings {base:.1f} dB to {one['to_db']:.1f}"
        + (f", costs +{100 * (one['size_ratio'] - 1):.1f} % size" if one["size_ratio"] > 1 else "")
        for one in finding["advice"]
        if one["worth"]
    ]
    return [f"outputs keep {base:.1f} dB on {finding['samples']} samples", *found, *mismatched[:1], *advice]


def _reason(row: Mapping[str, Any]) -> str:
    causes = [cause["text"] for cause in row["causes"] if cause["kind"] != DEAD]
    return str(causes[0]) if causes else f"most of its own error comes from rounding its {row['most_in']}"


def _judged(advice: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each says whether it is worth following: it must bring something beyond what a smaller change brings."""
    best, judged = -1e3, []
    for one in advice:
        best = max(best, one["from_db"] or 0.0)
        worth = (one["to_db"] or 0.0) >= best + WORTH_DB
        best = max(best, one["to_db"] or 0.0) if worth and one["size_ratio"] > 1 else best
        judged.append({**one, "worth": worth})
    return judged


def _sums(node: fx.Node) -> bool:
    return len(node.args) > 1 and all(isinstance(one, fx.Node) and floating(one) for one in node.args[:2])


def _behind(node: fx.Node) -> fx.Node:
    """Where an operator's result is rounded: behind the ReLU it is computed with."""
    reader = only_reader(node)
    return reader if reader is not None and fused(reader) else node


def _finished(node: fx.Node, behind: fx.Node, value: Tensor) -> Tensor:
    if behind is node:
        return value
    target: Any = behind.target
    result: Tensor = target(value, *behind.args[1:], **behind.kwargs)
    return result
