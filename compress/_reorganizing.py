"""The steps of ``reorganize``: find the blocks, choose cuts and keep rate, try the network, say what was done."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgepack import usercode
from edgepack.compress._attention import FAMILIES, Adapter
from edgepack.compress._cuts import Block, Cut, set_progress, survey
from edgepack.compress._kept import findings
from edgepack.compress._macs import macs
from edgepack.compress._rates import Budget, solve
from edgepack.compress._tokens import tokens_behind
from edgepack.compress._tune import Hold, tune
from edgepack.errors import InputError, Unsupported
from edgepack.graph import flatten
from edgepack.models.resolution import fit
from edgepack.tracing import example_inputs

if TYPE_CHECKING:
    from edgepack.compress.reorganize import Reorganize
    from edgepack.contracts import Run
    from edgepack.task import Task

QUARTERS = (1, 2, 3)
ADAPTER_HINT = "say how its blocks compute: adapter = 'file.py:Class', as compress/_attention.py shows"


@dataclass(eq=False)
class Reorganizing:
    """One run of the pass."""

    options: Reorganize
    task: Task
    run_: Run

    def run(self, module: nn.Module) -> nn.Module:
        blocks = survey(module, self.task, self._adapters(module))
        if not blocks:
            names = ", ".join(dict.fromkeys(adapter.block for adapter in FAMILIES))
            raise Unsupported(
                f"reorganize: {type(module).__name__} has no blocks of a kind that is known ({names})", ADAPTER_HINT
            )
        chosen = self._chosen(blocks)
        one = example_inputs(self.task.specs, batch=1)
        before = shapes(module, one), macs(module, one)
        limit = self._limit(module, before[1])
        cuts = [block.cut(self.options.rate_at(block.index), self.options.fuse) for block in chosen]
        for cut in (*cuts, *(block.cut(1.0, False) for block in _behind(blocks, chosen))):
            cut.put()
        self._try(module, before[0], one)
        if self.options.budget is not None:
            solve(Budget(self.options.budget, limit, before[1]), module, cuts, self.task, self.run_)
        self._tune(module)
        self._say(module, blocks, cuts, before[1], macs(module, one))
        return module

    def _adapters(self, module: nn.Module) -> Sequence[Adapter]:
        if self.options.adapter is None:
            return ()
        where, _, _ = self.options.adapter.rpartition(":")
        beside = Path(inspect.getfile(type(module))).parent
        folder = beside if (beside / where).is_file() else Path()
        cls = usercode.load(self.options.adapter, folder)
        adapter = cls() if isinstance(cls, type) else cls
        lacks = [name for name in ("block", "attend", "rest") if getattr(adapter, name, None) is None]
        if lacks:
            raise InputError(
                f"reorganize: the adapter {self.options.adapter} lacks {', '.join(lacks)}",
                "compress/_attention.py says what an adapter offers",
            )
        return (adapter,)

    def _chosen(self, blocks: Sequence[Block]) -> list[Block]:
        """The blocks to cut: those named, or the quarters of each branch's depth."""
        depth = {block.branch: block.index + 1 for block in blocks}
        deepest = max(depth.values())
        for index in self.options.blocks:
            if index >= deepest:
                raise InputError(
                    f"reorganize: there is no block {index}", f"blocks are counted from 0 to {deepest - 1}"
                )
        wanted = {
            branch: set(self.options.blocks) or {max(count * quarter // 4, 1) for quarter in QUARTERS}
            for branch, count in depth.items()
        }
        chosen = [block for block in blocks if block.index in wanted[block.branch]]
        for block in chosen:
            if block.tokens <= block.special:
                raise InputError(
                    f"reorganize: a cut at {block.path} would leave no token: it reads {block.tokens}, all special"
                )
        return chosen

    def _tune(self, module: nn.Module) -> None:
        """Train while the keep rates fall and afterwards; without settings they are what they are to be."""
        shrink = self.options.shrink
        hold = Hold(schedule=[lambda progress: set_progress(module, progress, shrink)], settled=shrink)
        tune(module, self.task, self.run_, self.options.tune, hold)
        if self.options.tune is not None and shrink > 0:
            self.run_.note("tune: the score before is the uncut network's, from which the keep rate falls")

    def _limit(self, module: nn.Module, before: int) -> float:
        """What the budget allows; ``before`` are the multiply-accumulates of the network without cuts."""
        height = self.options.cost_of
        if height is None:
            return 0.0 if self.options.budget is None else float(getattr(self.options, self.options.budget))
        spec = self.task.specs[0]
        if len(self.task.specs) > 1 or len(spec.shape) != 4:
            raise InputError("reorganize: cost_of is for networks of one image")
        channels, own, width = (int(axis) for axis in spec.shape[1:])
        if height >= own:
            raise InputError(
                f"reorganize: cost_of is the height of smaller images than the task's {own} × {width}, not {height}",
                "give the task larger images, and interpolate = true in [model]",
            )
        small = height, round(width * height / own)
        cost = macs(fit(copy.deepcopy(module), *small), [torch.zeros(1, channels, *small)])
        self.run_.note(f"uncut on images of {small[0]} × {small[1]}: {cost / 1e9:.3f} G multiply-accumulates")
        return cost / before

    def _try(self, module: nn.Module, expected: list[tuple[int, ...]], inputs: Sequence[Tensor]) -> None:
        """Raises Unsupported where the network needs the tokens that went."""
        try:
            found = shapes(module, inputs)
        except (RuntimeError, ValueError, IndexError) as error:
            raise Unsupported(
                f"reorganize: behind the cuts {type(module).__name__} needs every token in its place "
                f"({usercode.sentence(error)})",
                "leave the pass out for this network, or cut later: blocks = […]",
            ) from error
        if found != expected:
            raise Unsupported(
                f"reorganize: the outputs of {type(module).__name__} are made of all tokens: they would be "
                f"{found}, not {expected}",
                "leave the pass out for this network",
            )

    def _say(self, module: nn.Module, blocks: Sequence[Block], cuts: Sequence[Cut], before: int, after: int) -> None:
        method = "class attention" if cuts[0].has_class else "attention received"
        if method == "attention received":
            self.run_.note(
                "there is no class token: tokens are ranked by the attention they receive, which is another method "
                "than EViT's and costs a whole attention matrix per cut"
            )
        lengths = token_counts(blocks, cuts)
        for branch in dict.fromkeys(block.branch for block in blocks):
            own = [block for block in blocks if block.branch == branch]
            counts = dict.fromkeys(tokens for block in own for tokens in lengths[block.path])
            places = ", ".join(str(block.index) for block in own if block.path in {cut.path for cut in cuts})
            self.run_.note(f"tokens {' → '.join(map(str, counts))}, behind the attention of blocks {places}")
        rates = list(dict.fromkeys(cut.keep_rate for cut in cuts))
        said = ", ".join(f"{rate:g}" for rate in rates)
        self.run_.note(
            f"keep rate {said}: {after / 1e9:.3f} G multiply-accumulates, {after / before:.3f} × the "
            f"{before / 1e9:.3f} G before"
        )
        found = findings(module, blocks, cuts, lengths, self.task, self.run_)
        self.run_.record("tokens", {
            "method": method, "keep_rate": rates[0] if len(rates) == 1 else rates, "fuse": self.options.fuse,
            "macs": {"before": before, "after": after}, **found,
        })  # fmt: skip


def _behind(blocks: Sequence[Block], cut: Sequence[Block]) -> list[Block]:
    """Blocks that read fewer tokens because of the cuts, and are not cut themselves."""
    first = {block.branch: block.index for block in reversed(cut)}
    return [block for block in blocks if block not in cut and block.index > first.get(block.branch, len(blocks))]


def token_counts(blocks: Sequence[Block], cuts: Sequence[Cut]) -> dict[str, tuple[int, int]]:
    """Tokens that each block reads, and those that it gives."""
    at = {cut.path: cut for cut in cuts}
    found: dict[str, tuple[int, int]] = {}
    now: dict[int, int] = {}
    for block in blocks:
        tokens = now.get(block.branch, block.tokens)
        cut = at.get(block.path)
        now[block.branch] = tokens if cut is None else tokens_behind(tokens, cut.special, cut.keep_rate, cut.fuse)
        found[block.path] = tokens, now[block.branch]
    return found


def shapes(module: nn.Module, inputs: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Shapes of a network's outputs."""
    with torch.no_grad():
        return [tuple(one.shape) for one in flatten(module(*inputs))]
