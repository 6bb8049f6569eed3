"""Captured graph to the bytes of a TFLite file, through litert-torch."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

from edgepack.collector import without_collection
from edgepack.contracts import Graph
from edgepack.errors import Unsupported, require
from edgepack.export._tflite_rewrite import rewrite
from edgepack.silence import unlogged
from edgepack.tracing import example_inputs

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

HINT = "export to another format, or replace the operator"
LIMIT_BYTES = 2**31 - 1


def to_tflite(graph: Graph, keep_weights: bool = False) -> bytes:
    """What litert-torch makes of the graph; inputs and outputs are called ``args_0``, ``output_0`` … there.

    Args:
        keep_weights: the file must hold the weights as they are, without constants multiplied into them.

    Raises:
        Unsupported: an operator has no TFLite form (named), or the file would be over 2 GiB.
    """
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in graph.program.state_dict.values())
    if size_bytes > LIMIT_BYTES:
        raise Unsupported(
            f"the weights take {size_bytes / 2**30:.1f} GiB; a TFLite file holds at most 2 GiB",
            "export to openvino, or compress first",
        )
    module: GraphModule = graph.program.module(check_guards=False)
    with quiet():
        require("litert_torch", "tflite")
        rewrite(module, keep_weights)
        try:
            return _convert(module, example_inputs(graph.inputs, batch=1))
        except _failures() as error:
            named = re.search(r"Lowering not found: (aten\.\w+)", str(error))
            name = named[1] if named else _culprit(module)
            if name is None:
                raise Unsupported(f"litert-torch cannot convert the network: {_sentence(error)}", HINT) from error
            raise Unsupported(f"operator {name} has no TFLite form", HINT) from error


def _convert(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> bytes:
    """Convert, and load the result without running it. Raises one of ``_failures()``."""
    litert_torch = require("litert_torch", "tflite")
    litert = require("ai_edge_litert.interpreter", "tflite")

    with without_collection():
        data: bytes = litert_torch.convert(module, tuple(inputs), enable_x64=True).model_content()
    # The converter writes what it cannot express as operators that no engine has.
    plain = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    litert.Interpreter(model_content=data, experimental_op_resolver_type=plain).allocate_tensors()
    return data


def _failures() -> tuple[type[Exception], ...]:
    return (RuntimeError, ValueError, TypeError, require("litert_converter.mlir.ir", "tflite").MLIRError)


def _culprit(module: GraphModule) -> str | None:
    """The first operator that cannot be converted alone; None when each of them can."""
    seen = set()
    for node in module.graph.nodes:
        kind = (node.target, tuple(type(value) for value in node.args))
        if not hasattr(node.target, "_schema") or node.meta.get("val") is None or kind in seen:
            continue
        seen.add(kind)
        try:
            _convert(*_alone(module, node))
        except _failures():
            return str(node.target.overloadpacket)
    return None


def _alone(module: GraphModule, node: Node) -> tuple[GraphModule, list[torch.Tensor]]:
    """A network of this one operator, its weights constant, and inputs for it."""
    import torch

    graph, inputs = torch.fx.Graph(), []
    copies: dict[Node, Node] = {}
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            copies[source] = graph.get_attr(str(source.target))
        else:
            copies[source] = graph.placeholder(source.name)
            value = source.meta["val"]
            inputs.append(torch.ones(tuple(value.shape), dtype=value.dtype))
    graph.output(graph.node_copy(node, copies.__getitem__))
    return torch.fx.GraphModule(module, graph), inputs


def _sentence(error: BaseException) -> str:
    """The first line, without the place in somebody's source that it begins with."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"\S+:\d+:\d+: (error: )?", "", line)[:200] or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """litert-torch and the libraries under it speak on every channel; what matters comes as an exception.

    Progress goes on: what this process itself writes to ``sys.stderr`` is still seen.
    """
    with ExitStack() as stack, unlogged():
        sink: Any = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
        stack.enter_context(redirect_stdout(sink))
        for channel in (1, 2):
            sys.stderr.flush()
            kept = os.dup(channel)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, channel)
            os.dup2(sink.fileno(), channel)
            if channel == 2 and _is_channel(sys.stderr, 2):
                spoken: Any = stack.enter_context(open(kept, "w", closefd=False, encoding="utf-8"))
                stack.enter_context(redirect_stderr(spoken))
                stack.callback(_release, spoken)
        yield


def _release(stream: Any) -> None:
    """Logging that was set up meanwhile, by a package's import, must not hold on to a stream that is about to close."""
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                handler.setStream(sys.__stderr__ or stream)


def _is_channel(stream: Any, number: int) -> bool:
    try:
        return bool(stream.fileno() == number)
    except (AttributeError, OSError, ValueError):
        return False
