"""Which values lie in planes: sparse 1×1 convolutions read them, all others like channels last.

::

    image → convolution → depthwise → sparse 1×1 → … → mean        nothing is transposed

Each convolution costs something in either layout, and so does each value that one step writes in one layout and another
reads in the other. The cheapest choice is a minimum cut (Greig, Porteous and Seheult, 1989).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepack.export import _c_planes_calls as calls
from edgepack.export._c_fuse import FILLS, IMAGES, mapped
from edgepack.export._c_graph import Buffer, Network, Step, View, channels_last, planar
from edgepack.export._c_layers import Window
from edgepack.export._c_pack import rounded
from edgepack.export._c_sparse import VECTOR, best_block, cost, dense_cost

PLANES, LAST = (0, 1, 2, 3), channels_last(4)
MANY = 0.25  # zeros of a layer, without which no network changes its layout
FEW = 4  # inputs of each group, up to which there is a kernel in planes
WALKS = ("unary_f32", "binary_f32", "copy")  # take any layout, fast where all values have the same

# In multiplications of the dense kernel; measured (docs/sparse_c.md).
TRANSPOSED = 50.0  # one value; by a step that copies anyway, or between steps that would else become one:
ON_THE_WAY, UNFUSED = 0.9 * TRANSPOSED, 1.1 * TRANSPOSED
DEPTHWISE, FEW_LAST, FEW_PLANES = 3.0, 1.5, 2.2  # one multiplication; in planes, depthwise times the stride


@dataclass(eq=False)
class Candidate:
    """A convolution with a kernel in both layouts.

    Attributes:
        source: what it reads, without padding.
        padding: steps that only put zeros around it.
        last, planes: what it costs.
    """

    step: Step
    source: View
    padding: Sequence[Step]
    last: float
    planes: float

    @property
    def sparse(self) -> bool:
        return _pointwise(self.step) and float(np.mean(self.step.options["weight"] == 0)) > MANY


def arrange(network: Network) -> None:
    """Change a network in place. One without zeros worth leaving out stays as it is."""
    candidates = [found for step in network.steps if (found := _candidate(network, step))]
    if not any(found.planes < found.last for found in candidates if found.sparse):
        return
    movable = {view.buffer: view for step in network.steps if (view := _movable(network, step))}
    chosen = _cut(network, candidates, movable)
    _move(network, [view for buffer, view in movable.items() if buffer in chosen])
    for candidate in candidates:
        if candidate.step in chosen:
            _into_planes(network, candidate)
    for step in list(network.steps):
        if step.kernel in IMAGES:
            _keep_last(network, step)


def _pointwise(step: Step) -> bool:
    weight, slide = step.options["weight"], step.options["window"]
    return bool(step.options["groups"] == 1 and weight.shape[2:] == (1, 1) and slide.stride == (1, 1))


def _candidate(network: Network, step: Step) -> Candidate | None:
    if step.kernel not in ("conv_f32", "depthwise_f32") or len(step.inputs) > 1:
        return None
    weight, slide = step.options["weight"], step.options["window"]
    pixels = step.output.shape[2] * step.output.shape[3]
    macs = float(weight.size * pixels * step.output.shape[0])
    source, padding = _unpadded(network, step)
    if pixels == 1 or source.buffer.constant is not None or (slide.padded and not padding):
        return None
    if _pointwise(step):
        matrix = weight.reshape(weight.shape[:2])
        costs = (dense_cost(matrix, pixels), cost(matrix, pixels, best_block(matrix, pixels)))
        last, planes = (step.output.shape[0] * paid for paid in costs)
        return None if padding else Candidate(step, source, (), last, planes)
    if weight.shape[1] > FEW:
        return None
    depthwise = (DEPTHWISE, DEPTHWISE * slide.stride[1])
    last, planes = depthwise if step.kernel == "depthwise_f32" else (FEW_LAST, FEW_PLANES)
    return Candidate(step, source, padding, last * macs, planes * macs)


def _unpadded(network: Network, step: Step) -> tuple[View, Sequence[Step]]:
    """What a convolution reads without the zeros around it, and the steps that put them there."""
    view, slide = step.inputs[0], step.options["window"]
    writers = network.writers(view.buffer)
    fills = [writer for writer in writers if writer.kernel in FILLS and writer.options["value"] == 0]
    copies = [writer for writer in writers if writer.kernel == "copy"]
    alone = network.readers(view.buffer) == [step] and len(writers) == 2
    if not (alone and len(fills) == len(copies) == 1) or list(fills[0].options["ends"]) != slide.ends:
        return view, ()
    return copies[0].inputs[0], (fills[0], copies[0])


def in_planes(buffer: Buffer, shape: Sequence[int]) -> View:
    """A value in planes; each begins at a whole vector."""
    n, channels, height, width = shape
    plane = rounded(height * width, VECTOR)
    buffer.size = n * channels * plane
    return View(buffer, (n, channels, height, width), (channels * plane, plane, width, 1), PLANES)


def _movable(network: Network, step: Step) -> View | None:
    """A value that may lie in either layout, as it is now: channels last."""
    view = step.output
    buffer = view.buffer
    if view.dtype != "float32" or len(view.sizes) != 4 or buffer.place != "arena" or view.count != buffer.size:
        return None
    listed, (_, channels, height, width) = view.in_order(LAST), view.shape
    if not listed.dense() or channels == 1 or height * width == 1 or len(network.writers(buffer)) > 1:
        return None
    target = in_planes(Buffer("float32", 0), view.shape).in_order(LAST)
    views = [other for step in network.readers(buffer) for other in step.inputs if other.buffer is buffer]
    return listed if all(mapped(other, listed, target) is not None for other in views) else None


# --- the choice ----------------------------------------------------------------------------------------------------


def _cut(network: Network, candidates: Sequence[Candidate], movable: Mapping[Buffer, View]) -> set[Any]:
    """Steps and buffers that are cheaper in planes."""
    import networkx  # type: ignore[import-untyped]

    graph = networkx.DiGraph()
    graph.add_nodes_from(("planes", "last"))
    for one, other, paid in _edges(network, candidates, movable):
        for pair in ((one, other), (other, one)):
            known = graph.get_edge_data(*pair, {"capacity": 0.0})["capacity"]
            graph.add_edge(*pair, capacity=known + paid)
    _, (chosen, _) = networkx.minimum_cut(graph, "planes", "last")
    return set(chosen)


def _edges(
    network: Network, candidates: Sequence[Candidate], movable: Mapping[Buffer, View]
) -> Iterator[tuple[Any, Any, float]]:
    """Pairs, and what it costs to have them in different layouts."""
    for candidate in candidates:
        yield "planes", candidate.step, candidate.last
        yield candidate.step, "last", candidate.planes
        yield candidate.step, _side(candidate.source, movable), TRANSPOSED * candidate.source.count
        yield candidate.step, _side(candidate.step.output, movable), UNFUSED * candidate.step.output.count
    padding = {step for candidate in candidates for step in candidate.padding}
    mine = {candidate.step for candidate in candidates}
    for step in network.steps:
        images = [view for view in (*step.inputs, step.output) if _image(view)]
        if step in mine or step in padding or _global_mean(step):
            continue
        if step.kernel in IMAGES:
            for view in images:
                paid = UNFUSED if view is step.output else TRANSPOSED
                yield "last", _side(view, movable), paid * view.count
        elif step.kernel in WALKS:
            paid = ON_THE_WAY if step.kernel == "copy" else UNFUSED
            for one, other in itertools.pairwise(images):
                yield _side(one, movable), _side(other, movable), paid * other.count


def _image(view: View) -> bool:
    return len(view.sizes) == 4 and view.dtype == "float32" and view.buffer.constant is None and 0 not in view.strides


def _side(view: View, movable: Mapping[Buffer, View]) -> Any:
    """A value as a node of the graph: itself, or the layout that it has."""
    if view.buffer in movable:
        return view.buffer
    return "planes" if planar(view) else "last"


def _global_mean(step: Step) -> bool:
    if step.kernel != "avg_pool_f32":
        return False
    slide: Window = step.options["window"]
    whole = step.inputs[0].shape[2:]
    return slide.size == whole and slide.before == (0, 0) and step.options["counts"] == whole[0] * whole[1]


# --- the change ----------------------------------------------------------------------------------------------------


def _move(network: Network, values: Sequence[View]) -> None:
    """Let values lie in planes."""
    targets = {view.buffer: (view, in_planes(Buffer("float32", 0), view.shape)) for view in values}

    def moved(view: View) -> View:
        if view.buffer not in targets:
            return view
        source, target = targets[view.buffer]
        found = mapped(view, source, target.in_order(LAST))
        assert found is not None, "a movable value has views that cannot be moved"
        return found

    for step in network.steps:
        step.inputs, step.output = [moved(view) for view in step.inputs], moved(step.output)
        if _global_mean(step) and planar(step.inputs[0]) and not _last(step.inputs[0]):
            step.kernel, step.options = "reduce_f32", {"function": "mean", "axes": [2, 3]}


def _last(view: View) -> bool:
    listed = view.in_order(LAST)
    return listed.sizes[-1] == 1 or listed.strides[-1] == 1


def _into_planes(network: Network, candidate: Candidate) -> None:
    """Compute a convolution in planes."""
    step = candidate.step
    source = candidate.padding[-1].inputs[0] if candidate.padding else step.inputs[0]
    for other in candidate.padding:
        network.steps.remove(other)
    pointwise = _pointwise(step)
    needs_arena = pointwise and source.buffer.place != "arena"  # it reads whole vectors
    if not planar(source) or needs_arena:
        source = _copied(network, step, source, in_planes(Buffer("float32", 0), source.shape))
    step.inputs[0] = source.in_order(PLANES)
    if not planar(step.output):
        _written(network, step, in_planes(Buffer("float32", 0), step.output.shape))
    step.output = step.output.in_order(PLANES)
    if pointwise:
        step.kernel = "sparse_f32"
    else:
        step.kernel = "window_f32"
        step.scratch = Buffer("float32", calls.scratch_size(step))


def _keep_last(network: Network, step: Step) -> None:
    """Give a step that reads channels last what it reads, and what it writes to whoever reads planes."""
    for place, view in enumerate(step.inputs):
        if len(view.sizes) == 4 and not _last(view):
            step.inputs[place] = _copied(network, step, view, View.new(view.dtype, view.shape, LAST))
    if len(step.output.sizes) == 4 and not _last(step.output):
        _written(network, step, View.new(step.output.dtype, step.output.shape, LAST))


def _copied(network: Network, step: Step, source: View, target: View) -> View:
    """A copy made before a step."""
    network.steps.insert(network.steps.index(step), Step("copy", step.name, [source], target))
    return target


def _written(network: Network, step: Step, target: View) -> None:
    """Let a step write elsewhere, and copy from there to where it wrote."""
    place, old = network.steps.index(step), step.output
    step.output = target
    network.steps.insert(place + 1, Step("copy", step.name, [target], old))


def notes(network: Network) -> tuple[str, ...]:
    """What is left out, for people."""
    steps = [step for step in network.steps if step.kernel == "sparse_f32"]
    weights = [step.options["weight"] for step in steps]
    zeros, count = sum(int(np.sum(weight == 0)) for weight in weights), sum(weight.size for weight in weights)
    return (f"{len(steps)} 1×1 convolutions leave zeros out: {zeros} of {count} weights",) if steps else ()
