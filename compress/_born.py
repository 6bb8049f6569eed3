"""``factorize`` before training: convolutions replaced by products, trained, and written as plain layers again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgepack.compress._apriori import Apriori, parameters_of
from edgepack.compress._graph import GraphView, put_layer
from edgepack.compress._spots import Spot, survey
from edgepack.compress._stages import DENSE, Form
from edgepack.compress._stopwatch import Stopwatch
from edgepack.compress._tune import tune
from edgepack.errors import Unsupported

if TYPE_CHECKING:
    from edgepack.compress.factorize import Factorize
    from edgepack.contracts import Run
    from edgepack.task import Task


@dataclass(eq=False)
class Born:
    """One run of the pass on a network that is still to be trained."""

    options: Factorize
    task: Task
    run_: Run
    products: list[tuple[Spot, Apriori]] = field(default_factory=list)

    def run(self, module: nn.Module) -> nn.Module:
        self._replace(module)
        if self.options.tune is None:
            self.run_.note("nothing was trained: the new kernels are random")
        module = tune(module, self.task, self.run_, self.options.tune)
        rows = [self._convert(module, spot, product) for spot, product in self.products]
        self._say(module, rows)
        return module

    def _replace(self, module: nn.Module) -> None:
        spots, left = survey(GraphView.of(module, self.task), self.options.leave)
        form = Form(self.options.form, (int(self.options.rank or 1),))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.run_.seed)
            for spot in spots:
                if max(spot.dense.kernel, default=1) > 1 and parameters_of(spot.dense, form) < spot.dense.values:
                    product = Apriori(spot.dense, form.method, *form.ranks)
                    put_layer(module, spot.layer, product)
                    self.products.append((spot, product))
        if not self.products:
            why = "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:1])
            raise Unsupported(f"factorize: {form} makes no convolution smaller{why and f' ({why})'}", "a smaller rank")

    def _convert(self, module: nn.Module, spot: Spot, product: Apriori) -> dict[str, Any]:
        """Put the faster of the two plain forms of a product in its place."""
        chain, times = product.factored(), {}
        if chain is not None:
            times = {target: self._ms(target, spot, product.form) for target in self.options.targets}
            saves = spot.macs(product.form) < spot.macs(DENSE)
            faster = all(own < dense for dense, own in times.values()) if times else saves
            chain = chain if faster else None
        put_layer(module, product, product.rebuilt() if chain is None else chain)
        return {
            "layer": spot.path, "form": product.form.method, "ranks": list(product.form.ranks),
            "written": "rebuilt" if chain is None else "factored", "ms": times,
            "parameters": [spot.dense.values, parameters_of(spot.dense, product.form)],
        }  # fmt: skip

    def _ms(self, target: str, spot: Spot, form: Form) -> list[float]:
        watch = Stopwatch(self.run_, self.options.then)
        calls = [watch.layer(target, spot.dense, size, [form]) for size in spot.sizes]
        return [sum(times) for times in zip(*calls, strict=True)]

    def _say(self, module: nn.Module, rows: Sequence[dict[str, Any]]) -> None:
        smaller = sum(dense - own for dense, own in (row["parameters"] for row in rows))
        whole = sum(value.numel() for value in self.run_.original.parameters())
        chains = sum(row["written"] == "factored" for row in rows)
        self.run_.note(
            f"{len(rows)} convolutions are products ({self.options.form}, rank {self.options.rank:g}): "
            f"{whole - smaller:,} parameters were trained, dense {whole:,}; written as {chains} chains and "
            f"{len(rows) - chains} dense kernels"
        )
        measured = {
            target: asdict(self.run_.measure(module, None, target, self.options.then))
            for target in self.options.targets
        }
        trained = {"parameters": [whole, whole - smaller], "targets": measured}
        self.run_.record("products", {**trained, "layers": list(rows)})
