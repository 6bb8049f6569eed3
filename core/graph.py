"""Capture a module as a graph, compute it, save and load it, and put layout and preprocessing into it.

The saved form is ``torch.export``'s archive with ATen operators only. Nothing in it is unpickled when it is read
back: ``edgepack.models.pt2`` checks every member first.
"""

from __future__ import annotations

import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.collector import without_collection
from edgepack.contracts import Arrays, Graph, Preprocessing, TensorSpec
from edgepack.errors import InputError, Unsupported
from edgepack.samples import Array, batch_axis, compute

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

    from edgepack.artifact import Manifest
    from edgepack.task import Task

MODEL = "model.pt2"
NUDGE = 2.0**-22
EXAMPLE_BATCH = 2  # torch.export would treat a dynamic axis of size 1 as fixed


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
        program = _export(module, specs)
    except _FixedAxis as error:
        if any(axis for spec in specs for axis in spec.shape if isinstance(axis, str) and axis != "batch"):
            raise Unsupported(f"the network fixes an axis that the task calls dynamic: {error}") from error
        specs = tuple(replace(spec, shape=item.shape) for spec, item in zip(specs, task.inputs, strict=True))
        logging.getLogger(__name__).info("the network fixes its batch size; captured at the task's shape")
        program = _export(module, specs)
    _refuse_data_dependent(program)
    _drop_detach(program)
    outputs = _flat_outputs(program, specs, task.output_names or _lifted_names(module))
    return Graph(program, specs, outputs, dict(task.preprocessing), task.labels)


def recapture(graph: Graph, module: nn.Module) -> Graph:
    """The graph with another body that has the same inputs and outputs."""
    program = _export(module, graph.inputs)
    return replace(graph, program=program, outputs=_outputs_like(graph, program, graph.inputs))


def fixed_batch(graph: Graph, batch: int = 1) -> Graph:
    """The same network for exactly ``batch`` samples per call; other dynamic axes stay."""
    if not any("batch" in spec.shape for spec in graph.inputs):
        return graph
    specs = tuple(
        replace(spec, shape=tuple(batch if axis == "batch" else axis for axis in spec.shape), stacked=batch_axis(spec))
        for spec in graph.inputs
    )
    program = _export(graph.program.module(check_guards=False), specs)
    return replace(graph, program=program, inputs=specs, outputs=_outputs_like(graph, program, specs))


