"""Steps as calls of kernels, in C."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgepack.errors import Unsupported
from edgepack.export._c_graph import Array, Step, View, channels_last, merged
from edgepack.export._c_pack import WIDE, block_of, definition, number, pack, pack_outputs

AXES = 6  # of a walk, as in nn.h
CTYPES = {"float32": "float", "int8": "int8_t", "uint8": "uint8_t", "int32": "int32_t", "uint32": "uint32_t"}


@dataclass
class Writer:
    """Collects constants while calls are written.

    Attributes:
        constants: definition by name.
        contents: every constant, in order.
    """

    constants: dict[str, str] = field(default_factory=dict)
    contents: list[Array] = field(default_factory=list)
    _known: dict[tuple[str, bytes], str] = field(default_factory=dict)

    def constant(self, array: Array, name: str) -> str:
        """The name of a constant; equal ones are stored once."""
        array = np.ascontiguousarray(array).reshape(-1)
        key = (str(array.dtype), array.tobytes())
        if key not in self._known:
            unique = f"nn_{name}" if f"nn_{name}" not in self.constants else f"nn_{name}_{len(self.constants)}"
            self._known[key] = unique
            self.constants[unique] = definition(unique, array)
            self.contents.append(array)
        return self._known[key]

    def pointer(self, view: View, writes: bool = False) -> str:
        """Where a view begins."""
        buffer, kind = view.buffer, CTYPES[view.dtype]
        if buffer.constant is not None:
            place = self.constant(buffer.constant, f"constant_{len(self.constants)}")
            return f"{place} + {view.offset}" if view.offset else place
        if buffer.place != "arena":
            return f"{argument(buffer.place)} + {view.offset}" if view.offset else argument(buffer.place)
        offset = buffer.offset + view.offset * np.dtype(view.dtype).itemsize
        return f"({'' if writes else 'const '}{kind} *)(nn_arena + {offset})"


def argument(name: str) -> str:
    """An input's or output's name as C."""
    word = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
    return f"v_{word}"


def call(writer: Writer, step: Step) -> list[str]:
    """The lines that compute one step."""
    return CALLS[step.kernel](writer, step)


def _images(step: Step) -> tuple[View, View]:
    order = channels_last(4)
    return step.inputs[0].in_order(order), step.output.in_order(order)


def _numbers(values: Mapping[str, Any]) -> str:
    return ", ".join(f".{name} = {value}" for name, value in values.items())


def _conv_fields(step: Step, image: View, wide: View) -> dict[str, Any]:
    """The members of nn_conv."""
    weight, slide, groups = (step.options[name] for name in ("weight", "window", "groups"))
    inputs, (rows, columns) = weight.shape[1], weight.shape[2:]
    together = groups == 1 and slide.dilation[1] == 1 and (columns == 1 or image.strides[2] == inputs)
    depthwise = step.kernel.startswith("depthwise")
    if together and not depthwise:
        columns, length = 1, columns * inputs
    else:
        length = inputs
    n, height, width, _ = wide.sizes
    fields = {
        "batch": n, "height": height, "width": width, "groups": groups, "inputs": inputs,
        "outputs": weight.shape[0] // groups, "rows": rows, "columns": columns, "length": length,
        "in_batch": image.strides[0], "in_row": slide.stride[0] * image.strides[1],
        "in_pixel": slide.stride[1] * image.strides[2], "tap_row": slide.dilation[0] * image.strides[1],
        "tap_column": slide.dilation[1] * image.strides[2],
        "block": block_of(weight.shape[0] // groups, groups, image.dtype == "int8"),
    }  # fmt: skip
    added = step.inputs[1].in_order(channels_last(4)) if len(step.inputs) > 1 else wide
    for name, view in (("out", wide), ("add", added)):
        fields |= {
            f"{name}_{word}": stride for word, stride in zip(("batch", "row", "pixel"), view.strides, strict=False)
        }
    return fields


def _side_by_side(step: Step, fields: dict[str, Any]) -> int:
    """How many neighbouring pixels of few channels a depthwise convolution takes for one of many, to fill vectors."""
    channels, names = fields["groups"], ["in_pixel", "out_pixel", *(["add_pixel"] if len(step.inputs) > 1 else [])]
    dense = all(fields[name] == channels for name in names)
    fitting = [count for count in range(1, WIDE // channels + 1) if fields["width"] % count == 0]
    count = fitting[-1] if dense and fitting else 1
    fields |= {name: count * fields[name] for name in ("groups", "in_pixel", "out_pixel", "add_pixel")}
    fields["width"] //= count
    return count


def _limits(step: Step) -> dict[str, str]:
    """What a fused activation does."""
    function, numbers = step.options.get("function"), step.options.get("numbers", (0.0, 0.0))
    low, high = numbers if function == "clip" else (-np.inf, np.inf)
    slope = numbers[0] if function == "leaky" else 1.0
    return {"slope": number(slope), "low": number(low), "high": number(high)}


def _conv_f32(writer: Writer, step: Step) -> list[str]:
    image, wide = _images(step)
    fields = _conv_fields(step, image, wide)
    weight, groups, bias = (step.options[name] for name in ("weight", "groups", "bias"))
    bias = np.zeros(weight.shape[0], np.float32) if bias is None else bias.astype(np.float32)
    depthwise = step.kernel.startswith("depthwise")
    if depthwise:
        count = _side_by_side(step, fields)
        packed, bias = np.tile(weight.reshape(len(weight), -1).T, count), np.tile(bias, count)
    else:
        packed = pack(weight, groups, fields["rows"] * fields["columns"])
        bias = pack_outputs(bias, groups)
    places = [writer.pointer(step.inputs[0]), writer.constant(packed, f"{step.name}_weight")]
    places += [writer.constant(bias, f"{step.name}_bias")]
    places += [writer.pointer(step.inputs[1]) if len(step.inputs) > 1 else "NULL", writer.pointer(step.output, True)]
    return [
        f"static const nn_conv p = {{{_numbers({**fields, **_limits(step)})}}};",
        f"nn_{step.kernel}(&p, {', '.join(places)});",
    ]


def _requantize(writer: Writer, step: Step, spread: Callable[..., Array]) -> str:
    """The definition of nn_requantize q for a convolution: the input's zero point goes into the bias.

    Args:
        spread: values of outputs, and what stands where there are none → as the kernel reads them.
    """
    options, weight = step.options, step.options["weight"]
    sums = weight.astype(np.int64).reshape(len(weight), -1).sum(1)
    shift = options["shift"]
    arrays = {
        "bias": options["bias"] - options["zero"] * sums, "offset": 128 * sums, "multiplier": options["multiplier"],
        "negative": options["negative"], "shift": shift,
    }  # fmt: skip
    places = {}
    for name, array in arrays.items():
        if array is None:
            places[name] = "NULL"
            continue
        whole = spread(array.astype(np.int32), int(name == "shift"))
        places[name] = writer.constant(whole, f"{step.name}_{name}")
    return f"static const nn_requantize q = {{{_numbers({**places, **_grid(step)})}}};"


def _grid(step: Step) -> dict[str, int]:
    return dict(zip(("zero", "low", "high"), step.options["grid"], strict=True))


def _conv_s8(writer: Writer, step: Step) -> list[str]:
    image, wide = _images(step)
    fields = _conv_fields(step, image, wide)
    weight, groups = step.options["weight"], step.options["groups"]
    if step.kernel.startswith("depthwise"):
        count = _side_by_side(step, fields)
        packed = np.tile(weight.reshape(len(weight), -1).T, count)
        rounding = _requantize(writer, step, lambda values, _: np.tile(values, count))
    else:
        packed = pack(weight, groups, fields["rows"] * fields["columns"])
        rounding = _requantize(writer, step, lambda values, fill: pack_outputs(values, groups, fill))
    ends = [writer.pointer(step.inputs[0]), writer.constant(packed, f"{step.name}_weight")]
    return [
        f"static const nn_conv p = {{{_numbers({**fields, **_limits(step)})}}};",
        rounding,
        f"nn_{step.kernel}(&p, &q, {', '.join(ends)}, {writer.pointer(step.output, True)});",
    ]


def _avg_pool_s8(writer: Writer, step: Step) -> list[str]:
    """Sums less their zero points, rounded like those of convolutions."""
    arrays = {
        "bias": np.array([step.options["zero"]]),
        "multiplier": step.options["multiplier"],
        "shift": step.options["shift"],
    }
    places = {name: writer.constant(array.astype(np.int32), f"{step.name}_{name}") for name, array in arrays.items()}
    ends = [writer.pointer(step.inputs[0]), writer.pointer(step.output, True)]
    return [
        f"static const nn_pool p = {{{_numbers(_pool_fields(step))}}};",
        f"static const nn_requantize q = {{{_numbers({**places, **_grid(step)})}}};",
        f"nn_avg_pool_s8(&p, &q, {', '.join(ends)});",
    ]


def _pair_s8(writer: Writer, step: Step) -> list[str]:
    values: dict[str, int] = {"shift": step.options["shift"], **_grid(step)}
    for name, numbers in (("zero", step.options["zeros"]), ("multiplier", step.options["factors"])):
        values |= {f"{name}_{word}": int(found) for word, found in zip(("one", "two"), numbers, strict=True)}
    return [f"static const nn_sum s = {{{_numbers(values)}}};", *_walked(writer, step, "&s")]


def _table(writer: Writer, step: Step) -> list[str]:
    return _walked(writer, step, writer.constant(step.options["table"], f"{step.name}_table"))


def _quantize(writer: Writer, step: Step) -> list[str]:
    fields = {"inverse": number(step.options["inverse"]), **_grid(step)}
    return [f"static const nn_grid g = {{{_numbers(fields)}}};", *_walked(writer, step, "&g")]


def _dequantize(writer: Writer, step: Step) -> list[str]:
    return _walked(writer, step, number(step.options["scale"]), str(step.options["zero"]))


def _pool_fields(step: Step) -> dict[str, Any]:
    image, wide = _images(step)
    n, in_height, in_width, channels = image.sizes
    fields = {
        "batch": n, "in_height": in_height, "in_width": in_width, "height": wide.sizes[1], "width": wide.sizes[2],
        "channels": channels,
    }  # fmt: skip
    for name, view in (("in", image), ("out", wide)):
        fields |= {
            f"{name}_{word}": stride for word, stride in zip(("batch", "row", "pixel"), view.strides, strict=False)
        }
    slide = step.options.get("window")
    if slide is not None:
        for name, values in (("stride", slide.stride), ("dilation", slide.dilation)):
            fields |= {f"{name}_row": values[0], f"{name}_column": values[1]}
        fields |= {"rows": slide.size[0], "columns": slide.size[1], "top": slide.before[0], "left": slide.before[1]}
        fields |= {"divisor": step.options["counts"] or 0}
    return fields


def _pool(writer: Writer, step: Step) -> list[str]:
    ends = [writer.pointer(step.inputs[0]), writer.pointer(step.output, True)]
    tables = []
    for name in ("rows", "columns"):
        found = step.options.get(name, ())
        for table in found if isinstance(found, tuple) else (found,):
            tables.append(writer.constant(table, f"{step.name}_{name}"))
    return [
        f"static const nn_pool p = {{{_numbers(_pool_fields(step))}}};",
        f"nn_{step.kernel}(&p, {', '.join((*tables, *ends))});",
    ]


def walk(views: Sequence[View], names: Sequence[str], step: Step) -> str:
    """nn_walk over views of one shape."""
    sizes, strides = merged(views)
    if len(sizes) > AXES:
        raise Unsupported(f"{step.name} needs a walk over {len(sizes)} axes; the C target has {AXES}", "export to onnx")
    missing = AXES - len(sizes)
    fields = {"size": [1] * missing + sizes}
    for name, steps in zip(names, strides, strict=True):
        fields[name] = [0] * missing + steps
    if not sizes:
        fields |= {name: [*values[:-1], 1] for name, values in fields.items() if name != "size"}
    text = _numbers({name: "{" + ", ".join(map(str, values)) + "}" for name, values in fields.items()})
    return f"static const nn_walk w = {{{text}}};"


def _inner(views: Sequence[View]) -> int:
    """Length of the innermost loop."""
    return (merged(views)[0] or [1])[-1]


def _walked(writer: Writer, step: Step, *words: str, kernel: str = "") -> list[str]:
    """A kernel of single elements: walk, words in between, inputs, output."""
    names = ("out", "one", "two")[: 1 + len(step.inputs)]
    places = [writer.pointer(view) for view in step.inputs] + [writer.pointer(step.output, True)]
    views = list(zip((step.output, *step.inputs), names, strict=True))
    best = max((views, [*views[1:], views[0]]), key=lambda way: _inner([view for view, _ in way]))
    text = walk([view for view, _ in best], [name for _, name in best], step)
    return [text, f"nn_{kernel or step.kernel}({', '.join(('&w', *words, *places))});"]


def _unary(writer: Writer, step: Step) -> list[str]:
    words = (f"NN_{step.options['function'].upper()}", *map(number, step.options["numbers"]))
    return _walked(writer, step, *words)


def _binary(writer: Writer, step: Step) -> list[str]:
    return _walked(writer, step, f"NN_{step.options['operator'].upper()}")


def _copy(writer: Writer, step: Step) -> list[str]:
    source, target = step.inputs[0], step.output
    kernel = f"copy_{32 if source.dtype in ('float32', 'int32') else 8}"
    ways = [([target, source], ("out", "one")), ([source, target], ("one", "out"))]
    views, names = max(ways, key=lambda way: _inner(way[0]))
    ends = [writer.pointer(source), writer.pointer(target, True)]
    return [walk(views, names, step), f"nn_{kernel}(&w, {', '.join(ends)});"]


def _fill(writer: Writer, step: Step) -> list[str]:
    value = step.options["value"]
    kind, text = ("s8", str(int(value))) if step.output.dtype == "int8" else ("f32", number(value))
    return [f"nn_fill_{kind}({step.output.buffer.size}, {text}, {writer.pointer(step.output, True)});"]


def _border(writer: Writer, step: Step) -> list[str]:
    value = step.options["value"]
    kind, text = ("s8", str(int(value))) if step.output.dtype == "int8" else ("f32", number(value))
    if step.output.dtype == "uint32":
        kind, text = "u32", "0"
    sizes = zip(("batch", "height", "width", "channels"), step.output.sizes, strict=True)
    (top, bottom), (left, right) = step.options["ends"][2:]
    fields = {**dict(sizes), "top": top, "bottom": bottom, "left": left, "right": right}
    return [
        f"static const nn_border b = {{{_numbers(fields)}}};",
        f"nn_border_{kind}(&b, {text}, {writer.pointer(step.output, True)});",
    ]


def _cast(writer: Writer, step: Step) -> list[str]:
    return _walked(writer, step)


def _reduce(writer: Writer, step: Step) -> list[str]:
    source, axes = step.inputs[0], step.options["axes"]
    count = int(np.prod([source.shape[axis] for axis in axes], dtype=np.int64))
    target = step.output.expanded(source.shape)
    ends = [writer.pointer(source), writer.pointer(step.output, True)]
    word = f"NN_{step.options['function'].upper()}"
    return [walk([source, target], ("one", "out"), step), f"nn_reduce_f32(&w, {word}, {count}, {', '.join(ends)});"]


def _softmax(writer: Writer, step: Step) -> list[str]:
    source, target, axis = step.inputs[0], step.output, step.options["axis"]
    rest = [view.sliced(axis, 0, 1) for view in (target, source)]
    numbers = (source.shape[axis], source.stride(axis), target.stride(axis), int(step.options["log"]))
    ends = [writer.pointer(source), writer.pointer(target, True)]
    words = ", ".join(("&w", *map(str, numbers), *ends))
    return [walk(rest, ("out", "one"), step), f"nn_softmax_f32({words});"]


CALLS: dict[str, Callable[[Writer, Step], list[str]]] = {
    "conv_f32": _conv_f32, "depthwise_f32": _conv_f32, "max_pool_f32": _pool, "avg_pool_f32": _pool,
    "max_pool_s8": _pool, "adaptive_pool_f32": _pool, "nearest_f32": _pool, "nearest_s8": _pool,
    "bilinear_f32": _pool, "unary_f32": _unary, "binary_f32": _binary, "copy": _copy, "fill": _fill, "border": _border,
    "cast": _cast,
    "reduce_f32": _reduce, "softmax_f32": _softmax, "conv_s8": _conv_s8, "depthwise_s8": _conv_s8,
    "avg_pool_s8": _avg_pool_s8, "sum_s8": _pair_s8, "product_s8": _pair_s8, "table_s8": _table,
    "quantize": _quantize, "dequantize": _dequantize,
}  # fmt: skip
