"""Cuts: blocks that drop tokens between their two halves, put into a network and taken out without changing it.

A cut is the ``forward`` of one block: the block keeps its class, its place and its parameters. At keep rate 1 it
calls what the block's class computes, so the network is the original bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgepack.compress import _tokens
from edgepack.compress._attention import FAMILIES, Adapter, blocks_of, special_tokens
from edgepack.compress._hooks import hooked
from edgepack.errors import InputError, Unsupported
from edgepack.tracing import example_inputs

if TYPE_CHECKING:
    from edgepack.task import Task

CLOSE = 1e-4  # of the largest value: an adapter's two halves against the block
Watch = Callable[["Cut", Tensor, Tensor | None], None]


@dataclass(eq=False)
class Cut:
    """The forward of a block that may drop tokens.

    Attributes:
        path: of the block in the network.
        tokens: that the block reads where nothing was cut.
        special: of these, those in front that always stay.
        has_class: the first is a class token, whose attention ranks the others; else attention received does.
        keep_rate: the share that stays once the network is finished.
        rate: the share that stays now; training may move it between 1 and ``keep_rate``.
        fuse: add the others up into one token.
        watch: shown the scores and the places kept (None where all are), at each call.
    """

    path: str
    block: nn.Module
    adapter: Adapter
    tokens: int
    special: int
    has_class: bool
    keep_rate: float = 1.0
    rate: float = 1.0
    fuse: bool = True
    watch: Watch | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tokens = args[0] if args else next(iter(kwargs.values()))
        candidates = tokens.shape[1] - self.special
        kept = _tokens.kept_of(candidates, self.rate)
        if kept == candidates and self.watch is None:
            whole = candidates + self.special == self.tokens
            return type(self.block).forward(self.block, *args, **kwargs) if whole else self._original(tokens)
        tokens, queries, keys = self.adapter.attend(self.block, tokens)
        rank = _tokens.class_attention if self.has_class else _tokens.received_attention
        scores = rank(queries, keys, self.special)
        places = None
        if kept < candidates:
            tokens, places = _tokens.reorganize(tokens, scores, kept, self.fuse)
        if self.watch is not None:
            self.watch(self, scores, places)
        return self.adapter.rest(self.block, tokens)

    def _original(self, tokens: Tensor) -> Any:
        """The block on tokens some of which are gone.

        Without the mask that transformers makes when it is captured; it has the size of all tokens and hides none.
        """
        return type(self.block).forward(self.block, tokens)

    def put(self) -> None:
        """Let the block compute this."""
        self.block.forward = self


@dataclass(frozen=True)
class Block:
    """A block that can be cut, as it ran on an example.

    Attributes:
        branch: which sequence of tokens it works on (CrossViT has two), by the number of channels.
        index: among the blocks of its branch, in the order of computation.
        tokens: that it reads, special ones included.
    """

    path: str
    layer: nn.Module = field(repr=False)
    adapter: Adapter = field(repr=False)
    branch: int
    index: int
    tokens: int
    special: int
    has_class: bool

    def cut(self, keep_rate: float, fuse: bool) -> Cut:
        """A cut at this block, ready to be put."""
        whole = self.tokens, self.special, self.has_class
        return Cut(self.path, self.layer, self.adapter, *whole, keep_rate, keep_rate, fuse)


def cuts_of(module: nn.Module) -> list[Cut]:
    """The cuts in a network, in the order of its module tree; not the blocks behind that drop nothing themselves."""
    found = (layer.__dict__.get("forward") for layer in module.modules())
    return [cut for cut in found if isinstance(cut, Cut) and cut.keep_rate < 1]


def set_progress(module: nn.Module, progress: float, shrink: float = 1.0) -> None:
    """Move every cut between keep rate 1 (``progress`` 0) and its own (``shrink``), along EViT's half cosine.

    For the schedule of a training loop; at 0 the network is the original, bit for bit, unless ``shrink`` is 0.
    """
    share = 1.0 if progress >= shrink else progress / shrink
    for cut in cuts_of(module):
        cut.rate = _tokens.scheduled(cut.keep_rate, share)


@contextmanager
def rates(module: nn.Module, rate: float) -> Iterator[None]:
    """Every cut at another keep rate, for a while."""
    before = [(cut, cut.rate) for cut in cuts_of(module)]
    try:
        for cut, _ in before:
            cut.rate = rate
        yield
    finally:
        for cut, old in before:
            cut.rate = old


def survey(module: nn.Module, task: Task, adapters: Sequence[Adapter] = ()) -> list[Block]:
    """The blocks that can be cut, in the order in which they compute.

    Raises:
        Unsupported: there is none, or one is no plain block: called twice, or not what its adapter says.
    """
    found = {path: (layer, adapter) for path, layer, adapter in blocks_of(module, (*adapters, *FAMILIES))}
    seen: list[tuple[str, list[Any], Any]] = []
    watchers = ((layer, _seeing(path, seen)) for path, (layer, _) in found.items())
    with hooked(watchers, with_kwargs=True), torch.no_grad():
        module(*example_inputs(task.specs))
    blocks: list[Block] = []
    for path, (tokens, *others), result in seen:
        layer, adapter = found[path]
        if any(block.layer is layer for block in blocks):
            raise Unsupported(f"reorganize: {path} is used more than once")
        if any(isinstance(one, Tensor) or one is True for one in others):
            raise Unsupported(f"reorganize: {path} attends with a mask, which would have to be cut as well")
        _hold(path, layer, adapter, tokens, result)
        branch = tokens.shape[2]
        index = sum(block.branch == branch for block in blocks)
        special, has_class = special_tokens(module, branch)
        blocks.append(Block(path, layer, adapter, branch, index, tokens.shape[1], special, has_class))
    return blocks


def _seeing(path: str, seen: list[tuple[str, list[Any], Any]]) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        seen.append((path, [*args, *kwargs.values()], result))

    return hook


def _hold(path: str, layer: nn.Module, adapter: Adapter, tokens: Tensor, result: Any) -> None:
    """An adapter's halves are the block. Raises InputError, Unsupported."""
    name = type(adapter).__name__
    if not isinstance(result, Tensor) or tokens.ndim != 3 or result.shape != tokens.shape:
        raise Unsupported(f"reorganize: {path} does not map tokens (N, tokens, channels) to tokens of the same shape")
    with torch.no_grad():
        halves = adapter.rest(layer, adapter.attend(layer, tokens)[0])
    if halves.shape != result.shape or bool((halves - result).abs().max() > CLOSE * result.abs().max()):
        raise InputError(
            f"reorganize: {name} does not compute what {type(layer).__name__} does ({path})",
            "rest(attend(tokens)[0]) must be the block's result; see compress/_attention.py",
        )
