"""The layers of a network that can be factored, and the forms that each could take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from edgepack.compress._decompose import unfoldings
from edgepack.compress._graph import Call, GraphView, named, shape
from edgepack.compress._ranks import rank_by_energy, rank_by_evbmf, rounded
from edgepack.compress._stages import (
    CONVOLUTIONS,
    DENSE,
    METHODS,
    Form,
    Stage,
    chain_macs,
    full_ranks,
    stages,
    suits,
    values,
)

if TYPE_CHECKING:
    from edgepack.compress.factorize import Factorize

SAVED = 0.9  # a form must do with this share of the dense layer's multiply-accumulates
GRID = 8  # ranks that a budget chooses from are eighths of what is sensible
BISECTIONS = 30
READERS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # read the weights of their layers by name


class Spectrum(NamedTuple):
    """Singular values of a matrix, largest first, and its shape."""

    sizes: NDArray[np.float64]
    rows: int
    columns: int


@dataclass(frozen=True, eq=False)
class Option:
    """A layer in one form.

    Attributes:
        module: the chain with its weights; for ``DENSE`` the layer itself.
        error: of its results, squared, over the square of the dense layer's results, on samples.
        ms: per target, of all calls of the layer.
    """

    form: Form
    module: nn.Module = field(repr=False)
    macs: int
    values: int
    error: float = 0.0
    ms: tuple[float, ...] = ()


@dataclass(eq=False)
class Spot:
    """A layer that may be factored.

    Attributes:
        sizes: spatial sizes (linear layers: positions) of one sample, for each call.
        options: the dense layer first.
        why: it stays dense, empty where it does not.
    """

    path: str
    layer: nn.Module
    dense: Stage
    sizes: tuple[tuple[int, ...], ...]
    options: list[Option] = field(default_factory=list)
    why: str = ""
    _spectra: dict[str, list[Spectrum]] = field(default_factory=dict, repr=False)

    def macs(self, form: Form) -> int:
        chain = stages(self.dense, form)
        return sum(chain_macs(chain, size) for size in self.sizes)

    def spectra(self, method: str) -> list[Spectrum]:
        """Of each unfolding whose rank the method cuts; with groups, the mean square over them."""
        if method not in self._spectra:
            weight = self.layer.weight
            assert isinstance(weight, Tensor)
            parts = [unfoldings(part, method) for part in weight.detach().double().chunk(self.dense.groups)]
            self._spectra[method] = [_spectrum(torch.stack(same)) for same in zip(*parts, strict=True)]
        return self._spectra[method]

    def option(self, form: Form, module: nn.Module) -> Option:
        return Option(form, module, self.macs(form), values(stages(self.dense, form)))

    def saves(self, form: Form) -> bool:
        return self.macs(form) <= SAVED * self.macs(DENSE)


def _spectrum(matrices: Tensor) -> Spectrum:
    sizes = torch.linalg.svdvals(matrices).square().mean(0).sqrt()
    return Spectrum(sizes.numpy(), int(matrices.shape[1]), int(matrices.shape[2]))


def survey(view: GraphView, leave: Sequence[str]) -> tuple[list[Spot], dict[str, str]]:
    """Layers that may be factored, in the order of computation, and path → why others may not."""
    left: dict[str, str] = {}
    spots: dict[nn.Module, Spot] = {}
    owners = {child: type(parent).__name__ for parent in view.module.modules() if isinstance(parent, READERS)
              for child in parent.children()}  # fmt: skip
    for call in view.calls:
        if not isinstance(call.layer, (*CONVOLUTIONS, nn.Linear)) or call.layer in spots:
            continue
        calls = view.calls_of(call.layer)
        reason = _obstacle(call.layer, calls, leave, owners)
        if reason is not None:
            left[call.path] = reason
        else:
            sizes = tuple(_size(one) for one in calls)
            spots[call.layer] = Spot(call.path, call.layer, Stage.of(call.layer), sizes)
    return list(spots.values()), left


def _obstacle(
    layer: nn.Module, calls: Sequence[Call], leave: Sequence[str], owners: dict[nn.Module, str]
) -> str | None:
    if any(named(call.path, leave) for call in calls):
        return "'leave' names it"
    if type(layer) not in (*CONVOLUTIONS, nn.Linear):
        return f"{type(layer).__name__} may compute more than a plain layer"
    if layer in owners:
        return f"{owners[layer]} reads its weights by name"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"it pads {layer.padding_mode}, not zeros"
    return next((call.obstacle for call in calls if call.obstacle is not None), None)


def _size(call: Call) -> tuple[int, ...]:
    source = call.node.args[0]
    assert isinstance(source, fx.Node)
    sizes = shape(source)
    if isinstance(call.layer, nn.Linear):
        return sizes[1:-1]
    return sizes[-len(call.layer.kernel_size) :]  # type: ignore[arg-type]


def forms(spot: Spot, options: Factorize) -> list[Form]:
    """Forms that a layer may take: one per method, or for a budget a grid of ranks; all of them save something."""
    found: list[Form] = []
    for method in methods_for(spot, options.form):
        if options.budgets:
            found += [Form(method, ranks) for ranks in _grid(spot.dense, method, options.multiple)]
        else:
            found.append(Form(method, _ranks(spot, method, options)))
    return [form for form in dict.fromkeys(found) if spot.saves(form)]


def methods_for(spot: Spot, method: str) -> Iterator[str]:
    """What an option ``method`` means for a layer; without space to factor, always a low rank."""
    wanted = METHODS[:3] if method == "auto" else (method,)
    fitting = [item for item in wanted if suits(spot.dense, item)]
    yield from fitting or (["channel-svd"] if math.prod(spot.dense.kernel) == 1 else [])


def _grid(dense: Stage, method: str, multiple: int) -> Iterator[tuple[int, ...]]:
    full = full_ranks(dense, method)
    if method != "tucker":
        unit = sum(stage.weights for stage in stages(dense, Form(method, (1,))))
        full = (min(full[0], dense.weights // unit),)
    for eighths in range(1, GRID):
        yield tuple(rounded(eighths / GRID * most, multiple, most) for most in full)


def _ranks(spot: Spot, method: str, options: Factorize) -> tuple[int, ...]:
    full = full_ranks(spot.dense, method)
    if isinstance(options.rank, str):
        wanted = [_by_evbmf(spectrum, options.weaken) for spectrum in spot.spectra(method)]
    elif options.rank is not None:
        wanted = [options.rank if options.rank >= 1 else options.rank * most for most in full]
    else:
        assert options.energy is not None
        wanted = [rank_by_energy(spectrum.sizes, options.energy) for spectrum in spot.spectra(method)]
    return tuple(rounded(rank, options.multiple, most) for rank, most in zip(_fit(wanted, full), full, strict=True))


def _by_evbmf(spectrum: Spectrum, weaken: float) -> float:
    rank = max(1, rank_by_evbmf(*spectrum)[0])
    return rank + weaken * (len(spectrum.sizes) - rank)


def _fit(wanted: Sequence[float], full: Sequence[int]) -> list[float]:
    """As many ranks as a method has, none over the full one: ``cp`` takes the larger of the two of ``tucker``."""
    kept = wanted if len(wanted) == len(full) else [max(wanted)] * len(full)
    return [min(rank, most) for rank, most in zip(kept, full, strict=True)]


def energy_forms(spots: Sequence[Spot], method: str, macs: int) -> tuple[float, list[Form]]:
    """Ranks that keep one share of the energy in every layer, and that share: the largest with at most so many MACs."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        share = 0.5 * (low + high)
        total = sum(spot.macs(energy_form(spot, method, share)) for spot in spots)
        low, high = (share, high) if total <= macs else (low, share)
    return low, [energy_form(spot, method, low) for spot in spots]


def energy_form(spot: Spot, method: str, share: float) -> Form:
    """The ranks that keep this share of the energy, whatever a processor likes; dense where nothing is saved."""
    own = next(methods_for(spot, "tucker" if method == "auto" else method), None)
    if own is None:
        return DENSE
    ranks = [rank_by_energy(spectrum.sizes, share) for spectrum in spot.spectra(own)]
    form = Form(own, tuple(int(rank) for rank in _fit(ranks, full_ranks(spot.dense, own))))
    return form if spot.macs(form) < spot.macs(DENSE) else DENSE
