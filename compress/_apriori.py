"""Convolutions that are *defined* as products of one-way filters, so that a network is born small.

c inputs and o outputs of each of g groups, kernel k_1 × … × k_n, rank R; W[o, c, k…] is

    3-way     Σ_r a[o,r,c] · u_1[o,r,k_1] · … · u_n[o,r,k_n]      o·R·(c + Σ k) parameters per group
    2-way     Σ_r u_1[o,c,r,k_1] · … · u_n[o,c,r,k_n]             o·c·R·Σ k; runs as the dense kernel only
    shared    Σ_r h[o,r,k_2] · v[r,c,k_1]                         R·(c·k_1 + o·k_2); one axis: R·(c·k_1 + o)
    cp        Σ_r q[o,r] · a[r,c] · u_1[r,k_1] · … · u_n[r,k_n]   R·(c + o + Σ k)

after "A priori compression of convolutional neural networks for wave simulators" (3-way, 2-way; the others are their
shared relatives). There is neither a bias nor a non-linearity between the factors, so a trained layer can be written as
one dense convolution, or as the chain of its factors (all but ``2-way``), exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgepack.compress._stages import Form, Stage, chain_module, fill, stages

FORMS = ("3-way", "2-way", "shared", "cp")
LETTERS = "ijk"
CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


class Apriori(nn.Module):
    """A convolution whose kernel is a product; trained as it is, converted afterwards.

    Attributes:
        dense: the convolution it stands for.
        form: one of ``FORMS``, with its rank (of one group).
        factors: weights of the chain's stages, as PyTorch stores them; of ``2-way`` u_1 … u_n.
    """

    def __init__(self, dense: Stage, form: str, rank: int) -> None:
        super().__init__()
        self.dense, self.form = dense, _checked(dense, form, rank)
        self.factors = nn.ParameterList([nn.Parameter(torch.empty(shape)) for shape in factor_shapes(dense, self.form)])
        self.bias = nn.Parameter(torch.empty(dense.outputs)) if dense.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal factors of one standard deviation, so that the kernel's variance is He's, 2 / (c·k).

        The product of m factors summed over R has the variance R·s^(2m).
        """
        fan_in = self.dense.inputs // self.dense.groups * math.prod(self.dense.kernel)
        spread = (2 / (fan_in * self.form.ranks[0])) ** (1 / (2 * len(self.factors)))
        for factor in self.factors:
            nn.init.normal_(factor, std=spread)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def kernel(self) -> Tensor:
        """W, (outputs, inputs / groups, k_1 …)."""
        shape = (self.dense.outputs, self.dense.inputs // self.dense.groups, *self.dense.kernel)
        return torch.einsum(_rule(self.dense, self.form), *self._split()).reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with the kernel of now."""
        dense = self.dense
        return CONVOLVE[len(dense.kernel) - 1](
            x, self.kernel(), self.bias, dense.stride, dense.padding, dense.dilation, dense.groups
        )

    def rebuilt(self) -> nn.Module:
        """The same as one plain convolution."""
        layer = self.dense.layer(self.factors[0].dtype).eval()
        fill(layer, self.kernel(), self.bias)
        return layer

    def factored(self) -> nn.Sequential | None:
        """The same as a chain of plain convolutions; None for ``2-way``, whose factors differ for each channel."""
        if self.form.method == "2-way":
            return None
        chain = chain_module(stages(self.dense, self.form), self.factors[0].dtype)
        ones = torch.ones(self.dense.outputs, self.form.ranks[0])  # of 3-way: the sum over ranks
        for layer, factor in zip(chain, [*self.factors, ones], strict=False):
            fill(layer, factor, self.bias if layer is chain[-1] else None)
        return chain

    def extra_repr(self) -> str:
        return f"{self.form}, {self.dense.inputs} → {self.dense.outputs}, kernel {self.dense.kernel}"

    def _split(self) -> list[Tensor]:
        """The factors with their axes apart, groups first, as the rule reads them."""
        dense, rank = self.dense, self.form.ranks[0]
        groups, inputs, outputs = dense.groups, dense.inputs // dense.groups, dense.outputs // dense.groups
        first, *rest = self.factors
        if self.form.method == "2-way":
            return list(self.factors)
        if self.form.method == "3-way":
            space = [factor.reshape(groups, outputs, rank, -1) for factor in rest]
            return [first.reshape(groups, outputs, rank, inputs), *space]
        last = rest.pop().reshape(groups, outputs, rank, -1)
        if self.form.method == "shared":
            return [first.reshape(groups, rank, inputs, -1), last]
        space = [factor.reshape(groups, rank, -1) for factor in rest]
        return [first.reshape(groups, rank, inputs), *space, last.squeeze(-1)]


class AprioriConv(Apriori):
    """A convolution over ``axes`` axes, with a form and a rank in front of the options that PyTorch's has."""

    axes: ClassVar[int]

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], form: str = "3-way", rank: int = 1,
        stride: int | Sequence[int] = 1, padding: int | Sequence[int] | str = 0, dilation: int | Sequence[int] = 1,
        groups: int = 1, bias: bool = True,
    ) -> None:  # fmt: skip
        options = (kernel_size, stride, padding, dilation)
        super().__init__(_stage(self.axes, in_channels, out_channels, options, groups, bias), form, rank)


