"""Fewer tokens in the later blocks of a vision transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgepack.compress._tune import Tune
from edgepack.contracts import Pass, Run
from edgepack.errors import InputError, Unsupported

if TYPE_CHECKING:
    from torch import nn

    from edgepack.task import Task

BUDGETS = ("latency_ratio", "macs_ratio", "cost_of", "score_drop")
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
    token are ranked by the attention received, which is another method. With ``tune`` the network is trained while the
    keep rate falls from 1 to its own, and afterwards.

    Attributes:
        keep_rate: share of the candidates that stays at each cut, above 0, at most 1; 0.7 if nothing is said.
        blocks: where to cut, counted from 0; default: a quarter, half and three quarters of the depth, as published for
            twelve blocks. In a network of few blocks later ones may lose far less (docs/tokens.md).
        keep_rates: instead of ``keep_rate``: one for each of ``blocks``.
        fuse: join the others into one token; else they are dropped.
        latency_ratio: instead of ``keep_rate``: the largest rate whose latency over the network's, measured on this
            host with ONNX Runtime, is at most this.
        macs_ratio: instead of ``keep_rate``: the same for multiply-accumulate operations.
        cost_of: instead of ``keep_rate``: the height of smaller images; the largest rate at which the network costs
            no more multiply-accumulates than uncut on those: more tokens at equal cost. A network for small images
            takes the task's with ``interpolate = true`` in ``[model]``.
        score_drop: instead of ``keep_rate``: the smallest rate that loses at most this much of the task's metric on
            the calibration data; without targets or metric there, of agreement with the network before.
        adapter: a class that says how blocks of your own compute: ``file.py:Class`` (beside the network's own file,
            or in the current folder) or ``package.module:Class``; ``compress/_attention.py`` shows one.
        tune: how to train, by default to follow the network before, and labels where the data have them.
        shrink: share of the training in which the keep rate falls, as half a cosine; 0: it has its value at once.
    """

    stage: ClassVar[int] = 20

    keep_rate: float | None = None
    keep_rates: tuple[float, ...] = ()
    blocks: tuple[int, ...] = ()
    fuse: bool = True
    latency_ratio: float | None = None
    macs_ratio: float | None = None
    cost_of: int | None = None
    score_drop: float | None = None
    adapter: str | None = None
    tune: Tune | None = None
    shrink: float = 0.3

    def __post_init__(self) -> None:
        for name, value in (("keep_rate", self.keep_rate), *(("keep_rates", value) for value in self.keep_rates)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is above 0 and at most 1, not {value!r}")
        given = [name for name in ("keep_rate", "keep_rates", *BUDGETS) if getattr(self, name) not in (None, ())]
        if len(given) > 1:
            raise ValueError(f"give one of keep_rate, keep_rates, {', '.join(BUDGETS)}, not {' and '.join(given)}")
        for name in ("latency_ratio", "macs_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is above 0 and at most 1, not {value!r}")
        if self.score_drop is not None and not 0 <= self.score_drop < 1:
            raise ValueError(f"score_drop is at least 0 and below 1, not {self.score_drop!r}")
        if self.cost_of is not None and self.cost_of < 1:
            raise ValueError(f"cost_of is a height in pixels, not {self.cost_of!r}")
        if not 0 <= self.shrink < 1:
            raise ValueError(f"shrink is at least 0 and below 1, not {self.shrink!r}")
        self._check_blocks()

    def _check_blocks(self) -> None:
        if any(not isinstance(index, int) or index < 0 for index in self.blocks):
            raise ValueError(f"blocks are numbers of blocks, counted from 0, not {self.blocks!r}")
        if not self.keep_rates:
            object.__setattr__(self, "blocks", tuple(sorted(set(self.blocks))))
            return
        if len(self.keep_rates) != len(self.blocks) or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(
                f"keep_rates are one for each of blocks: {len(self.keep_rates)} for {list(self.blocks)} do not fit"
            )
        pairs = sorted(zip(self.blocks, self.keep_rates, strict=True))
        object.__setattr__(self, "blocks", tuple(index for index, _ in pairs))
        object.__setattr__(self, "keep_rates", tuple(rate for _, rate in pairs))

    @property
    def budget(self) -> str | None:
        """The budget that was given, None for a fixed keep rate."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)

    def rate_at(self, block: int) -> float:
        """The keep rate that was given for a cut at this block; where a budget is to be met, the one to begin with."""
        if self.keep_rates:
            return self.keep_rates[self.blocks.index(block)]
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
