"""The simulation as a Core ML package, by coremltools."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import Graph, TensorSpec
from edgepack.errors import Unsupported, require
from edgepack.export._coreml_groups import merge_groups
from edgepack.export._coreml_half import exact
from edgepack.export._coreml_program import spelled_out
from edgepack.export._coreml_sparse import store_sparse
from edgepack.export._coreml_tables import merge_tables
from edgepack.graph import recapture
from edgepack.silence import silence

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule

# They multiply constants into weights and divide scales by each other, which would move them off the 16-bit grid again.
REWRITERS = (
    "common::fuse_conv_scale",
    "common::fuse_conv_batchnorm",
    "common::distributive_quantized_binary_op_scale_normalization",
)
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
OUTPUTS = {"float32": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int32, "bool": np.float32}


FLOATS = ("float32", "float16")


def convert(graph: Graph, package: Path, target: str, half: bool) -> None:
    """Write ``package``, as coremltools does.

    Raises:
        Unsupported: an operator has no Core ML form; names it.
    """
    planar = merge_tables(merge_groups(_planar(graph)))
    with silence():  # coremltools draws progress bars and says which versions it was tested with
        ct = require("coremltools", "coreml")
        pipeline = ct.PassPipeline.DEFAULT
        if half:
            pipeline.remove_passes(REWRITERS)
        precision = _half_precision(ct) if half else ct.precision.FLOAT32
        try:
            model = ct.convert(
                spelled_out(planar.program),
                outputs=[_output(ct, spec, place) for place, spec in enumerate(graph.outputs)],
                minimum_deployment_target=getattr(ct.target, target),
                compute_precision=precision,
                pass_pipeline=pipeline,
                skip_model_load=True,
            )
            if graph.dialect in FLOATS:
                model = store_sparse(model)
            model.save(str(package))
        except FAILURES as error:
            raise Unsupported(_reason(error), "export to another format, or replace the operator") from error


def _half_precision(ct: Any) -> Any:
    """float16 for the operators whose constants 16 bits hold exactly."""

    def holds(operator: Any) -> bool:
        return all(
            exact(value.val)
            for name, values in operator.inputs.items()
            if precision.should_cast_parameter(operator, name)
            for value in (values if isinstance(values, tuple | list) else [values])
            if value.op is not None and value.op.op_type == "const" and value.is_tensor_or_scalar_of(dtype="fp32")
        )

    precision = ct.transform.FP16ComputePrecision(op_selector=holds)
    return precision


def _output(ct: Any, spec: TensorSpec, place: int) -> Any:
    if spec.dtype not in OUTPUTS:
        raise Unsupported(f"Core ML has no {spec.dtype} outputs: {spec.name!r}", f"one of {', '.join(OUTPUTS)}")
    return ct.TensorType(name=f"output_{place}", dtype=OUTPUTS[spec.dtype])


def _planar(graph: Graph) -> Graph:
    """The graph with float (N, C, H, W) pixels in place of uint8 (N, H, W, C) ones: what Core ML makes of an image."""
    from torch import nn

    if all(spec.dtype != "uint8" for spec in graph.inputs):
        return graph
    images = [spec.dtype == "uint8" for spec in graph.inputs]

    class Planar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = _unguarded(graph)

        def forward(self, *tensors: torch.Tensor) -> Any:
            pairs = zip(tensors, images, strict=True)
            return self.network(*(tensor.permute(0, 2, 3, 1) if image else tensor for tensor, image in pairs))

    return recapture(replace(graph, inputs=tuple(_planar_spec(spec) for spec in graph.inputs)), Planar())


def _unguarded(graph: Graph) -> GraphModule:
    """The graph's module without the operators that insist on uint8."""
    import torch

    module = graph.program.module(check_guards=False)
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        module.graph.erase_node(node)
    module.recompile()
    return module


def _planar_spec(spec: TensorSpec) -> TensorSpec:
    if spec.dtype != "uint8":
        return spec
    if spec.layout != "NHWC" or spec.shape[-1] not in (1, 3):
        raise Unsupported(
            f"Core ML takes uint8 as images only; input {spec.name!r} is {spec.layout} {list(spec.shape)}",
            "a float input, or images of 1 or 3 channels",
        )
    n, h, w, c = spec.shape
    return TensorSpec(spec.name, "float32", (n, c, h, w), "NCHW")


def _reason(error: BaseException) -> str:
    text = str(error)
    names = re.findall(
        r"Unsupported fx node \w+, kind ([\w.]+)|convert function for op '([^']+)' not implemented", text
    )
    if names:
        return f"operator aten.{''.join(names[0])} has no Core ML form"
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    operator = _operator(error)
    if operator and re.search(r"got \d+ input\(s\), expected", text):  # Fourier transforms, windows
        return f"operator aten.{operator} has no Core ML form for the way it is called here"
    return (
        f"Core ML cannot take operator aten.{operator} as it is used here"
        if operator
        else "Core ML cannot take the network"
    ) + f": {lines[0] if lines else type(error).__name__}"


def _operator(error: BaseException) -> str:
    """The operator coremltools was at, which it only logs."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        node = trace.tb_frame.f_locals.get("node")
        found = str(getattr(node, "kind", "") or found)
        trace = trace.tb_next
    return found
