"""Convolutions of planes as calls of their kernels, in C."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgepack.export._c_calls import CALLS, Writer, _limits, _numbers
from edgepack.export._c_graph import Array, Step, View
from edgepack.export._c_pack import rounded
from edgepack.export._c_sparse import SPAN, VECTOR, best_block, columns

BAND = 16  # rows of the result that are computed from one part of the image


def _ends(step: Step, outputs: int) -> dict[str, Any]:
    """The members of nn_planes."""
    added = step.inputs[1] if len(step.inputs) > 1 else step.output
    fields: dict[str, Any] = {"batch": step.output.sizes[0], "outputs": outputs}
    for name, view in (("in", step.inputs[0]), ("out", step.output), ("add", added)):
        fields |= {f"{name}_batch": view.strides[0], f"{name}_plane": view.strides[1]}
    return {**fields, **_limits(step)}


def _pointers(writer: Writer, step: Step) -> list[str]:
    return [
        writer.pointer(step.inputs[1]) if len(step.inputs) > 1 else "NULL",
        *([writer.pointer(View(step.scratch, (), (), ()), True)] if step.scratch is not None else []),
        writer.pointer(step.output, True),
    ]


def _bias(step: Step, outputs: int) -> Array:
    bias, found = step.options["bias"], np.zeros(outputs, np.float32)
    found[: 0 if bias is None else bias.size] = 0.0 if bias is None else bias
    return found


def _sparse(writer: Writer, step: Step) -> list[str]:
    weight = step.options["weight"].reshape(step.options["weight"].shape[:2])
    pixels = step.output.sizes[2] * step.output.sizes[3]
    stored = columns(weight, best_block(weight, pixels))
    arrays = {"counts": stored.counts, "behind": stored.behind, "weights": stored.weights,
              "bias": _bias(step, stored.parts * rounded(len(weight), stored.block))}  # fmt: skip
    places = {name: writer.constant(array, f"{step.name}_{name}") for name, array in arrays.items()}
    fields = {"ends": f"{{{_numbers(_ends(step, len(weight)))}}}", "pixels": pixels, "block": stored.block,
              "parts": stored.parts, "span": SPAN}  # fmt: skip
    return [
        f"static const nn_sparse p = {{{_numbers(fields)}}};",
        f"static const nn_columns c = {{{_numbers(places)}}};",
        f"nn_sparse_f32(&p, &c, {', '.join([writer.pointer(step.inputs[0]), *_pointers(writer, step)])});",
    ]


def _window(writer: Writer, step: Step) -> list[str]:
    weight, slide, groups = (step.options[name] for name in ("weight", "window", "groups"))
    fields: dict[str, Any] = {"ends": f"{{{_numbers(_ends(step, len(weight) // groups))}}}"}
    for name, view in (("in_", step.inputs[0]), ("", step.output)):
        fields |= {f"{name}height": view.sizes[2], f"{name}width": view.sizes[3]}
    fields |= {"groups": groups, "inputs": weight.shape[1], "rows": slide.size[0], "columns": slide.size[1]}
    for name, values in (("stride", slide.stride), ("dilation", slide.dilation)):
        fields |= {f"{name}_row": values[0], f"{name}_column": values[1]}
    fields |= {"top": slide.before[0], "left": slide.before[1], **_scratch(step)}
    places = [writer.constant(weight.astype(np.float32), f"{step.name}_weight")]
    places += [writer.constant(_bias(step, len(weight)), f"{step.name}_bias")]
    return [
        f"static const nn_window p = {{{_numbers(fields)}}};",
        f"nn_window_f32(&p, {', '.join([writer.pointer(step.inputs[0]), *places, *_pointers(writer, step)])});",
    ]


def scratch_size(step: Step) -> int:
    return int(_scratch(step)["scratch"])


def _scratch(step: Step) -> dict[str, int]:
    """The members of nn_window that say how scratch is used: no row reaches into the next."""
    slide, inputs = step.options["window"], step.options["weight"].shape[1]
    stride, height, width = slide.stride[1], step.output.shape[2], step.output.shape[3]
    band = min(BAND, height)
    written = -(-slide.before[1] // stride) + rounded(-(-step.inputs[0].shape[3] // stride), VECTOR)
    read = rounded(width, VECTOR) + (slide.size[1] - 1) * slide.dilation[1] // stride
    pitch = rounded(max(written, read), VECTOR)
    plane = ((band - 1) * slide.stride[0] + (slide.size[0] - 1) * slide.dilation[0] + 1) * pitch
    return {"band": band, "pitch": pitch, "plane": plane, "scratch": inputs * stride * plane}


CALLS.update({"sparse_f32": _sparse, "window_f32": _window})
