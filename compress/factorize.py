"""Convolutions and linear layers as chains of smaller ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgepack import parts
from edgepack.compress._ratios import by_target, check_ratios
from edgepack.compress._tune import Tune
from edgepack.contracts import Pass, Run
from edgepack.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import nn

    from edgepack.task import Task

METHODS = ("tucker", "cp", "spatial-svd", "channel-svd", "auto")
FORMS = ("3-way", "2-way", "shared", "cp")
WHEN = ("after-training", "before-training")
BUDGETS = ("macs_ratio", "latency_ratio", "size_ratio")
PRECISIONS = ("float32", "int8")
EVBMF = "evbmf"


@dataclass(frozen=True, kw_only=True)
class Factorize(Pass):
    """Write convolutions and linear layers as chains of smaller ones, and train what that loses back.

    ::

        conv 3×3, 64 → 64    becomes    conv 1×1, 64 → 32    conv 3×3, 32 → 32    conv 1×1, 32 → 64      (tucker)
        linear 512 → 512     becomes    linear 512 → 64      linear 64 → 512                             (low rank)

    Ranks come from ``rank``, from ``energy``, or from budgets, which are met with the least error that any choice of
    forms has (all layers together). Every form is timed against the layer it replaces, on this host in each of
    ``targets``, and a layer that is not faster in all of them stays dense. Ranks are multiples of ``multiple``.

    With ``when = "before-training"`` convolutions are replaced by products of one-way filters with random weights and
    the network is trained so; afterwards each is written as the chain of its filters or as one dense convolution,
    whichever is faster. Both are exact.

    Attributes:
        when: ``after-training``, or ``before-training`` for a network whose weights are yet to be found by ``tune``.
        method: of convolutions with space to factor: ``tucker``, ``cp``, ``spatial-svd``, ``channel-svd``; ``auto``
            lets a budget choose among all but ``cp`` for each layer. Linear layers and 1×1 convolutions become two of
            low rank, in the directions that the calibration data have, if there are any. Before training: ``3-way``
            (filters across channels, height and width for each output), ``2-way`` (height and width for each pair of
            channels), ``shared`` (vertical filters, then horizontal ones), ``cp``. ``tucker`` and ``3-way`` if nothing
            is said.
        rank: a whole number, for every layer; below 1: this share of the full rank; ``evbmf``: what is over the noise
            in the weights. One half if nothing is said. Before training: a whole number, 1 if nothing is said.
        energy: instead of ``rank``: the share of the squared singular values that is kept, such as 0.9.
        macs_ratio: instead of ``rank``: multiply-accumulates over those of the network before; several budgets may be
            given, all are kept.
        latency_ratio: the same for latency, in every target; or a table target → ratio.
        size_ratio: the same for parameters.
        weaken: with ``evbmf``: this share of the ranks between its rank and the full one is added.
        multiple: ranks are multiples of this, as processors like them.
        targets: formats whose engines time the forms; with none, nothing is timed and every form is taken as faster.
        precision: in which forms and networks are timed: ``float32``, or ``int8`` where ``quantize`` follows. Engines
            gain less from fewer multiply-accumulates in 8 bits: fewer layers are worth factoring.
        leave: names of layers to leave alone, with ``*`` and ``?``; a name also covers what is inside it.
        tune: how to train afterwards; without it nothing is trained.
    """

    stage: ClassVar[int] = 20

    when: str = "after-training"
    method: str | None = None
    rank: float | str | None = None
    energy: float | None = None
    macs_ratio: float | None = None
    latency_ratio: float | Mapping[str, float] | None = None
    size_ratio: float | None = None
    weaken: float = 0.0
    multiple: int = 8
    targets: tuple[str, ...] = ("onnx",)
    precision: str = "float32"
    leave: tuple[str, ...] = ()
    tune: Tune | None = None

    def __post_init__(self) -> None:
        if self.when not in WHEN:
            raise ValueError(f"when is {' or '.join(map(repr, WHEN))}, not {self.when!r}")
        methods = FORMS if self.born else METHODS
        if self.method not in (None, *methods):
            raise ValueError(f"method is one of {', '.join(methods)} {self.when.replace('-', ' ')}, not "
                             f"{self.method!r}; {nearest(str(self.method), methods)}")  # fmt: skip
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {' or '.join(map(repr, PRECISIONS))}, not {self.precision!r}")
        for name in ("targets", "leave"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) and item for item in value):
                raise ValueError(f"{name} is a list of names, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        self._check_ranks()
        check_ratios({name: getattr(self, name) for name in BUDGETS}, self.targets)

    def _check_ranks(self) -> None:
        given = [name for name in ("rank", "energy") if getattr(self, name) is not None]
        if len(given) + bool(self.budgets) > 1:
            raise ValueError(f"give one of rank, energy, or budgets ({', '.join(BUDGETS)}), not several")
        if isinstance(self.rank, str) and self.rank != EVBMF:
            raise ValueError(f"rank is a number or {EVBMF!r}, not {self.rank!r}")
        if isinstance(self.rank, (int, float)) and not (0 < self.rank < 1 or (self.rank >= 1 and self.rank % 1 == 0)):
            raise ValueError(f"rank is a whole number, or a share above 0 and below 1, not {self.rank!r}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy is above 0 and at most 1, not {self.energy!r}")
        if not 0 <= self.weaken <= 1:
            raise ValueError(f"weaken is from 0 to 1, not {self.weaken!r}")
        if self.multiple < 1:
            raise ValueError(f"multiple is a whole number from 1, not {self.multiple!r}")
        if self.method == "auto" and not self.budgets:
            raise ValueError(f"method = 'auto' is for budgets ({', '.join(BUDGETS)})")
        if not given and not self.budgets:
            object.__setattr__(self, "rank", 1 if self.born else 0.5)
        if self.born and (isinstance(self.rank, str) or self.rank is None or self.rank < 1):
            raise ValueError("before training rank is a whole number, and there is neither energy nor a budget")

    @property
    def born(self) -> bool:
        """Whether the network is yet to be trained."""
        return self.when == WHEN[1]

    @property
    def form(self) -> str:
        """The method, also where nothing was said."""
        return self.method or ("3-way" if self.born else "tucker")

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of the budgets that were given."""
        return tuple(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def then(self) -> tuple[Pass, ...]:
        """What networks go through before they are timed."""
        plainly = {"explain": False}
        return (parts.find(Pass, "quantize")(**plainly),) if self.precision == "int8" else ()

    def latency_limit(self, target: str) -> float | None:
        """The budget in one target."""
        return by_target(self.latency_ratio, self.targets).get(target)

    def check(self, module: nn.Module, task: Task) -> None:
        """Refuse a name in ``leave`` that no layer has, and training without data."""
        from edgepack.compress._graph import named

        paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
        for pattern in self.leave:
            if not any(named(path, [pattern]) for path in paths):
                raise InputError(f"factorize: leave: no layer is called {pattern!r}", nearest(pattern, paths))
        if self.tune is not None and task.training is None:
            raise InputError("factorize: tune: the task has no training data", "add training = {data = …} to [task]")
        for item in self.then if self.targets else ():
            item.check(module, task)

    def apply(self, module: nn.Module, task: Task, run: Run) -> nn.Module:
        from edgepack.compress._born import Born
        from edgepack.compress._factorizing import Factorizing
        from edgepack.compress._tune import tune

        if self.born:
            return Born(self, task, run).run(module.eval())
        return tune(Factorizing(self, task, run).run(module.eval()), task, run, self.tune)
