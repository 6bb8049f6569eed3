"""Capture a module as a graph, give it another body, compute it, save and load it.

The saved form is ``torch.export``'s archive with ATen operators only. Nothing in it is unpickled when it is read
back: ``edgepack.models.pt2`` checks every member first.
"""

from __future__ import annotations

import inspect
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack._outputs import flat_outputs
from edgepack.contracts import Arrays, Graph, TensorSpec
from edgepack.errors import InputError, Unsupported
from edgepack.samples import Array, batch_axis, compute
from edgepack.silence import silence
from edgepack.tracing import FixedAxis, trace

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

    from edgepack.artifact import Manifest
    from edgepack.task import Task

MODEL = "model.pt2"
NUDGE = 2.0**-22


def capture(module: nn.Module, task: Task) -> Graph:
    """Capture ``module`` in inference mode on the task's inputs.

    Axes named in the task's ``dynamic`` stay dynamic. If the network fixes the batch size and nothing else is
    dynamic, the graph is captured at the shape the task gives.

    Raises:
        Unsupported: control flow depends on data, a requested axis is fixed by the network, or state is hidden.
        InputError: the module does not accept the task's inputs.
    """
    specs = task.specs
    _check_signature(module, [spec.name for spec in specs])
    module = module.eval()
    try:
        program = trace(module, specs)
    except FixedAxis as error:
        if any(axis for spec in specs for axis in spec.shape if isinstance(axis, str) and axis != "batch"):
            raise Unsupported(f"the network fixes an axis that the task calls dynamic: {error}") from error
        specs = tuple(replace(spec, shape=item.shape) for spec, item in zip(specs, task.inputs, strict=True))
        logging.getLogger(__name__).info("the network fixes its batch size; captured at the task's shape")
        program = trace(module, specs)
    _refuse_data_dependent(program)
    _drop_detach(program)
    outputs = flat_outputs(program, specs, task.output_names or _lifted_names(module))
    return Graph(program, specs, outputs, dict(task.preprocessing), task.labels)


def recapture(graph: Graph, module: nn.Module, inputs: Sequence[TensorSpec] | None = None) -> Graph:
    """The graph with another body that has the same outputs, and the same inputs unless others are given."""
    specs = graph.inputs if inputs is None else tuple(inputs)
    program = trace(module, specs)
    found = flat_outputs(program, specs, [spec.name for spec in graph.outputs])
    outputs = tuple(replace(new, stacked=batch_axis(old)) for new, old in zip(found, graph.outputs, strict=True))
    return replace(graph, program=program, inputs=specs, outputs=outputs)


def fixed_batch(graph: Graph, batch: int = 1) -> Graph:
    """The same network for exactly ``batch`` samples per call; other dynamic axes stay."""
    return fixed(graph, {"batch": batch})


def fixed(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """The same network with dynamic axes, by name, of these sizes."""
    specs = tuple(
        replace(spec, shape=tuple(sizes.get(str(axis), axis) for axis in spec.shape), stacked=batch_axis(spec))
        for spec in graph.inputs
    )
    if all(one.shape == other.shape for one, other in zip(specs, graph.inputs, strict=True)):
        return graph
    return recapture(graph, graph.program.module(check_guards=False), specs)


def nudged(graph: Graph) -> Graph:
    """The same network with a few units in the last place of float32, up or down, before each rounding to integers."""
    import torch

    module = graph.program.module(check_guards=False)
    for node in list(module.graph.nodes):
        if str(node.target).startswith("quantized_decomposed.quantize_per_tensor"):
            with module.graph.inserting_before(node):
                wave = module.graph.call_function(torch.ops.aten.sin.default, (node.args[0],), {})
                wave = module.graph.call_function(torch.ops.aten.mul.Tensor, (wave, NUDGE), {})
                wave = module.graph.call_function(torch.ops.aten.add.Tensor, (wave, 1.0), {})
                moved = module.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], wave), {})
            node.update_arg(0, moved)
    module.recompile()
    return recapture(graph, module)


def caller(graph: Graph) -> Callable[[Arrays], dict[str, Array]]:
    """The graph as a function of one batch, computed by PyTorch."""
    return _caller(graph.program.module(check_guards=False), graph)


def run_graph(graph: Graph, inputs: Arrays, batch: int = 64) -> dict[str, Array]:
    """Compute the graph on a stack of samples with PyTorch, at most ``batch`` at once."""
    return compute(caller(graph), graph.inputs, graph.outputs, inputs, batch)


def run_module(module: nn.Module, graph: Graph, inputs: Arrays, batch: int = 64) -> dict[str, Array]:
    """Compute the module that ``graph`` was captured from, with the graph's names."""
    return compute(_caller(module, graph), graph.inputs, graph.outputs, inputs, batch)


def flatten(result: Any) -> list[torch.Tensor]:
    """The tensors of a module's result (tensor, tuple, dict, model output), in order."""
    import torch
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def save_graph(graph: Graph, folder: Path) -> None:
    """Write ``model.pt2``: operators and weights, no source lines, no sample inputs."""
    import torch

    for node in graph.program.graph.nodes:
        for key in ("stack_trace", "source_fn_stack"):
            node.meta.pop(key, None)
    buffer = io.BytesIO()
    examples, graph.program.example_inputs = graph.program.example_inputs, None
    try:
        with silence():
            torch.export.save(graph.program, buffer)
    finally:
        graph.program.example_inputs = examples
    (folder / MODEL).write_bytes(buffer.getvalue())


def load_graph(folder: Path, manifest: Manifest) -> Graph:
    """Read a captured graph back. Raises InputError when the file is damaged or unsafe."""
    from edgepack.models.pt2 import load_program

    program = load_program(folder / MODEL)
    return Graph(program, manifest.inputs, manifest.outputs, manifest.preprocessing, manifest.labels)


def _check_signature(module: nn.Module, names: Sequence[str]) -> None:
    """Inputs are passed by position; named like the parameters of forward they must stand in its order."""
    parameters = [name for name in inspect.signature(module.forward).parameters if name in names]
    if len(parameters) == len(names) and parameters != list(names):
        raise InputError(f"task.inputs are in the order {list(names)}, the network takes {parameters}")


def _lifted_names(module: nn.Module) -> Sequence[str]:
    """Output names that a ``.pt2`` or ``.onnx`` file gave its network."""
    meta = getattr(module, "meta", None)
    return meta.get("output_names", ()) if isinstance(meta, dict) else ()


def _refuse_data_dependent(program: ExportedProgram) -> None:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and hasattr(value, "shape") and free_unbacked_symbols(value.shape):
            name = str(node.target).removeprefix("aten.").partition(".")[0]
            raise Unsupported(
                f"the size of what {name} returns depends on the data", "a form of fixed size: torch.where, topk …"
            )


def _drop_detach(program: ExportedProgram) -> None:
    """``torch.tensor`` in a forward leaves a constant and ``detach_``; captured again it would look like a change."""
    import torch

    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)
    program.graph_module.recompile()


def _caller(module: Callable[..., Any], graph: Graph) -> Callable[[Arrays], dict[str, Array]]:
    import torch

    def call(rows: Arrays) -> dict[str, Array]:
        with torch.no_grad():
            results = flatten(module(*(torch.from_numpy(rows[spec.name]) for spec in graph.inputs)))
        return {spec.name: tensor.numpy() for spec, tensor in zip(graph.outputs, results, strict=True)}

    return call
