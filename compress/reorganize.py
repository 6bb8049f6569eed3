"""Fewer tokens in the later blocks of a vision transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgepack.contracts import Pass, Run
from edgepack.errors import InputError, Unsupported

if TYPE_CHECKING:
    from torch import nn

    from edgepack.task import Task

BUDGETS = ("latency_ratio", "macs_ratio", "score_drop")
KEEP_RATE = 0.7


@dataclass(frozen=True, kw_only=True)
class Reorganize(Pass):
    """Keep the tokens that the class token attends to and join the others into one (EViT).

    ::

        block: attention → + → mlp → +      becomes      attention → + → [special, kept, fused] → mlp → +

    At each cut the candidates (all tokens but the special ones) are ranked by the class token's own attention, mean
    over heads; ⌈keep_rate · candidates⌉ stay and the others become one token, their sum weighted with that attention.
    Numbers of tokens are constants, and no parameter changes. Known are the ViT, DeiT and CrossViT of timm, ViT and
    DeiT of transformers, torchvision's ViT and networks of ``nn.TransformerEncoderLayer``. Networks without a class
    token are ranked by the attention received, which is another method. Train afterwards to regain accuracy.

    Attributes:
        keep_rate: share of the candidates that stays at each cut, above 0, at most 1; 0.7 if nothing is said.
        blocks: where to cut, counted from 0; default: a quarter, half and three quarters of the depth.
        fuse: join the others into one token; else they are dropped.
        latency_ratio: instead of ``keep_rate``: the largest rate whose latency over the network's, measured on this
            host with ONNX Runtime, is at most this.
        macs_ratio: instead of ``keep_rate``: the same for multiply-accumulate operations.
        score_drop: instead of ``keep_rate``: the smallest rate that loses at most this much of the task's metric on
            the calibration data; without targets or metric there, of agreement with the network before.
        adapter: a class that says how blocks of your own compute: ``file.py:Class`` (beside the network's own file,
            or in the current folder) or ``package.module:Class``; ``compress/_attention.py`` shows one.
    """

    stage: ClassVar[int] = 20

    keep_rate: float | None = None
    blocks: tuple[int, ...] = ()
    fuse: bool = True
    latency_ratio: float | None = None
    macs_ratio: float | None = None
    score_drop: float | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.keep_rate is not None and not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate is above 0 and at most 1, not {self.keep_rate!r}")
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) + (self.keep_rate is not None) > 1:
            raise ValueError(f"give one of keep_rate, {', '.join(BUDGETS)}, not several")
        for name in ("latency_ratio", "macs_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is above 0 and at most 1, not {value!r}")
        if self.score_drop is not None and not 0 <= self.score_drop < 1:
            raise ValueError(f"score_drop is at least 0 and below 1, not {self.score_drop!r}")
        if any(not isinstance(index, int) or index < 0 for index in self.blocks):
            raise ValueError(f"blocks are numbers of blocks, counted from 0, not {self.blocks!r}")
        object.__setattr__(self, "blocks", tuple(sorted(set(self.blocks))))

    @property
    def budget(self) -> str | None:
        """The budget that was given, None for a fixed keep rate."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)

    @property
    def rate(self) -> float:
        """The keep rate that was given; where a budget is to be met, the one to begin with."""
        return KEEP_RATE if self.keep_rate is None else self.keep_rate

    def check(self, module: nn.Module, task: Task) -> None:
        """Refuse networks whose tokens must keep their places, images of any size, and a budget without data."""
        from edgepack.compress._attention import grid_reason

        reason = grid_reason(module)
        if reason is not None:
            raise Unsupported(f"reorganize: {reason}", "leave the pass out for this network")
        for spec in task.specs:
            free = [axis for axis in spec.shape if isinstance(axis, str) and axis != "batch"]
            if free:
                raise Unsupported(
                    f"reorganize: numbers of tokens must be constants, but {free[0]} of input {spec.name!r} is dynamic",
                    "leave it out of dynamic in [task]",
                )
        if self.score_drop is not None and not task.calibration:
            raise InputError("reorganize: score_drop needs calibration data", "add calibration = {data = …} to [task]")

    def apply(self, module: nn.Module, task: Task, run: Run) -> nn.Module:
        from edgepack.compress._reorganizing import Reorganizing

        return Reorganizing(self, task, run).run(module.eval())
