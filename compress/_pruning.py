"""The steps of ``prune``: find the groups, weigh their units, order them, remove as many as budgets ask, say it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from edgepack.compress._channels import Survey, difference
from edgepack.compress._cutting import Cut, Group, remove, union
from edgepack.compress._heads import restore, rewrite, settle
from edgepack.compress._macs import macs
from edgepack.compress._reconstruct import reconstruct
from edgepack.compress._tune_feed import looked_at
from edgepack.compress._widths import Costs, Step, enough, narrowest, steps
from edgepack.compress._worth import magnitudes, scales, taylor
from edgepack.errors import BudgetError, Unsupported, counted
from edgepack.tracing import example_inputs

if TYPE_CHECKING:
    from edgepack.compress.prune import Prune
    from edgepack.contracts import Run
    from edgepack.measurement import Ratio
    from edgepack.task import Task

EXACT = 1e-5  # largest difference from the network with those weights at 0, over the largest value
SHOWN = 3
FILE = "steps.json"
HINT = "a larger ratio, a smaller multiple or least, or fewer names in leave"


@dataclass(eq=False)
class Pruning:
    """One run of the pass, up to the network that may be trained."""

    options: Prune
    task: Task
    run_: Run
    groups: list[Group] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    _survey: Survey = field(init=False)

    def run(self, module: nn.Module) -> nn.Module:
        before = copy.deepcopy(module)
        rewritten = rewrite(module, self.inputs) if self.options.heads else {}
        worth = self._weigh(module)
        order = self._order(module, worth)
        count = self._count(module, order)
        cut = self.cut(order[:count])
        whole = copy.deepcopy(module)
        narrow(module, cut)
        gap = difference(whole, self.inputs, cut, module)
        if not gap <= EXACT or not self._survey.exact(cut):
            raise Unsupported(
                f"prune: without its channels {type(module).__name__} differs by {gap:.1e} from itself with their "
                "weights at 0", "leave = […] keeps layers out; please report which network this is",
            )  # fmt: skip
        restore(module, rewritten)
        if cut and (self.data if self.options.reconstruct is None else self.options.reconstruct):
            self.errors = reconstruct(before, module, cut, self.task, self.run_, self.options.samples)
        self._say(before, module, worth, order[:count], gap)
        return module

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        return example_inputs(self.task.specs)

    @cached_property
    def one(self) -> tuple[Tensor, ...]:
        return example_inputs(self.task.specs, batch=1)

    @property
    def criterion(self) -> str:
        return self.options.criterion or ("taylor" if self.data else "l2")

    @property
    def data(self) -> bool:
        """Whether there are samples to look at."""
        return looked_at(self.task) is not None

    def _weigh(self, module: nn.Module) -> list[Tensor]:
        """The groups, and what their units are worth."""
        options = self.options
        self._survey = Survey(module, self.inputs, options.layers, options.leave, options.heads).run()
        self.groups, self.left = self._survey.groups, self._survey.left
        for group in list(self.groups):
            if narrowest(group, options.multiple, options.least) == group.units:
                self.left[group.name] = f"its {group.units} {group.kind} are as few as multiple and least allow"
                self.groups.remove(group)
        if self.criterion == "bn-scale":
            values = scales(module, self.groups)
            for group, value in zip(list(self.groups), values, strict=True):
                if value is None:
                    self.left[group.name] = "no batch norm follows it"
                    self.groups.remove(group)
            worth = [value for value in values if value is not None]
        if not self.groups:
            why = next((f" ({path}: {reason})" for path, reason in self.left.items()), "")
            raise Unsupported(f"prune: {type(module).__name__} has no channels that can be removed{why}",
                              "leave the pass out for this network")  # fmt: skip
        if self.criterion in ("l1", "l2"):
            worth = magnitudes(module, self.groups, int(self.criterion[1]))
        elif self.criterion == "taylor":
            worth = taylor(module, self.groups, self.task, self.run_, options.samples)
        return worth

    def _order(self, module: nn.Module, worth: Sequence[Tensor]) -> list[Step]:
        options = self.options
        compute = options.macs_ratio is not None or options.latency_ratio is not None
        costs = Costs.of(module, self.one, compute, options.size_ratio is not None)
        return steps(self.groups, worth, costs, options.multiple, options.least)

    def cut(self, order: Sequence[Step]) -> dict[tuple[str, str], set[int]]:
        return union(self.groups[step.group].cut(step.units) for step in order)

    def _count(self, module: nn.Module, order: Sequence[Step]) -> int:
        """How many steps keep every budget: those that are counted first, then those that are measured.

        What was measured is kept in the run's folder: a run that was killed while it trained removes the same again.
        """
        options, count, path = self.options, 0, self.run_.workdir / FILE
        if options.macs_ratio is not None:
            whole = macs(module, self.one)
            count = self._least(
                module, order, 0, ("macs_ratio", options.macs_ratio), lambda one: macs(one, self.one) / whole
            )
        if options.size_ratio is not None:
            values = numbers(module)
            count = self._least(
                module, order, count, ("size_ratio", options.size_ratio), lambda one: numbers(one) / values
            )
        if not (limits := options.latency_limits()):
            return count
        if path.exists() and (stored := json.loads(path.read_text(encoding="utf-8")))["identity"] == self.run_.identity:
            return int(stored["steps"])
        for target, ratio in limits.items():
            measured = partial(self._latency, against=module, target=target)
            count = self._least(module, order, count, (f"latency_ratio ({target})", ratio), measured)
        self.run_.workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"identity": self.run_.identity, "steps": count}), encoding="utf-8")
        return count

    def _latency(self, module: nn.Module, against: nn.Module, target: str) -> float:
        return self.run_.measure(module, against, target).value

    def _least(
        self,
        module: nn.Module,
        order: Sequence[Step],
        done: int,
        budget: tuple[str, float],
        cost: Callable[[nn.Module], float],
    ) -> int:
        """The fewest steps from ``done`` on that keep a budget. Raises BudgetError."""
        (name, limit), seen = budget, 1.0

        def keeps(more: int) -> bool:
            nonlocal seen
            seen = cost(narrow(copy.deepcopy(module), self.cut(order[: done + more])))
            return seen <= limit

        if (more := enough(len(order) - done, keeps)) is None:
            raise BudgetError(
                f"prune: {name} {limit:g} cannot be reached: the narrowest network gives {seen:.3f}", HINT
            )
        return done + more

    def _say(
        self, before: nn.Module, module: nn.Module, worth: Sequence[Tensor], order: Sequence[Step], gap: float
    ) -> None:
        counts = {"macs": [macs(item, self.one) for item in (before, module)],
                  "parameters": [numbers(item) for item in (before, module)]}  # fmt: skip
        ratios = {name: after / whole for name, (whole, after) in counts.items()}
        gone = [
            {unit for step in order if step.group == index for unit in step.units} for index in range(len(self.groups))
        ]
        rows = [_row(group, values, own) for group, values, own in zip(self.groups, worth, gone, strict=True)]
        self.run_.note(f"removed units of {sum(map(bool, gone))} of {len(gone)} groups by {self.criterion}: "
                       f"{ratios['macs']:.3f} × the multiply-accumulates, {ratios['parameters']:.3f} × the parameters; "
                       f"{gap:.1e} from the network with those weights at 0")  # fmt: skip
        if self.errors:
            first, last = (median(errors) for errors in zip(*self.errors.values(), strict=True))
            self.run_.note(f"reconstructed {counted(len(self.errors), 'layer')}: {last:.3f} of what they gave is "
                           f"missing, {first:.3f} before (squared, the median layer)")  # fmt: skip
        for path, why in list(self.left.items())[:SHOWN]:
            self.run_.note(f"left {path}: {why}")
        verdicts = {target: self._verdict(target, before, module, ratios) for target in self.options.targets if order}
        found = {"criterion": self.criterion, "difference": gap, "layers": rows, "left": self.left}
        self.run_.record("channels", {**counts, **found, "reconstructed": self.errors, "targets": verdicts})

    def _verdict(
        self, target: str, before: nn.Module, module: nn.Module, ratios: Mapping[str, float]
    ) -> dict[str, Any]:
        ratio = self.run_.measure(module, before, target)
        text = verdict(ratio, ratios)
        self.run_.note(f"{target}: {text}")
        return {"measured": asdict(ratio), "verdict": text}


def verdict(ratio: Ratio, ratios: Mapping[str, float]) -> str:
    """What a measurement says: faster by how much, or not and why. ``ratios`` are of counts, after over before."""
    smaller = f"{ratios['parameters']:.3f} × the parameters"
    interval = f"{ratio.value:.3f} × the latency [{ratio.low:.3f}, {ratio.high:.3f}]"
    if ratio.high < 1:
        return f"smaller ({smaller}) and faster by {1 / ratio.value:.2f} ×: {interval}"
    if ratios["macs"] > 0.95:
        why = f"only {1 - ratios['macs']:.1%} of the multiply-accumulates are gone"
    elif ratio.value < 1:
        why = "the interval reaches 1"
    else:
        why = "the engine's time is not in the multiply-accumulates that are gone: it pads widths, or waits for memory"
    return f"smaller ({smaller}), not faster here, because {why}: {interval}"


def narrow(module: nn.Module, cut: Cut) -> nn.Module:
    """Remove units and tell attention layers. Changes the network in place."""
    settle(remove(module, cut))
    return module


def numbers(module: nn.Module) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in module.parameters())


def _row(group: Group, worth: Tensor, gone: set[int]) -> dict[str, Any]:
    """What is said of a group."""
    kept = [unit for unit in range(group.units) if unit not in gone]
    spread = {word: _spread(worth[sorted(units)]) for word, units in (("kept", kept), ("gone", gone)) if units}
    return {
        "layer": group.name, "kind": group.kind, "before": group.units, "after": len(kept), "criterion": spread,
        "gone": sorted(gone),
        "tied": sorted({path for path, what in group.sides if what != "in" and path != group.name}),
    }  # fmt: skip


def _spread(values: Tensor) -> dict[str, float]:
    return {"least": float(values.min()), "median": float(values.median()), "most": float(values.max())}
