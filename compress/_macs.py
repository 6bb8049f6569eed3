"""Multiply-accumulates of a network, counted while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def macs(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Multiply-accumulates of matrix products and convolutions, both products of attention included."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _plain_attention(), counter:
        module(*inputs)
    return counter.get_total_flops() // 2


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as matrix products, which can be counted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
