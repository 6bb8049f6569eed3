"""How the blocks of known transformers compute, in two halves: what an adapter tells ``reorganize``.

Write an adapter for blocks of your own: a class with one attribute and two methods, named in the recipe::

    # my_adapter.py                                     [[compress]]
    class MyBlocks:                                     use = "reorganize"
        block = "MyBlock"                               adapter = "my_adapter.py:MyBlocks"

        def attend(self, block, tokens):
            q, k, v = (one.unflatten(-1, (block.heads, -1)).transpose(1, 2) for one in block.qkv(tokens).chunk(3, -1))
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return tokens + block.out(attended.transpose(1, 2).flatten(2)), q, k

        def rest(self, block, tokens):
            return tokens + block.mlp(tokens)

``rest(attend(tokens)[0])`` must be what the block computes; a cut compares the two before it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from edgepack.compress._tokens import attention
from edgepack.errors import Unsupported

TOKENS = ("cls_token", "class_token", "dist_token", "distillation_token", "reg_token", "register_tokens")
CLASS = TOKENS[:2]
WINDOWED = "its attention is windowed, so every token must keep its place"
PYRAMID = "it is a pyramid that merges neighbouring tokens between stages, so every token must keep its place"
GRIDS = {  # what the names of classes, or of the files they are defined in, begin with
    **dict.fromkeys(("swin", "window", "twins", "maxvit", "nest"), WINDOWED),
    **dict.fromkeys(("pvt", "pyramid", "pit", "pooling", "mvit", "hiera"), PYRAMID),
}


class Adapter(Protocol):
    """What ``reorganize`` must know of one kind of block."""

    @property
    def block(self) -> str:
        """Name of the block's class, alone or with its module in front (``package.module.Name``)."""

    def attend(self, block: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first half of a block: everything up to and with the sum behind its attention.

        Args:
            block: the module.
            tokens: (B, N, C), special tokens first.

        Returns:
            Tokens (B, N, C), and the queries and keys (B, H, N, d) of its attention, softmax(q kᵀ / √d).
        """

    def rest(self, block: Any, tokens: Tensor) -> Tensor:
        """The second half, for any number of tokens."""


@dataclass(frozen=True)
class Timm:
    """timm's ViT, DeiT and CrossViT."""

    block: str = "timm.models.vision_transformer.Block"

    def attend(self, block: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = block.attn
        if type(inner).__name__ != "Attention":
            raise Unsupported(f"reorganize: a block attends with {type(inner).__name__}, not timm's Attention")
        x = block.norm1(tokens)
        qkv = inner.qkv(x).unflatten(-1, (3, inner.num_heads, inner.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = inner.q_norm(qkv[0]), inner.k_norm(qkv[1])
        y = inner.norm(attention(q, k, qkv[2], inner.attn_drop.p if block.training else 0.0))
        if inner.gate is not None:
            y = y * inner.gate(x).sigmoid()
        return tokens + block.drop_path1(block.ls1(inner.proj_drop(inner.proj(y)))), q, k

    def rest(self, block: Any, tokens: Tensor) -> Tensor:
        y: Tensor = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        return y


@dataclass(frozen=True)
class Transformers:
    """transformers' ViT and DeiT, which differ in their name alone."""

    block: str = "transformers.models.vit.modeling_vit.ViTLayer"

    def attend(self, block: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner, x = block.attention, block.layernorm_before(tokens)
        q, k, v = (
            linear(x).unflatten(-1, (-1, inner.head_dim)).transpose(1, 2)
            for linear in (inner.q_proj, inner.k_proj, inner.v_proj)
        )
        y = inner.o_proj(attention(q, k, v, inner.attention_dropout if block.training else 0.0))
        return tokens + block.dropout(y), q, k

    def rest(self, block: Any, tokens: Tensor) -> Tensor:
        y: Tensor = tokens + block.dropout(block.mlp(block.layernorm_after(tokens)))
        return y


@dataclass(frozen=True)
class Torchvision:
    """torchvision's ViT."""

    block: str = "torchvision.models.vision_transformer.EncoderBlock"

    def attend(self, block: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, q, k = _multihead(block.self_attention, block.ln_1(tokens))
        return tokens + block.dropout(y), q, k

    def rest(self, block: Any, tokens: Tensor) -> Tensor:
        y: Tensor = tokens + block.mlp(block.ln_2(tokens))
        return y


@dataclass(frozen=True)
class Encoder:
    """PyTorch's own encoder layer, with its norms in front or behind."""

    block: str = "torch.nn.modules.transformer.TransformerEncoderLayer"

    def attend(self, block: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = block.norm1(tokens) if block.norm_first else tokens
        y, q, k = _multihead(block.self_attn, x)
        y = tokens + block.dropout1(y)
        return (y if block.norm_first else block.norm1(y)), q, k

    def rest(self, block: Any, tokens: Tensor) -> Tensor:
        x = block.norm2(tokens) if block.norm_first else tokens
        y: Tensor = tokens + block.dropout2(block.linear2(block.dropout(block.activation(block.linear1(x)))))
        return y if block.norm_first else block.norm2(y)


FAMILIES: tuple[Adapter, ...] = (
    Timm(),
    Transformers(),
    Transformers("transformers.models.deit.modeling_deit.DeiTLayer"),
    Torchvision(),
    Encoder(),
)


def blocks_of(module: nn.Module, adapters: tuple[Adapter, ...]) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Path, block and adapter of every block that an adapter names, in the order of the module tree."""
    for path, layer in module.named_modules():
        for adapter in adapters:
            if path and adapter.block in (type(layer).__name__, f"{type(layer).__module__}.{type(layer).__qualname__}"):
                yield path, layer, adapter
                break


def grid_reason(module: nn.Module) -> str | None:
    """Why no token of this network can go, by the words its layers are called; None for other networks."""
    for layer in module.modules():
        kind = type(layer)
        names = kind.__name__.lower(), kind.__module__.rpartition(".")[2].removeprefix("modeling_")
        for word, reason in GRIDS.items():
            if kind.__module__.partition(".")[0] != "torch" and any(name.startswith(word) for name in names):
                return f"{kind.__name__}: {reason}"
    return None


def special_tokens(module: nn.Module, channels: int) -> tuple[int, bool]:
    """How many tokens stand before the patches, and whether the first is a class token.

    They are found by the names of their parameters, (1, tokens, channels): ``cls_token``, ``dist_token`` …
    """
    count, has_class = 0, False
    for name, parameter in module.named_parameters():
        leaf = name.rpartition(".")[2].rstrip("0123456789").rstrip("_")
        if leaf in TOKENS and parameter.ndim == 3 and parameter.shape[2] == channels:
            count += parameter.shape[1]
            has_class |= leaf in CLASS
    return count, has_class


def _multihead(layer: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``nn.MultiheadAttention`` of (B, N, C) on itself: result, queries and keys."""
    if not layer.batch_first or layer.in_proj_weight is None or layer.bias_k is not None or layer.add_zero_attn:
        raise Unsupported(
            "reorganize: attention with separate projections, added keys or the batch on axis 1 is not known",
            "adapter = names a class of yours that computes it; see compress/_attention.py",
        )
    q, k, v = (
        one.reshape(*one.shape[:2], layer.num_heads, layer.head_dim).transpose(1, 2)
        for one in F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
    )
    y: Tensor = layer.out_proj(attention(q, k, v, layer.dropout if layer.training else 0.0))
    return y, q, k
