"""Captured graph to an ONNX model in memory, with the graph's own names. Shared by the formats that go through ONNX."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgepack.contracts import Graph, TensorSpec
from edgepack.errors import Unsupported, require

if TYPE_CHECKING:
    import onnx

LIMIT_BYTES = 2**31 - 1
NOISY = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")


def to_onnx(graph: Graph, opset: int, translations: Mapping[Any, Any] | None = None) -> onnx.ModelProto:
    """An ONNX model whose inputs, outputs and dynamic axes are called what the graph calls them.

    Args:
        translations: operator of PyTorch → function of onnxscript, for those that torch.onnx has no form of.

    Raises:
        Unsupported: an operator has no ONNX form (named), or the model is over protobuf's limit of 2 GiB.
        MissingExtra: onnx or onnxscript is not installed.
    """
    require("onnx", "onnx")
    require("onnxscript", "onnx")
    import torch

    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in graph.program.state_dict.values())
    if size_bytes > LIMIT_BYTES:
        raise Unsupported(
            f"the weights take {size_bytes / 2**30:.1f} GiB; a single ONNX file holds at most 2 GiB",
            "export to openvino, or compress first",
        )
    try:
        with _quiet():
            program = torch.onnx.export(
                graph.program,
                (),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[spec.name for spec in graph.inputs],
                output_names=[spec.name for spec in graph.outputs],
                custom_translation_table=dict(translations or {}),
            )
    except torch.onnx.OnnxExporterError as error:
        raise Unsupported(_reason(error), "export to another format, or replace the operator") from error
    if program is None:
        raise AssertionError("torch.onnx returned no program")
    model: onnx.ModelProto = program.model_proto
    _name_axes(model, graph)
    return model


def _name_axes(model: onnx.ModelProto, graph: Graph) -> None:
    """Write the interface's axis names over torch's symbols (``s77``)."""
    symbols: dict[str, str] = {}
    for value, spec in zip(model.graph.input, graph.inputs, strict=True):
        for dim, axis in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if isinstance(axis, str) and dim.dim_param:
                symbols[dim.dim_param] = axis
    for value, spec in zip((*model.graph.input, *model.graph.output), (*graph.inputs, *graph.outputs), strict=True):
        _name_shape(value, spec, symbols)


def _name_shape(value: onnx.ValueInfoProto, spec: TensorSpec, symbols: Mapping[str, str]) -> None:
    for dim, axis in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
        if isinstance(axis, int):
            dim.dim_value = axis
        elif not dim.HasField("dim_value"):
            dim.dim_param = re.sub(r"\b[su]\d+\b", lambda match: symbols.get(match[0], match[0]), axis)


def _reason(error: BaseException) -> str:
    """Which operator stopped torch.onnx, in one sentence."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    names = re.findall(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", "\n".join(chain))
    if names:
        return f"operator {', '.join(dict.fromkeys(names))} has no ONNX form"
    nodes = re.findall(r"target=torch\.ops\.([\w.]+)\]", "\n".join(chain))
    where = f" at operator {nodes[-1]}" if nodes else ""
    return f"the network cannot be written as ONNX{where}: {chain[-1].strip().partition(chr(10))[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx logs and warns about its own internals; what matters comes as an exception."""
    loggers: list[Any] = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
