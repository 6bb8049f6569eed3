"""The steps of ``factorize``: find the layers, write them in every form, time, choose, put, say what was done."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from edgepack.compress._budgets import Budget, meet
from edgepack.compress._decompose import factored, in_forms
from edgepack.compress._graph import GraphView, put_layer
from edgepack.compress._macs import macs
from edgepack.compress._response import errors, moments
from edgepack.compress._spots import Option, Spot, energy_forms, forms, survey
from edgepack.compress._stages import DENSE, Form
from edgepack.compress._stopwatch import Stopwatch
from edgepack.errors import Unsupported
from edgepack.tracing import example_inputs

if TYPE_CHECKING:
    from edgepack.compress.factorize import Factorize
    from edgepack.contracts import Run
    from edgepack.task import Task

MARGIN = 0.98  # a form is faster where it takes at most this share of the dense layer's time
SHOWN = 3


@dataclass(eq=False)
class Factorizing:
    """One run of the pass, up to the network that may be trained."""

    options: Factorize
    task: Task
    run_: Run
    spots: list[Spot] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def run(self, module: nn.Module) -> nn.Module:
        self.spots, self.left = survey(GraphView.of(module, self.task), self.options.leave)
        if not self.spots:
            raise Unsupported(f"factorize: {type(module).__name__} has no layer that can be factored{self._first()}",
                              "leave the pass out for this network")  # fmt: skip
        before = copy.deepcopy(module)
        self._write(module)
        self._time()
        budgets = self._budgets(module)
        chosen = meet(self.spots, budgets) if self.options.budgets else [spot.options[-1] for spot in self.spots]
        for spot, option in zip(self.spots, chosen, strict=True):
            if option.form != DENSE:
                put_layer(module, spot.layer, option.module)
        self._say(before, module, chosen)
        return module

    def _first(self) -> str:
        return next((f" ({path}: {why})" for path, why in self.left.items()), "")

    def _write(self, module: nn.Module) -> None:
        """Every form of every layer, with its weights and its error."""
        wanted = {spot.layer: forms(spot, self.options) for spot in self.spots}
        low = [spot for spot in self.spots if any(form.method == "channel-svd" for form in wanted[spot.layer])]
        seen = moments(module, self.task, low)
        step = self.run_.progress("factoring layers", len(self.spots))
        for spot in self.spots:
            spot.options = [spot.option(DENSE, spot.layer)]
            own = wanted[spot.layer]
            chains = in_forms(spot.layer, own, seen.get(spot.layer))
            spot.options += [spot.option(form, chain) for form, chain in zip(own, chains, strict=True)]
            spot.why = "" if wanted[spot.layer] else "no rank saves a tenth of its multiply-accumulates"
            step(1)
        errors(module, self.task, self.spots)

    def _time(self) -> None:
        """Times of every form; those that are not faster than the dense layer in each target go."""
        step = self.run_.progress("timing forms", len(self.spots))
        for spot in self.spots:
            wanted = [option.form for option in spot.options[1:]]
            rows = [self._ms(target, spot) for target in self.options.targets] if wanted else []
            timed = [replace(option, ms=tuple(row[index] for row in rows)) for index, option in enumerate(spot.options)]
            spot.options = timed[:1] + [option for option in timed[1:] if _faster(option, timed[0])]
            if wanted and len(spot.options) == 1:
                spot.why = "no form of it is faster" + (" in 8 bits" if self.options.then else "")
            step(1)

    def _ms(self, target: str, spot: Spot) -> list[float]:
        """Of every form of a layer, its calls added up."""
        wanted = [option.form for option in spot.options[1:]]
        calls = [self.watch.layer(target, spot.dense, size, wanted) for size in spot.sizes]
        return [sum(times) for times in zip(*calls, strict=True)]

    @cached_property
    def watch(self) -> Stopwatch:
        return Stopwatch(self.run_, self.options.then)

    def _budgets(self, module: nn.Module) -> list[Budget]:
        """Those of the options."""
        found, one = [], example_inputs(self.task.specs, batch=1)
        if (ratio := self.options.macs_ratio) is not None:
            rows = max(item.rows for item in self.task.inputs)  # a layer's are of one sample
            found.append(Budget("macs_ratio", ratio, macs(module, one) / rows, self._costs(lambda option: option.macs)))
        if (ratio := self.options.size_ratio) is not None:
            found.append(Budget("size_ratio", ratio, numbers(module), self._costs(lambda option: option.values)))
        return found + [budget for budget in self.latencies(module) if budget.ratio < 1]

    def latencies(self, module: nn.Module) -> list[Budget]:
        """Per target, with the ratio 1 where no budget was given."""
        found = []
        for index, target in enumerate(self.options.targets):
            ratio = self.options.latency_limit(target)
            whole = self.watch.network(target, module)
            costs = self._costs(lambda option, index=index: option.ms[index] if option.ms else 0.0)
            found.append(Budget(f"latency_ratio ({target})", 1.0 if ratio is None else ratio, whole, costs))
        return found

    def _costs(self, of: Any) -> list[list[float]]:
        return [[of(option) for option in spot.options] for spot in self.spots]

    def _say(self, before: nn.Module, module: nn.Module, chosen: Sequence[Option]) -> None:
        """Notes and findings: per layer, the network before and after, and the choice by energy beside it."""
        one = example_inputs(self.task.specs, batch=1)
        counts = {"macs": [macs(item, one) for item in (before, module)],
                  "parameters": [numbers(item) for item in (before, module)]}  # fmt: skip
        factored_ = sum(option.form != DENSE for option in chosen)
        self.run_.note(f"factored {factored_} of {len(chosen)} layers: "
                       f"{counts['macs'][1] / counts['macs'][0]:.3f} × the multiply-accumulates, "
                       f"{counts['parameters'][1] / counts['parameters'][0]:.3f} × the parameters")  # fmt: skip
        for path, why in [*self.left.items(), *((s.path, s.why) for s in self.spots if s.why)][:SHOWN]:
            self.run_.note(f"left {path}: {why}")
        rows = [_row(spot, option, self.options.targets) for spot, option in zip(self.spots, chosen, strict=True)]
        found: dict[str, Any] = {**counts, "layers": rows, "left": self.left, "targets": {}}
        if factored_:
            share, rivals = energy_forms(self.spots, self.options.form, sum(option.macs for option in chosen))
            rival = self._rival(before, rivals)
            found["by_energy"] = {"energy": share, "macs": macs(rival, one), "layers": dict(_named(self.spots, rivals))}
            indices = [spot.options.index(option) for spot, option in zip(self.spots, chosen, strict=True)]
            for target, budget in zip(self.options.targets, self.latencies(before), strict=True):
                found["targets"][target] = self._measured(target, [before, module, rival], budget.predicted(indices))
        self.run_.record("factors", found)

    def _rival(self, before: nn.Module, rivals: Sequence[Form]) -> nn.Module:
        """The network with the forms that energy alone gives."""
        network = copy.deepcopy(before)
        modules = dict(network.named_modules())
        for spot, form in zip(self.spots, rivals, strict=True):
            if form != DENSE:
                layer = modules[spot.path]
                put_layer(network, layer, factored(layer, form))
        return network

    def _measured(self, target: str, networks: Sequence[nn.Module], predicted: float) -> dict[str, Any]:
        before, after, rival = networks
        ratio = self.run_.measure(after, before, target, self.options.then)
        beside = self.run_.measure(after, rival, target, self.options.then)
        self.run_.note(
            f"{target}: {ratio.value:.3f} × the latency [{ratio.low:.3f}, {ratio.high:.3f}], predicted "
            f"{predicted:.3f}; {beside.value:.3f} × that of ranks by energy with as many multiply-accumulates"
        )
        return {"predicted": predicted, "measured": asdict(ratio), "over_by_energy": asdict(beside)}


def _faster(option: Option, dense: Option) -> bool:
    """Whether a form is faster in each target (in none: always)."""
    return all(own <= MARGIN * other for own, other in zip(option.ms, dense.ms, strict=True))


def _row(spot: Spot, option: Option, targets: Sequence[str]) -> dict[str, Any]:
    dense = spot.options[0]
    ms = {target: [dense.ms[index], option.ms[index]] for index, target in enumerate(targets) if option.ms}
    return {
        "layer": spot.path, "form": option.form.method, "ranks": list(option.form.ranks), "error": option.error,
        "macs": [dense.macs, option.macs], "ms": ms, "why": spot.why,
    }  # fmt: skip


def _named(spots: Sequence[Spot], chosen: Sequence[Form]) -> list[tuple[str, str]]:
    return [(spot.path, str(form)) for spot, form in zip(spots, chosen, strict=True)]


def numbers(module: nn.Module) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in module.parameters())
