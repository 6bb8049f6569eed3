"""Weights and activations of few bits, after training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from edgepack.compress._tune import Tune
from edgepack.contracts import Pass, Run
from edgepack.errors import InputError, Unsupported, nearest, require

if TYPE_CHECKING:
    from torch import nn

    from edgepack.task import Task

CALIBRATIONS = ("minmax", "percentile", "mse", "entropy")
ACTIVATIONS = ("static", "dynamic", "auto")
TARGETS = ("avx2",)
FOUR, LEAST_GROUP = 4, 16
WIDE = 16  # bits of activations in dynamic fixed point
MIXED = (8, 4)  # bits that files have a type for
ROUNDINGS = ("nearest", "gptq", "adaround")
METHODS = ("ptq", "qat")
# Published settings. CoDeNet (Dong et al., arXiv:2006.08357): 4-bit weights per channel, 8-bit activations in ranges
# without outliers, the first layer in 8 bits, all trained on from the float network.
PRESETS: dict[str, dict[str, Any]] = {
    "codenet": {"weight_bits": 4, "activation_bits": 8, "calibrate": "percentile", "method": "qat"},
}


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Round the weights of convolutions and linear layers to 8 or 4 bits and find the ranges of activations.

    ::

        conv → norm → relu → conv      becomes   conv' → relu → conv'      (weights on a grid, ranges in the plan)

    Batch norms are folded first. The network stays a float network whose weights lie on their grid (one symmetric
    scale per output channel); each exporter makes integers of it as its engine wants them.

    Attributes:
        preset: published settings that take the place of options left out: ``codenet`` (4-bit weights, 8-bit
            activations, ranges by percentile, trained on with ``qat``).
        bits: of weights and activations; 8, also when nothing is said.
        weight_bits: instead of ``bits``: of weights; 8 or 4. With 4, layers that read an input of the network keep 8:
            they hold few weights, and all else depends on them. A list, such as [8, 6, 4, 3], says what to choose
            from for each layer with ``size_ratio`` or ``bops_ratio``; without it, 8 and 4.
        size_ratio: largest share of the float size that parameters may take, counted in bits (files hold more than
            4 bits in 8, and fewer in 4). Each layer gets the bits that cost the outputs least.
        bops_ratio: largest share of the float network's bit operations (multiply-accumulates × bits of weights × bits
            of activations) that layers with weights may take.
        activation_bits: with ``weight_bits``: of activations; 8, or left out to leave them float: files of a quarter
            of the size that compute in float. 4, beside 4-bit weights: what layers with such weights multiply has 16
            levels; layers that read an input of the network or give its output keep 8 bits, and so does what no
            layer multiplies. In ONNX, OpenVINO and C. 16, beside 8-bit weights: dynamic fixed point, 16-bit integers
            with one exponent per tensor, for networks that 8 bits hurt: nearly exact, and slow; in TFLite.
        method: ``ptq``: after training, from calibration data alone. ``qat``: the network is then trained further with
            all of this rounding, and learns weights, biases, steps and ranges. Needs the extra ``qat``.
        tune: of ``qat``: how to train. Without it: 5 epochs with AdamW, which suits learned steps, following the
            original.
        activations: ``static``: ranges are fixed now, from ``task.calibration``. ``dynamic``: linear layers find the
            range of what they read, over the whole batch, when they run; convolutions compute in float where the
            engine would be slow otherwise. ``auto``: each export writes both, where its format has both, and keeps the
            faster on this machine of those close to the original.
        calibrate: how ranges are read from what was seen: ``minmax`` (all of it), ``percentile`` (99.99 %), ``mse``
            (least squared error), ``entropy`` (least divergence of the distribution).
        rounding: of weights: ``nearest``; ``gptq``: columns in turn, each error passed on to those that follow; or
            ``adaround``: whether each weight goes up or down is learned, layer after layer.
        rounding_seconds: longest time for ``adaround``; layers it does not suffice for are as good as with ``gptq``.
        group_size: with 4-bit weights and float activations: columns that share a scale, in linear layers and 1×1
            convolutions whose rows are made of such groups; 16 or more, a power of two. None: one scale per row.
        codebook: with 4-bit weights and float activations: output channels that share a table of 16 values, found by
            k-means, in place of evenly spaced steps; one table for layers with no more channels. In Core ML, where
            more than one table per layer needs iOS 18. None: no tables.
        equalize: bring the channels between two layers, or between a layer norm and the linear layers behind it, to
            one size where that leaves the network the same.
        bias_correct: take the mean error of each output channel out of its bias.
        explain: find out per layer what rounding costs and why, and try remedies, on a few samples; for the report.
            With ``qat``: of the network before it is trained further.
        target: ``avx2``: for x86 processors without VNNI too, where 8-bit products saturate: layers that do on the
            calibration data get 7-bit weights. None: nothing is done for them.
        leave: names of layers to leave in float, with ``*`` and ``?``; a name also covers what is inside it.
    """

    stage: ClassVar[int] = 90

    preset: str | None = None
    bits: int | None = None
    weight_bits: int | tuple[int, ...] | None = None
    size_ratio: float | None = None
    bops_ratio: float | None = None
    activation_bits: int | None = None
    method: str = "ptq"
    tune: Tune | None = None
    activations: str = "static"
    calibrate: str = "mse"
    rounding: str = "gptq"
    rounding_seconds: float = 600.0
    group_size: int | None = None
    codebook: int | None = None
    equalize: bool = True
    bias_correct: bool = True
    explain: bool = True
    target: str | None = None
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._take_preset()
        self._check_bits()
        self._check_mixture()
        self._check_method()
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations is one of {', '.join(ACTIVATIONS)}, not {self.activations!r}")
        if self.form == "float" and self.activations != "static":
            raise ValueError(
                f"activations = {self.activations!r} says how activations are rounded, but weight_bits without "
                "activation_bits leaves them float"
            )
        if self.calibrate not in CALIBRATIONS:
            raise ValueError(f"calibrate is one of {', '.join(CALIBRATIONS)}, not {self.calibrate!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding is one of {', '.join(ROUNDINGS)}, not {self.rounding!r}")
        if self.rounding_seconds < 0:
            raise ValueError(f"rounding_seconds is a time, not {self.rounding_seconds!r}")
        if self.target not in (None, *TARGETS):
            raise ValueError(f"target is {', '.join(map(repr, TARGETS))} or left out, not {self.target!r}")
        if self.target is not None and self.stored_bits != 8:
            raise ValueError(f"target = {self.target!r} is for 8-bit weights: products of 4-bit ones do not saturate")
        if self.target is not None and self.form != "static":
            raise ValueError(f"target = {self.target!r} needs activations in fixed ranges: activations = 'static'")
        if self.target is not None and self.activation_bits == WIDE:
            raise ValueError(f"target = {self.target!r} is for 8-bit activations: 16-bit ones are no bytes")
        if isinstance(self.leave, str) or not all(isinstance(name, str) and name for name in self.leave):
            raise ValueError(f"leave is a list of layer names or patterns, not {self.leave!r}")
        object.__setattr__(self, "leave", tuple(self.leave))

    def _take_preset(self) -> None:
        if self.preset is None:
            return
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {' or '.join(map(repr, PRESETS))}, not {self.preset!r}")
        if self.bits is not None:
            raise ValueError(f"preset = {self.preset!r} says how many bits: leave bits out")
        for one in fields(self):
            if one.name in PRESETS[self.preset] and getattr(self, one.name) == one.default:
                object.__setattr__(self, one.name, PRESETS[self.preset][one.name])

    def _check_bits(self) -> None:
        for name in ("bits", "weight_bits", "activation_bits"):
            allowed = {"bits": (8,), "weight_bits": (4, 8), "activation_bits": (4, 8, WIDE)}[name]
            given = getattr(self, name)
            if given not in (None, *allowed) and not (name == "weight_bits" and isinstance(given, (list, tuple))):
                said = " or ".join(filter(None, (", ".join(map(str, allowed[:-1])), str(allowed[-1]))))
                raise ValueError(f"{name} is {said}, not {getattr(self, name)!r}")
        if self.bits is not None and (self.weight_bits is not None or self.activation_bits is not None):
            raise ValueError("bits is for weights and activations; give it, or weight_bits with activation_bits")
        if self.activation_bits is not None and self.weight_bits is None:
            raise ValueError("activation_bits needs weight_bits")
        if self.activation_bits == 4 and (self.weight_bits != 4 or self.activations != "static"):
            raise ValueError("activation_bits = 4 is for weight_bits = 4 and activations = 'static'")
        if self.activation_bits == WIDE and (self.weight_bits != 8 or self.activations != "static"):
            raise ValueError("activation_bits = 16 is for weight_bits = 8 and activations = 'static'")

    def _check_method(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, not {self.method!r}")
        if self.method == "ptq" and self.tune is not None:
            raise ValueError("tune says how to train: method = 'qat'")
        if self.method == "qat" and self.form != "static":
            raise ValueError("method = 'qat' learns fixed ranges: it needs activation_bits with weight_bits, and "
                             "activations = 'static'")  # fmt: skip
        if self.tune is not None and self.tune.features:
            raise ValueError("tune.features name layers, and method = 'qat' trains the graph of operators")
        if self.method == "qat" and self.target is not None:
            raise ValueError(f"target = {self.target!r} is for method = 'ptq'")
        if self.method == "qat" and self.activation_bits == WIDE:
            raise ValueError("activation_bits = 16 leaves nothing to train: method = 'ptq'")

    @property
    def training(self) -> Tune:
        """How ``qat`` trains."""
        return self.tune or Tune(optimizer="adamw")

    def _check_mixture(self) -> None:
        if isinstance(self.weight_bits, list):
            object.__setattr__(self, "weight_bits", tuple(self.weight_bits))
        if isinstance(self.weight_bits, tuple):
            if not self.weight_bits or not all(isinstance(b, int) and 2 <= b <= 8 for b in self.weight_bits):
                raise ValueError(f"weight_bits is a list of bits from 2 to 8, not {self.weight_bits!r}")
            if not self.limits:
                raise ValueError("weight_bits is a list to choose from: say within which size_ratio or bops_ratio")
        elif self.limits and self.weight_bits is not None:
            raise ValueError(f"{next(iter(self.limits))} chooses weight_bits, which is a list then or left out")
        if bad := [f"{name} = {share!r}" for name, share in self.limits.items() if not 0 < share <= 1]:
            raise ValueError(f"{bad[0]}: a share is above 0 and at most 1")
        if self.group_size is not None:
            self._check_groups(self.group_size)
        if self.codebook is not None:
            self._check_codebook(self.codebook)
        if self.limits and self.target is not None:
            raise ValueError(
                f"target = {self.target!r} has its own bits for some layers: leave {', '.join(self.limits)}"
            )

    def _check_groups(self, size: int) -> None:
        if size < LEAST_GROUP or size & (size - 1):
            raise ValueError(f"group_size is a power of two from {LEAST_GROUP}, not {size}")
        if self.weight_bits != FOUR or self.form != "float":
            raise ValueError("group_size needs weight_bits = 4 and float activations (no activation_bits)")

    def _check_codebook(self, channels: int) -> None:
        if channels < 1:
            raise ValueError(f"codebook is a number of channels from 1, not {channels}")
        if self.weight_bits != FOUR or self.form != "float":
            raise ValueError("codebook needs weight_bits = 4 and float activations (no activation_bits)")
        if self.group_size is not None:
            raise ValueError("codebook gives tables in place of scales: leave group_size out")
        if self.rounding == "adaround":
            raise ValueError("rounding = 'adaround' learns steps of a grid, and codebook has none: 'gptq' or 'nearest'")

    @property
    def limits(self) -> dict[str, float]:
        """Of what the bits of each layer are chosen for; empty where all have the same."""
        given = {"size_ratio": self.size_ratio, "bops_ratio": self.bops_ratio}
        return {name: share for name, share in given.items() if share is not None}

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits a weight may have, most first."""
        if isinstance(self.weight_bits, tuple):
            return tuple(sorted(set(self.weight_bits), reverse=True))
        return MIXED if self.limits else (self.weight_bits or self.bits or 8,)

    @property
    def stored_bits(self) -> int:
        """Of a weight, the most."""
        return self.widths[0]

    @property
    def form(self) -> str:
        """How activations are rounded: ``static``, ``dynamic``, ``auto``, or ``float`` for not at all."""
        return "float" if self.weight_bits is not None and self.activation_bits is None else self.activations

    def check(self, module: nn.Module, task: Task) -> None:
        """Refuse a task without the data it takes, and a name in ``leave`` that no layer has."""
        from edgepack.compress._graph import named
        from edgepack.compress._tune_feed import training_data

        if self.method == "qat":
            require("brevitas.core.quant", "qat")
            training_data(task)
        if task.calibration is None:
            raise InputError("quantize: the task has no calibration data", "add calibration = {data = …} to [task]")
        if len(task.calibration) == 0:
            raise InputError("quantize: the calibration data are empty")
        paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
        for pattern in self.leave:
            if not any(named(path, [pattern]) for path in paths):
                raise InputError(f"quantize: leave: no layer is called {pattern!r}", nearest(pattern, paths))

    def apply(self, module: nn.Module, task: Task, run: Run) -> nn.Module:
        from edgepack.compress._quantizing import Quantizing

        if run.plan.nodes:
            raise Unsupported("quantize: another pass has already planned operators of this network")
        return Quantizing(self, task, run).run(module.eval())
