"""ScaleKD's feature losses: a student's inner results are made like a teacher's, seen from two sides.

After deep-optimization/ScaleKD (Apache-2.0; Fan et al., NeurIPS 2024). A cross-attention projector brings the student's
map to the teacher's shape; then the two are compared position by position (*spatial*), and again without their mean
over all positions (*frequency*: the DCT's zeroth coefficient, which dominates everything else, is left out).
Projectors are trained beside the student and are no part of it. Where the shapes are the same there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepack.compress._hooks import hooked
from edgepack.errors import InputError, nearest

SPATIAL, FREQUENCY = 0.08, 0.06  # weights of the two losses, as published
STAGES = 2  # resolutions that are paired automatically, the last ones
FLOOR = 0.01  # of the typical length of a position, below which its gradients no longer grow
LEAST = 1e-6  # a length, where all positions are 0: gradients stay finite
HEADS = (8, 4, 2, 1)


class Projector(nn.Module):
    """A student's map (N, C, H, W) or tokens (N, L, C) → the teacher's positions and channels, as (N, L', C').

    Learned queries, one for each of the teacher's positions, attend to the student's positions.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        (places, channels), (asked, width) = positions(student), positions(teacher)
        if len(student) == 4:
            norm = nn.BatchNorm2d(channels)
            self.enter: nn.Module = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), norm, nn.ReLU())
        else:
            self.enter = nn.Sequential(nn.Linear(channels, channels), nn.ReLU())
        self.places = nn.Parameter(nn.init.trunc_normal_(torch.empty(places, channels), std=0.02))
        self.queries = nn.Parameter(torch.randn(asked, width))
        self.asking = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        heads = next(count for count in HEADS if width % count == 0)
        self.attention = nn.MultiheadAttention(width, heads, kdim=channels, vdim=channels, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        known = as_tokens(self.enter(x)) + self.places
        asked = self.asking(self.queries).expand(len(x), -1, -1)
        found = self.norm(self.attention(asked, known, known, need_weights=False)[0])
        result: Tensor = found + self.feed(found)
        return result


@dataclass(frozen=True)
class FeaturePair:
    """Paths of a student's and a teacher's layer, with the shapes of their results for one sample."""

    student: str
    teacher: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


class FeatureLoss(nn.Module):
    """The losses of all pairs; its parameters are the projectors'."""

    def __init__(self, pairs: Sequence[FeaturePair]) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        needed = [pair.shapes for pair in pairs for _ in range(2)]
        self.projectors = nn.ModuleList(nn.Identity() if one == other else Projector(one, other)
                                        for one, other in needed)  # fmt: skip

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        terms = []
        for number, pair in enumerate(self.pairs):
            own, wanted = student[pair.student], as_tokens(teacher[pair.teacher])
            one, other = (as_tokens(self.projectors[2 * number + view](own)) for view in range(2))
            terms.append(SPATIAL * spatial(one, wanted) + FREQUENCY * frequency(other, wanted))
        return torch.stack(terms).sum()


def spatial(student: Tensor, teacher: Tensor) -> Tensor:
    """‖Ŝ − T̂‖² / N of tokens (N, L, C), each position's channels scaled to length 1."""
    return (_unit(student) - _unit(teacher)).square().sum() / len(student)


def frequency(student: Tensor, teacher: Tensor) -> Tensor:
    """``spatial`` without the mean over positions: what is left when a DCT's zeroth coefficient is set to 0."""
    return spatial(student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True))


def _unit(tokens: Tensor) -> Tensor:
    """Each position scaled to length 1; positions where next to nothing is are scaled like those at the floor."""
    lengths = tokens.square().sum(-1, keepdim=True)
    floor = (FLOOR * lengths.detach().mean().sqrt()).clamp_min(LEAST)
    return tokens / (lengths + floor.square()).sqrt()


def as_tokens(feature: Tensor) -> Tensor:
    """(N, C, H, W) or (N, L, C) → (N, L, C)."""
    return feature.flatten(2).transpose(1, 2) if feature.dim() == 4 else feature


def positions(shape: Sequence[int]) -> tuple[int, int]:
    """Number of positions and of channels of a feature with this shape."""
    return (shape[2] * shape[3], shape[1]) if len(shape) == 4 else (shape[1], shape[2])


class Watch:
    """The latest results of some layers of a network, until it is closed."""

    def __init__(self, network: nn.Module, paths: Sequence[str]) -> None:
        self.seen: dict[str, Tensor] = {}
        layers = dict(network.named_modules(remove_duplicate=False))
        self._hooks = [layers[path].register_forward_hook(self._hook(path)) for path in dict.fromkeys(paths)]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, path: str) -> Any:
        def keep(layer: nn.Module, inputs: Any, result: Any) -> None:
            self.seen[path] = result.float() if result.dtype == torch.bfloat16 else result

        return keep


def pair_features(
    names: Sequence[str], student: nn.Module, teacher: nn.Module, inputs: Sequence[Tensor], merged: Sequence[str]
) -> list[FeaturePair]:
    """The pairs that ``features`` names, ``auto`` replaced by what is found.

    ``merged`` are the student's layers that also compute the norm behind them, so that their results are not those of
    the teacher's layers of the same name.

    Raises:
        InputError: no such layer, or its result is no feature.
    """
    ours, theirs = features_of(student, inputs), features_of(teacher, inputs)
    pairs = []
    for name in names:
        if name == "auto":
            pairs += _automatic({path: one for path, one in ours.items() if path not in merged}, theirs)
            continue
        one, _, other = name.partition("=")
        for path, found, whose in ((one, ours, "the network"), (other or one, theirs, "the teacher")):
            if path not in found:
                raise InputError(f"tune: features: {whose} has no layer {path!r} with a map or tokens as result",
                                 nearest(path, found))  # fmt: skip
        if one in merged:
            raise InputError(f"tune: features: {one!r} is merged with its batch norm", "name the batch norm")
        pairs.append(FeaturePair(one, other or one, (ours[one], theirs[other or one])))
    return list(dict.fromkeys(pairs))


def features_of(network: nn.Module, inputs: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """Path → shape for one sample, in the order of computation, of layers that give a map or tokens exactly once."""
    found: list[tuple[str, tuple[int, ...] | None]] = []

    def hook(path: str) -> Any:
        def keep(layer: nn.Module, given: Any, result: Any) -> None:
            fits = isinstance(result, Tensor) and result.is_floating_point() and result.dim() in (3, 4)
            shape = (1, *result.shape[1:]) if fits else None
            found.append((path, shape if shape and positions(shape)[0] > 1 else None))

        return keep

    with hooked((layer, hook(path)) for path, layer in network.named_modules() if path), torch.no_grad():
        network(*inputs)
    calls = [path for path, _ in found]
    return {path: shape for path, shape in found if shape is not None and calls.count(path) == 1}


def _automatic(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]) -> list[FeaturePair]:
    """The last common layer of each of the teacher's last resolutions."""
    last = {positions(shape)[0]: path for path, shape in theirs.items() if len(ours.get(path, ())) == len(shape)}
    order = list(theirs)
    chosen = sorted(last.values(), key=order.index)[-STAGES:]
    if not chosen:
        raise InputError("tune: features: network and teacher have no layers of one name", "name them: student=teacher")
    return [FeaturePair(path, path, (ours[path], theirs[path])) for path in chosen]
