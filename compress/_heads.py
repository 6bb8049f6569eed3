"""Attention heads as units that can be removed: what they are in the attention layers that are known.

Known are timm's, that of transformers' ViT and DeiT, and PyTorch's own where it attends to its input without a mask.
PyTorch's holds as many heads as fit its width, so it is written as ``SelfAttention`` first, which computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgepack.compress._cutting import IN, OUT, Group
from edgepack.compress._graph import put_layer

TIMM = "timm.layers.attention.Attention"
SPLIT = ("transformers.models.vit.modeling_vit.ViTAttention", "transformers.models.deit.modeling_deit.DeiTAttention")


class SelfAttention(nn.Module):
    """Attention of tokens (B, N, C) to each other, with any number of heads, called as ``nn.MultiheadAttention`` is.

    Attributes:
        qkv: C → 3 · heads · d, queries first.
        proj: heads · d → C.
        in_proj_bias: None, by which PyTorch's encoder layers see that they must call this layer.
    """

    in_proj_bias = None
    batch_first = True

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.drop = (
            old.num_heads, old.head_dim, old.embed_dim, old.dropout
        )  # fmt: skip
        self.qkv = nn.Linear(old.embed_dim, 3 * old.embed_dim, bias=old.in_proj_bias is not None)
        self.qkv.weight = old.in_proj_weight
        if old.in_proj_bias is not None:
            self.qkv.bias = old.in_proj_bias
        self.proj = nn.Linear(old.embed_dim, old.embed_dim, bias=old.out_proj.bias is not None)
        self.proj.weight, self.proj.bias = old.out_proj.weight, old.out_proj.bias
        self.train(old.training)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        masked = any(options.get(name) is not None for name in ("attn_mask", "key_padding_mask"))
        if masked or query is not key or key is not value:
            raise ValueError("this attention is of tokens to each other, without a mask")
        q, k, v = self.qkv(query).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2)), None


def rewrite(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, nn.MultiheadAttention]:
    """Put ``SelfAttention`` in place of PyTorch's attention, unless one does not bear it; path → what was there."""
    found = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.MultiheadAttention)}
    fits = {path: layer for path, layer in found.items() if layer.batch_first and layer.in_proj_weight is not None
            and layer.bias_k is None and not layer.add_zero_attn}  # fmt: skip
    for layer in fits.values():
        put_layer(module, layer, SelfAttention(layer))
    try:
        with torch.no_grad():
            module(*inputs)
    except (ValueError, RuntimeError, TypeError, AttributeError):
        restore(module, fits)
        return {}
    return fits


def restore(module: nn.Module, layers: dict[str, nn.MultiheadAttention]) -> None:
    """Put PyTorch's attention back where no head was removed."""
    for path, layer in layers.items():
        now = module.get_submodule(path)
        if isinstance(now, SelfAttention) and now.num_heads == layer.num_heads:
            put_layer(module, now, layer)


def heads_of(module: nn.Module) -> Iterator[Group]:
    """A group for each attention layer whose heads can be told apart."""
    layer: Any
    for path, layer in module.named_modules():
        if (parts := _projections(layer)) is None:
            continue
        *before, behind = parts
        size, count = layer.head_dim, getattr(layer, behind).in_features // layer.head_dim
        rows = [list(range(size * head, size * (head + 1))) for head in range(count)]
        sides = {(f"{path}.{behind}", IN): rows}
        for name in before:
            own = getattr(layer, name).out_features // (count * size)  # 3 where it holds queries, keys and values
            sides[f"{path}.{name}", OUT] = [
                [part * count * size + i for part in range(own) for i in row] for row in rows
            ]
        yield Group(path, sides, "heads")


def settle(module: nn.Module) -> None:
    """Tell attention layers how many heads they have now."""
    layer: Any
    for layer in module.modules():
        if (parts := _projections(layer)) is not None and parts[0] == "qkv":
            layer.attn_dim = getattr(layer, parts[-1]).in_features
            layer.num_heads = layer.attn_dim // layer.head_dim


def _projections(layer: Any) -> tuple[str, ...] | None:
    """Names of the linear layers around a known attention, the last behind it."""
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if isinstance(layer, SelfAttention):
        return "qkv", "proj"
    if name == TIMM and layer.gate is None and isinstance(layer.norm, nn.Identity):
        return "qkv", "proj"
    return ("q_proj", "k_proj", "v_proj", "o_proj") if name in SPLIT else None
