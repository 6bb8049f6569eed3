"""Which tokens of a transformer are kept, and what becomes of the others (Liang et al., EViT, arXiv:2202.07800).

Shapes: B samples, H heads, N tokens, C channels, d channels of a head. Special tokens (class, distillation, registers)
stand first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT = 1e-9  # of a token: 0.55 · 100 is 55, whatever binary fractions say


def kept_of(candidates: int, keep_rate: float) -> int:
    """How many of the candidates (every token that is not special) stay: ⌈keep_rate · candidates⌉."""
    return min(candidates, math.ceil(keep_rate * candidates - EXACT))


def tokens_behind(tokens: int, special: int, keep_rate: float, fuse: bool) -> int:
    """Number of tokens behind a cut. A fused token counts, and is a candidate like any other at the next cut."""
    kept = kept_of(tokens - special, keep_rate)
    return tokens if kept == tokens - special else special + kept + fuse


def scheduled(keep_rate: float, progress: float) -> float:
    """The keep rate while training shrinks from 1 to ``keep_rate``: a half cosine over ``progress`` 0 … 1."""
    share = min(max(progress, 0.0), 1.0)
    return keep_rate + (1 - keep_rate) * (1 + math.cos(math.pi * share)) / 2


def class_attention(queries: Tensor, keys: Tensor, special: int) -> Tensor:
    """Attention that the class token (the first) pays to each candidate, mean over heads.

    One row of the attention matrix, computed by itself, so that the attention proper stays one fused operator.

    Args:
        queries, keys: (B, H, N, d).

    Returns:
        (B, N - special); the shares of special tokens are left out, so it sums to less than 1.
    """
    first = queries[:, :, :1] * queries.shape[-1] ** -0.5
    row: Tensor = (first @ keys.transpose(-2, -1)).softmax(-1)
    return row.mean(1)[:, 0, special:]


def received_attention(queries: Tensor, keys: Tensor, special: int) -> Tensor:
    """Attention that each candidate receives, mean over heads and all tokens: for networks without a class token.

    Args:
        queries, keys: (B, H, N, d).

    Returns:
        (B, N - special).
    """
    rows: Tensor = (queries * queries.shape[-1] ** -0.5 @ keys.transpose(-2, -1)).softmax(-1)
    return rows.mean(2).mean(1)[:, special:]


def reorganize(tokens: Tensor, scores: Tensor, kept: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """Special tokens, the ``kept`` candidates with the largest scores, and the others as one token.

    The fused token is Σ score · token over the others, with the scores as they are: not a weighted mean. It is
    computed as the sum over all less the sum over those kept, so that nothing needs the places of the others.

    Args:
        tokens: (B, special + candidates, C).
        scores: (B, candidates), not negative.

    Returns:
        Tokens (B, special + kept (+ 1), C), kept ones in the order of falling scores, and the places (B, kept) of
        those among the candidates.
    """
    special = tokens.shape[1] - scores.shape[1]
    candidates = tokens[:, special:]
    weights, places = scores.topk(kept, dim=1)
    chosen = candidates.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
    parts = [tokens[:, :special], chosen]
    if fuse:
        parts.append(scores.unsqueeze(1) @ candidates - weights.unsqueeze(1) @ chosen)
    return torch.cat(parts, dim=1), places


def attention(queries: Tensor, keys: Tensor, values: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √d) v as one operator, heads joined: (B, H, N, d) → (B, N, H·d)."""
    attended = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)
