"""Steps on packed bits as calls of kernels, in C."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgepack.export._c_bits import BLOCK, WORD, Around, Layer, bits_of, packed_weight, rows_of
from edgepack.export._c_calls import CALLS, Writer, _conv_fields, _images, _limits, _numbers, _walked
from edgepack.export._c_graph import Step
from edgepack.export._c_pack import number, pack


def _pack_bits(writer: Writer, step: Step) -> list[str]:
    image, packed = _images(step)
    groups = step.options["groups"]
    n, height, width, channels = image.sizes
    fields = {
        "batch": n, "height": height, "width": width, "groups": groups, "inputs": channels // groups,
        "outputs": packed.sizes[3] // groups,
    }  # fmt: skip
    for name, view in (("in", image), ("out", packed)):
        fields |= dict(zip((f"{name}_batch", f"{name}_row", f"{name}_pixel"), view.strides, strict=False))
    places = [writer.constant(step.options[name], f"{step.name}_{name}") for name in ("threshold", "turn")]
    places += [writer.pointer(step.inputs[0]), writer.pointer(step.output, True)]
    return [f"static const nn_conv p = {{{_numbers(fields)}}};", f"nn_pack_bits(&p, {', '.join(places)});"]


def _fields(step: Step) -> dict[str, Any]:
    """The members of nn_conv: inputs are words."""
    layer: Layer = step.options["layer"]
    step.options |= {"weight": packed_weight(layer), "groups": layer.groups}
    image, wide = _images(step)
    return {**_conv_fields(step, image, wide), "block": BLOCK}


def _counts(writer: Writer, step: Step, **arrays: Any) -> str:
    layer: Layer = step.options["layer"]
    beside: Around | None = step.options["around"]
    if beside is not None:
        arrays |= {
            "around": rows_of(beside.sums, layer.groups),
            "row_class": beside.rows,
            "column_class": beside.columns,
        }
    values: dict[str, Any] = {name: writer.constant(array, f"{step.name}_{name}") for name, array in arrays.items()}
    values["column_classes"] = 0 if beside is None else beside.sums.shape[1]
    return f"static const nn_counts q = {{{_numbers({**values, 'places': layer.places})}}};"


def _weights(writer: Writer, step: Step, fields: dict[str, Any]) -> str:
    weight, layer = step.options["weight"], step.options["layer"]
    segments = fields["rows"] * fields["columns"]
    outputs = len(weight) // layer.groups
    whole = np.zeros((layer.groups, -(-outputs // BLOCK) * BLOCK, *weight.shape[1:]), np.uint32)
    whole[:, :outputs] = weight.reshape(layer.groups, outputs, *weight.shape[1:])
    return writer.constant(pack(whole.reshape(-1, *weight.shape[1:]), layer.groups, segments), f"{step.name}_weight")


def _conv_bits(writer: Writer, step: Step) -> list[str]:
    layer, fields = step.options["layer"], _fields(step)
    scales = {name: rows_of(step.options[name], layer.groups) for name in ("scale", "shift")}
    counts = _counts(writer, step, **scales)
    places = [writer.pointer(step.inputs[0]), _weights(writer, step, fields)]
    places += [writer.pointer(step.inputs[1]) if len(step.inputs) > 1 else "NULL", writer.pointer(step.output, True)]
    return [
        f"static const nn_conv p = {{{_numbers({**fields, **_limits(step)})}}};",
        counts,
        f"nn_conv_bits(&p, &q, {', '.join(places)});",
    ]


def _sign_bits(writer: Writer, step: Step) -> list[str]:
    layer, limits, fields = step.options["layer"], step.options["limits"], _fields(step)
    turn = bits_of(limits.turn) if layer.groups == 1 else bits_of(limits.turn.reshape(layer.groups, -1)).reshape(-1)
    counts = _counts(writer, step, limit=rows_of(limits.limit, layer.groups, -1), turn=turn)
    places = [writer.pointer(step.inputs[0]), _weights(writer, step, fields), writer.pointer(step.output, True)]
    return [
        f"static const nn_conv p = {{{_numbers(fields)}}};",
        counts,
        f"nn_sign_bits(&p, &q, {', '.join(places)});",
    ]


def _tree_bits(writer: Writer, step: Step) -> list[str]:
    fields, found, ways = _fields(step), step.options["tables"], step.options["ways"]
    members = {**found.numbers, **{k: writer.constant(v, f"{step.name}_{k}") for k, v in found.arrays.items()}}
    assert step.scratch is not None
    scratch = f"nn_arena + {step.scratch.offset}"
    places = [writer.pointer(step.inputs[0]), scratch, writer.pointer(step.output, True)]
    tree = [f"static const nn_tree t = {{{_numbers(members)}}};", f"nn_tree_bits(&p, &t, {', '.join(places)});"]
    if all(ways.values()):
        return [f"static const nn_conv p = {{{_numbers(fields)}}};", *tree]
    define, *plain = _sign_bits(writer, step)
    condition = "nn_has_popcount()" if ways["avx2"] else "!nn_has_popcount()"
    return [define, f"if ({condition}) {{", *plain, "} else {", *tree, "}"]


def _signs(writer: Writer, step: Step) -> list[str]:
    return _walked(writer, step, number(step.options["high"]), number(step.options["low"]))


CALLS.update(pack_bits=_pack_bits, conv_bits=_conv_bits, sign_bits=_sign_bits, tree_bits=_tree_bits, signs_f32=_signs)
assert WORD == 2 * BLOCK  # a word of results is two blocks
