"""MIL's LSTM: time first, gates in the order input, forget, output, cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "linear": lambda x: x,
}


def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    *,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    **activations: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """All hidden states (or the last, as a sequence of one), the last hidden state, the last cell state."""
    words = {key: activations.pop(key, default) for key, default in GATES.items()}
    if activations or any(word not in ACTIVATIONS for word in words.values()):
        raise ValueError(f"lstm with {', '.join(activations) or ', '.join(words.values())}")
    hidden = weight_hh.shape[1]
    weights = [(weight_ih, weight_hh, bias)]
    if direction == "bidirectional":
        assert weight_ih_back is not None  # MIL demands both
        assert weight_hh_back is not None
        weights.append((weight_ih_back, weight_hh_back, bias_back))
    runs = []
    for index, (inward, around, shift) in enumerate(weights):
        part = slice(index * hidden, (index + 1) * hidden)
        states = (initial_h[:, part], initial_c[:, part])
        runs.append(_run(F.linear(x, inward, shift), around, states, direction == "reverse" or index == 1, words))
    every, last_h, last_c = (torch.cat(parts, -1) for parts in zip(*runs, strict=True))
    return every if output_sequence else last_h.unsqueeze(0), last_h, last_c


GATES = {"recurrent_activation": "sigmoid", "cell_activation": "tanh", "activation": "tanh"}


def _run(
    inward: Tensor, around: Tensor, states: tuple[Tensor, Tensor], backward: bool, words: dict[str, str]
) -> tuple[Tensor, Tensor, Tensor]:
    h, c = states
    gate, cell, out = (ACTIVATIONS[words[key]] for key in GATES)
    every = []
    for step in inward.flip(0) if backward else inward:
        i, f, o, z = (step + F.linear(h, around)).chunk(4, -1)
        c = gate(f) * c + gate(i) * cell(z)
        h = gate(o) * out(c)
        every.append(h)
    return torch.stack(every[::-1] if backward else every), h, c


OPERATORS: dict[str, Callable[..., Any]] = {"lstm": lstm}