class AprioriConv1d(AprioriConv):
    """In the place of ``nn.Conv1d``."""

    axes = 1


class AprioriConv2d(AprioriConv):
    """In the place of ``nn.Conv2d``."""

    axes = 2


class AprioriConv3d(AprioriConv):
    """In the place of ``nn.Conv3d``."""

    axes = 3


def factor_shapes(dense: Stage, form: Form) -> list[tuple[int, ...]]:
    """Shapes of the trained factors."""
    if form.method == "2-way":
        inputs, outputs = dense.inputs // dense.groups, dense.outputs
        return [(outputs, inputs, form.ranks[0], taps) for taps in dense.kernel]
    chain = stages(dense, form)
    chain = chain[: 1 + len(dense.kernel)] if form.method == "3-way" else chain
    return [(stage.outputs, stage.inputs // stage.groups, *stage.kernel) for stage in chain]


def parameters_of(dense: Stage, form: Form) -> int:
    """Of a layer in a form, bias included."""
    return sum(math.prod(shape) for shape in factor_shapes(dense, form)) + dense.outputs * dense.bias


def _rule(dense: Stage, form: Form) -> str:
    """The kernel as an einsum: g groups, o outputs and c inputs of each, r ranks, one letter per axis."""
    axes = LETTERS[: len(dense.kernel)]
    if form.method == "2-way":
        return f"{','.join(f'ocr{axis}' for axis in axes)}->oc{axes}"
    if form.method == "3-way":
        return f"gorc,{','.join(f'gor{axis}' for axis in axes)}->goc{axes}"
    if form.method == "shared":
        return "grci,gorj->gocij"
    used = [axis for axis, taps in zip(axes, dense.kernel, strict=True) if taps > 1]
    return f"grc,{','.join(f'gr{axis}' for axis in used)},gor->goc{''.join(used)}"


def _checked(dense: Stage, form: str, rank: int) -> Form:
    if form not in FORMS:
        raise ValueError(f"form is one of {', '.join(FORMS)}, not {form!r}")
    if rank < 1:
        raise ValueError(f"rank is a whole number from 1, not {rank!r}")
    if form == "2-way" and len(dense.kernel) < 2:
        raise ValueError("2-way is the product of filters along two axes or more; one axis has nothing to multiply")
    if form == "shared" and len(dense.kernel) > 2:
        raise ValueError("shared is for one or two axes; '3-way' and 'cp' are for three")
    if form == "cp" and math.prod(dense.kernel) == 1:
        raise ValueError("cp is for kernels with more than one tap")
    return Form(form, (rank,))


def _stage(
    axes: int, inputs: int, outputs: int, options: Sequence[int | Sequence[int] | str], groups: int, bias: bool
) -> Stage:
    size, stride, padding, dilation = (_each(value, axes) for value in options)
    pads = options[2] if isinstance(options[2], str) else padding
    return Stage(inputs, outputs, size, stride, pads, dilation, groups, bias)


def _each(value: int | Sequence[int] | str, axes: int) -> tuple[int, ...]:
    """One number per axis; of a word (how to pad) none."""
    if isinstance(value, str):
        return ()
    return (value,) * axes if isinstance(value, int) else tuple(value)
