"""Times of factored layers on the targets, remembered: layers of one shape share them, and so do later runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from edgepack.compress._stages import DENSE, Form, Stage, chain_module, stages
from edgepack.data import Arrays
from edgepack.task import Input, Task

if TYPE_CHECKING:
    from edgepack.contracts import Pass, Run

FILE = "times.json"
SAMPLES = 8  # that passes on the way take ranges from; times do not depend on them


@dataclass(eq=False)
class Stopwatch:
    """Milliseconds of one layer in several forms.

    A form is timed as a network of its own, followed by a ReLU, beside the dense layer's. What the engine spends
    around a layer is in all of them; only differences are used. Times are kept in the run's folder, so that a run that
    was killed while it trained chooses the same ranks again.

    Attributes:
        then: passes that networks go through before they are timed.
        seen: JSON of target, layer, size and form → ms.
    """

    run: Run
    then: Sequence[Pass] = ()
    seen: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.run.workdir / FILE
        if path.exists() and (stored := json.loads(path.read_text()))["identity"] == self.run.identity:
            self.seen.update(stored["times"])

    def layer(self, target: str, dense: Stage, size: Sequence[int], forms: Sequence[Form]) -> list[float]:
        """Of the dense layer, then of each form."""
        keys, networks, task = self.wanted(target, dense, size, forms)
        if any(key not in self.seen for key in keys):
            self.remember(zip(keys, self.run.time(networks, task, target, self.then), strict=True))
        return [self.seen[key] for key in keys]

    def wanted(
        self, target: str, dense: Stage, size: Sequence[int], forms: Sequence[Form]
    ) -> tuple[list[str], list[nn.Sequential], Task]:
        """Names under which these times are kept, the networks to be timed, and their task."""
        dense = replace(dense, bias=True)  # where a layer has none, engines merge a batch norm's into it
        wanted = [DENSE, *forms]
        networks = [nn.Sequential(*chain_module(stages(dense, form)), nn.ReLU()).eval() for form in wanted]
        return [self.key(target, dense, size, form) for form in wanted], networks, _task(dense, size)

    def network(self, target: str, module: nn.Module) -> float:
        """Of a whole network before it is changed."""
        key = self.key(target)
        if key not in self.seen:
            self.remember([(key, self.run.time([module], None, target, self.then)[0])])
        return self.seen[key]

    def remember(self, times: Iterable[tuple[str, float]]) -> None:
        self.seen.update(times)
        self.run.workdir.mkdir(parents=True, exist_ok=True)
        stored = {"identity": self.run.identity, "times": self.seen}
        (self.run.workdir / FILE).write_text(json.dumps(stored, indent=1), encoding="utf-8")

    @staticmethod
    def key(target: str, dense: Stage | None = None, size: Sequence[int] = (), form: Form = DENSE) -> str:
        """Without a layer: of the whole network."""
        facts = None if dense is None else list(vars(dense).values())
        return json.dumps([target, facts, list(size), form.method, list(form.ranks)])


def _task(dense: Stage, size: Sequence[int]) -> Task:
    """For a network that is the layer alone."""
    shape = (1, dense.inputs, *size) if dense.kernel else (1, *size, dense.inputs)
    item = Input("x", shape, dynamic=())
    noise = np.random.default_rng(0).standard_normal((SAMPLES, *shape[1:]), dtype=np.float32)
    return Task((item,), calibration=Arrays((item,), {"x": np.maximum(noise, 0)}, None, True))