def _outputs_like(graph: Graph, program: ExportedProgram, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Outputs of another body of the graph: same names, stacked along the same axes."""
    found = _flat_outputs(program, inputs, [spec.name for spec in graph.outputs])
    return tuple(replace(new, stacked=batch_axis(old)) for new, old in zip(found, graph.outputs, strict=True))


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


def example_inputs(specs: Sequence[TensorSpec], batch: int = EXAMPLE_BATCH) -> tuple[torch.Tensor, ...]:
    """Seeded tensors that fit the specs; the batch axis is ``batch``, other dynamic axes 64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = []
    for spec in specs:
        shape = [axis if isinstance(axis, int) else batch if axis == "batch" else 64 for axis in spec.shape]
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            tensors.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            tensors.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return tuple(tensors)


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
        with _quiet():
            torch.export.save(graph.program, buffer)
    finally:
        graph.program.example_inputs = examples
    (folder / MODEL).write_bytes(buffer.getvalue())


def load_graph(folder: Path, manifest: Manifest) -> Graph:
    """Read a captured graph back. Raises InputError when the file is damaged or unsafe."""
    from edgepack.models.pt2 import load_program

    program = load_program(folder / MODEL)
    return Graph(program, manifest.inputs, manifest.outputs, manifest.preprocessing, manifest.labels)


def with_front(graph: Graph, layout: str | None, normalize: bool) -> Graph:
    """Put a change of layout and the preprocessing in front of the network, as operators of the graph.

    With ``normalize``, every image input (one that has preprocessing) takes raw uint8 NHWC pixels and the graph
    computes ``(raw / scale - mean) / std`` itself. With ``layout`` alone, NCHW inputs become NHWC.

    Raises:
        Unsupported: no input has a layout, or there is no preprocessing to bake in.
    """
    fronts = {spec.name: _front(spec, graph.preprocessing.get(spec.name), layout, normalize) for spec in graph.inputs}
    specs = tuple(fronts[spec.name][0] for spec in graph.inputs)
    if specs == graph.inputs:
        if normalize:
            raise Unsupported("normalize: no input of this model is an image", "leave out normalize")
        return graph
    module = _fronted(graph, [fronts[spec.name][1] for spec in graph.inputs])
    program = _export(module, specs)
    outputs = _outputs_like(graph, program, specs)
    baked = {spec.name for spec in specs if normalize and spec.dtype == "uint8"}
    left = {
        name: replace(how, scale=1.0, mean=(), std=()) if name in baked else how
        for name, how in graph.preprocessing.items()
    }
    return Graph(program, specs, outputs, left, graph.labels)


def to_front(values: Arrays, model: Sequence[TensorSpec], artifact: Sequence[TensorSpec], raw: Arrays) -> Arrays:
    """The same samples as another interface takes them: raw pixels, NHWC, or unchanged."""
    arrays = {}
    for inner, outer in zip(model, artifact, strict=True):
        if outer.dtype != inner.dtype:
            arrays[outer.name] = np.ascontiguousarray(raw[inner.name])
        elif outer.layout != inner.layout:
            arrays[outer.name] = np.ascontiguousarray(np.moveaxis(values[inner.name], 1, -1))
        else:
            arrays[outer.name] = values[inner.name]
    return arrays


def _front(
    spec: TensorSpec, how: Preprocessing | None, layout: str | None, normalize: bool
) -> tuple[TensorSpec, Callable[[torch.Tensor], torch.Tensor]]:
    import torch

    if spec.layout != "NCHW":
        return spec, lambda tensor: tensor
    n, c, h, w = spec.shape
    if normalize and how is not None:
        channels = c if isinstance(c, int) else 1
        mean = torch.tensor(how.mean or [0.0] * channels).reshape(1, -1, 1, 1)
        std = torch.tensor(how.std or [1.0] * channels).reshape(1, -1, 1, 1)
        scale = how.scale

        def pixels(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.permute(0, 3, 1, 2).to(torch.float32) / scale - mean) / std

        return TensorSpec(spec.name, "uint8", (n, h, w, c), "NHWC"), pixels
    if layout == "NHWC":
        return TensorSpec(spec.name, spec.dtype, (n, h, w, c), "NHWC"), lambda tensor: tensor.permute(0, 3, 1, 2)
    return spec, lambda tensor: tensor


def _fronted(graph: Graph, fronts: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> nn.Module:
    from torch import nn

    class Fronted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = graph.program.module(check_guards=False)

        def forward(self, *tensors: torch.Tensor) -> Any:
            return self.network(*(front(tensor) for front, tensor in zip(fronts, tensors, strict=True)))

    return Fronted()


class _FixedAxis(Exception):
    """torch.export found that the network fixes an axis that was to be dynamic."""


def _export(module: nn.Module, specs: Sequence[TensorSpec]) -> ExportedProgram:
    import torch
    from torch._dynamo.exc import UserError
    from torch.export import Dim
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    examples = example_inputs(specs)
    dynamic = tuple({i: Dim.DYNAMIC for i, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in specs)
    variadic = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())
    try:
        with _quiet(), without_collection(), torch.no_grad():
            return torch.export.export(
                module, examples, dynamic_shapes=(dynamic,) if variadic else dynamic, strict=False
            )
    except GuardOnDataDependentSymNode as error:
        raise Unsupported(
            f"control flow depends on data: {_culprit(str(error))}",
            "compute both branches and choose with torch.where",
        ) from error
    except UserError as error:
        if "dynamic" in str(error) and "constant" in str(error):
            raise _FixedAxis(_sentence(error)) from error
        raise Unsupported(f"the network cannot be captured: {_sentence(error)}") from error
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        shapes = ", ".join(f"{spec.name} {list(tensor.shape)}" for spec, tensor in zip(specs, examples, strict=True))
        raise InputError(f"the network does not run on the task's inputs ({shapes}): {_sentence(error)}") from error


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


def _flat_outputs(
    program: ExportedProgram, specs: Sequence[TensorSpec], wanted: Sequence[str]
) -> tuple[TensorSpec, ...]:
    """Make the program return a plain tuple of tensors, and describe them."""
    from torch.utils import _pytree as pytree

    if (state := _changed_state(program)) is not None:
        raise Unsupported(f"the network changes {state!r} while it runs", "make the state an input and an output")
    values = [node for node in program.graph.output_node().args[0] if hasattr(node, "meta")]
    names = list(wanted) or _output_names(program, len(values))
    if len(values) != len(program.graph.output_node().args[0]):
        raise Unsupported("an output of the network is not a tensor", "return tensors only")
    if len(names) != len(values):
        raise InputError(f"the network has {len(values)} outputs, the task names {len(names)}")
    program.module_call_graph[0].signature.out_spec = pytree.tree_flatten(tuple(range(len(values))))[1]
    symbols = _symbols(program, specs)
    return tuple(
        TensorSpec(name, str(node.meta["val"].dtype).removeprefix("torch."), _named(node.meta["val"].shape, symbols))
        for name, node in zip(names, values, strict=True)
    )


def _changed_state(program: ExportedProgram) -> str | None:
    """Name of a buffer or input that an operator of the program writes to."""
    signature = program.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and getattr(value, "op", None) == "placeholder":
                return str(names.get(value.name, value.name))
    return None


def _lifted_names(module: nn.Module) -> Sequence[str]:
    """Output names that a ``.pt2`` or ``.onnx`` file gave its network."""
    meta = getattr(module, "meta", None)
    return meta.get("output_names", ()) if isinstance(meta, dict) else ()


def _output_names(program: ExportedProgram, count: int) -> list[str]:
    spec = program.call_spec.out_spec
    keys = spec.context if spec is not None and isinstance(spec.context, list) else []
    if len(keys) == count and spec is not None and spec.num_children == count:
        return [str(key) for key in keys]
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def _symbols(program: ExportedProgram, specs: Sequence[TensorSpec]) -> dict[str, str]:
    """Symbol of torch.export → the task's name of the axis."""
    found: dict[str, str] = {}
    inputs = [n for n in program.graph.find_nodes(op="placeholder") if n.name in program.graph_signature.user_inputs]
    for node, spec in zip(inputs, specs, strict=True):
        for size, axis in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(axis, str):
                found.setdefault(str(size), axis)
    return found


def _named(shape: Sequence[Any], symbols: Mapping[str, str]) -> tuple[int | str, ...]:
    def axis(size: Any) -> int | str:
        if isinstance(size, int):
            return size
        return re.sub(r"[su]\d+", lambda match: symbols.get(match[0], match[0]), str(size))

    return tuple(axis(size) for size in shape)


def _caller(module: Callable[..., Any], graph: Graph) -> Callable[[Arrays], dict[str, Array]]:
    import torch

    def call(rows: Arrays) -> dict[str, Array]:
        with torch.no_grad():
            results = flatten(module(*(torch.from_numpy(rows[spec.name]) for spec in graph.inputs)))
        return {spec.name: tensor.numpy() for spec, tensor in zip(graph.outputs, results, strict=True)}

    return call


def _check_signature(module: nn.Module, names: Sequence[str]) -> None:
    """Inputs are passed by position; named like the parameters of forward they must stand in its order."""
    parameters = [name for name in inspect.signature(module.forward).parameters if name in names]
    if len(parameters) == len(names) and parameters != list(names):
        raise InputError(f"task.inputs are in the order {list(names)}, the network takes {parameters}")


def _culprit(text: str) -> str:
    lines = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s+(\S[^\n]*)', text)
    if not lines:
        return text.partition("\n")[0]
    path, line, code = lines[-1]
    return f"{Path(path).name}:{line}: {code.strip()}"


def _sentence(error: BaseException) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    marked = [line for line in lines if line.startswith("You marked")]
    return (marked or lines or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns about its own internals, and logs and prints what its exceptions say anyway."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
