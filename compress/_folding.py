"""Which layer a batch norm can be merged with, and the merging, on a graph view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgepack.compress._affine import Affine, affine_of, channels_type, merge_after, merge_before
from edgepack.compress._axis import backward, forward
from edgepack.compress._graph import (
    Call,
    GraphView,
    argument,
    named,
    operator_of,
    owner_path,
    put_layer,
    readers,
    shape,
)

aten = torch.ops.aten
WORDS = {
    aten.cat: "a concatenation",
    aten.add: "a sum",
    aten.add_: "a sum",
    aten.mul: "a product",
    aten.relu: "a ReLU",
    aten.relu_: "a ReLU",
}


@dataclass(frozen=True)
class Target:
    """A layer call that one call of a batch norm can be merged with.

    Attributes:
        call: of the layer.
        before: the batch norm comes before the layer, not after it.
    """

    call: Call
    before: bool


@dataclass(eq=False)
class Folding:
    """Folds what can be folded; afterwards the lists say what was done.

    Attributes:
        view: of the module, which is edited in place; the view follows.
        leave: patterns of layers to leave alone.
        folded: paths of the batch norms that are gone.
        left: path → reason, for those that stay.
        shared: layers to be given one copy per call, so that batch norms can be folded into them.
        largest: max |scale| of a folded batch norm, and its path.
    """

    view: GraphView
    leave: Sequence[str] = ()
    folded: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    shared: list[nn.Module] = field(default_factory=list)
    largest: tuple[float, str] = (0.0, "")

    def __post_init__(self) -> None:
        self._owned = Counter(owner_path(node) for node in self.view.nodes)

    def run(self) -> None:
        """Fold until nothing more can be: two batch norms in a row become one, which may then go too."""
        pending = list(dict.fromkeys(call.layer for call in self.view.calls if isinstance(call.layer, _BatchNorm)))
        progress = True
        while progress:
            self.left, self.shared = self._functional(), []
            remaining = [norm for norm in pending if not self._try(norm)]
            progress, pending = len(remaining) < len(pending), remaining

    def _try(self, norm: _BatchNorm) -> bool:
        calls = self.view.calls_of(norm)
        reason = self._unfit(norm, calls)
        affine = affine_of(norm) if reason is None else None
        if affine is not None and affine.finite:
            found = [self._target(call, affine) for call in calls]
            targets = [item for item in found if isinstance(item, Target)]
            reason = next((item for item in found if isinstance(item, str)), None)
            if targets and (reason is not None or not self._exclusive(targets)):
                shared = self._share([norm, *(target.call.layer for target in targets)])
                reason = reason or f"{shared} is shared with a place that needs other weights"
            elif targets:
                reason = self._merge(norm, targets, affine)
        elif affine is not None:
            reason = "its statistics are not finite"
        if reason is not None:
            self.left.update({call.path: reason for call in calls})
        return reason is None

    def _unfit(self, norm: _BatchNorm, calls: list[Call]) -> str | None:
        """Why a batch norm cannot be folded whatever is around it."""
        paths = Counter(call.path for call in calls)
        for call in calls:
            if named(call.path, self.leave):
                return "'leave' names it"
            if norm.running_mean is None or argument(call.node, "training") is not False:
                return "it uses the statistics of the batch, not running ones"
            if call.obstacle is not None:
                return call.obstacle
            if self._owned[call.path] != paths[call.path]:
                return f"{type(norm).__name__} computes more than a batch norm"
        return None

    def _target(self, call: Call, affine: Affine) -> Target | str:
        """The layer to merge one call with: the one before it if possible, else the one after it, else why not."""
        before = self._producer(call, affine)
        if isinstance(before, Target):
            return before
        after = self._consumer(call, affine)
        return after if isinstance(after, Target) else f"{before}, {after}"

    def _producer(self, call: Call, affine: Affine) -> Target | str:
        node, axis, zeros = call.node.args[0], 1, False
        while True:
            assert isinstance(node, fx.Node)
            source = self.view.call_at(node)
            step = None if source else backward(node, axis)
            if source is None and step is None:
                return f"its input is {_words(node, self.view)}"
            if len(readers(node)) != 1:
                return f"other operators also read {_words(node, self.view)} before it"
            if source is not None:
                break
            assert step is not None
            node, axis, zeros = node.args[0], step.axis, zeros or step.zeros
        if not isinstance(source.layer, (_ConvNd, nn.Linear, _BatchNorm)):
            return f"its input is {_words(node, self.view)}"
        if zeros and affine.shifts:
            return f"zeros are padded between {source.path} and it"
        return self._checked(Target(source, before=False), call, axis, len(shape(node)))

    def _consumer(self, call: Call, affine: Affine) -> Target | str:
        node, axis, zeros = call.node, 1, False
        while True:
            users = readers(node)
            if len(users) != 1:
                return "its output has several readers"
            reader = self.view.call_at(users[0])
            step = None if reader or users[0].args[0] is not node else forward(users[0], axis)
            if reader is not None and isinstance(reader.layer, (_ConvNd, nn.Linear)):
                break
            if step is None:
                return f"its output goes to {_words(users[0], self.view)}"
            node, axis, zeros = users[0], step.axis, zeros or step.zeros
        if affine.shifts and (zeros or not _every_tap_sees_input(reader)):
            return f"{reader.path} sees zeros beside its output"
        return self._checked(Target(reader, before=True), call, axis, len(shape(node)))

    def _checked(self, target: Target, norm: Call, axis: int, rank: int) -> Target | str:
        path, layer = target.call.path, target.call.layer
        if named(path, self.leave):
            return f"'leave' names {path}"
        if target.call.obstacle is not None:
            return f"{path} cannot be edited ({target.call.obstacle})"
        if axis != _channel_axis(layer, rank):
            return f"{path} has its channels on another axis"
        if channels_type(layer) != channels_type(norm.layer):
            return f"{path} is {channels_type(layer)}, it is {channels_type(norm.layer)}".replace("torch.", "")
        return target

    def _exclusive(self, targets: list[Target]) -> bool:
        """Whether every call of each target layer is next to this batch norm, on the same side."""
        uses = Counter((target.call.layer, target.before) for target in targets)
        return all(count == len(self.view.calls_of(layer)) for (layer, _), count in uses.items())

    def _share(self, layers: list[nn.Module]) -> str:
        """Remember the layers that are called more than once; the path of one of them."""
        shared = [layer for layer in layers if len(self.view.calls_of(layer)) > 1]
        self.shared += [layer for layer in dict.fromkeys(shared) if layer not in self.shared]
        return self.view.calls_of(shared[-1])[0].path

    def _merge(self, norm: _BatchNorm, targets: list[Target], affine: Affine) -> str | None:
        done: list[tuple[nn.Module, object, object]] = []
        for layer, before in dict.fromkeys((target.call.layer, target.before) for target in targets):
            done.append((layer, layer.weight, layer.bias))
            if not (merge_before if before else merge_after)(layer, affine):
                for changed, weight, bias in reversed(done):
                    changed.weight, changed.bias = weight, bias  # type: ignore[assignment]
                return f"merged weights overflow {channels_type(layer)}".replace("torch.", "")
        calls = self.view.calls_of(norm)
        for call in calls:
            self.view.bypass(call.node)
        put_layer(self.view.module, norm, _remainder(norm))
        self.folded += list(dict.fromkeys(call.path for call in calls))
        self.largest = max(self.largest, (affine.largest, calls[0].path))
        return None

    def _functional(self) -> dict[str, str]:
        """Batch norms that no layer does."""
        norms = [node for node in self.view.nodes if operator_of(node) is aten.batch_norm]
        return {
            owner_path(node) or "forward": "a batch norm is called as a function there, not as a layer"
            for node in norms
            if self.view.call_at(node) is None
        }


def _remainder(norm: _BatchNorm) -> nn.Module:
    """What stays of a batch norm without its arithmetic: nothing, or the activation that some bring along."""
    children = dict(norm.named_children())
    rest = nn.Sequential() if children else nn.Identity()
    for name, child in children.items():
        rest.add_module(name, child)
    return rest.eval()


def _channel_axis(layer: nn.Module, rank: int) -> int:
    if isinstance(layer, _BatchNorm):
        return 1
    return rank - 1 - (len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0)


def _every_tap_sees_input(call: Call) -> bool:
    """Whether each output of a layer is computed from the whole kernel, with nothing padded."""
    if not isinstance(call.layer, _ConvNd):
        return True
    dims = len(call.layer.kernel_size)
    reach = [d * (k - 1) for d, k in zip(_each(call, "dilation", dims), call.layer.kernel_size, strict=True)]
    if not isinstance(call.layer, _ConvTransposeNd):
        padding = argument(call.node, "padding")
        if isinstance(padding, str):
            return padding == "valid" or not any(reach)
        return not any(_each(call, "padding", dims))
    # A transposed convolution with stride 1 has partial kernels only in the borders that its padding cuts off.
    cut = [p - o for p, o in zip(_each(call, "padding", dims), _each(call, "output_padding", dims), strict=True)]
    return set(_each(call, "stride", dims)) == {1} and all(c >= r for c, r in zip(cut, reach, strict=True))


def _each(call: Call, name: str, dims: int) -> list[int]:
    values = argument(call.node, name)
    values = [values] if isinstance(values, int) else list(values)
    return values * dims if len(values) == 1 else values


def _words(node: fx.Node, view: GraphView) -> str:
    call = view.call_at(node)
    if call is not None:
        return f"{call.path} ({type(call.layer).__name__})"
    if node.op == "placeholder":
        return "the network's input"
    if node.op == "output":
        return "the network's output"
    kind = operator_of(node)
    return WORDS.get(kind) or str(getattr(kind, "__name__", node.name)).strip("_")
