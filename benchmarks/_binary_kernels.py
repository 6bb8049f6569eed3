"""Single layers of ±1 as C programs that time each kernel; and the same layer in ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgepack.export import _c_arena, _c_bits_choose
from edgepack.export._c_arena import ALIGNMENT
from edgepack.export._c_calls import Writer, call
from edgepack.export._c_files import kernels
from edgepack.export._c_fuse import fuse
from edgepack.export._c_graph import Step
from edgepack.export._c_read import read
from edgepack.graph import capture, fixed_batch
from edgepack.task import Input, Task
from edgepack.trees import distances, spanning_tree

FLAGS = ("-std=c99", "-D_POSIX_C_SOURCE=199309L", "-O3")
REPEATS = 400


@dataclass(frozen=True)
class Shape:
    """A layer: channels read and written, kernel, rows and columns of what it reads, stride, differing share."""

    inputs: int
    outputs: int
    size: int
    side: int
    stride: int
    density: float

    @property
    def name(self) -> str:
        return f"{self.inputs}-{self.outputs}-{self.size}-{self.side}-{self.stride}-{self.density}"

    @property
    def operations(self) -> int:
        """XNORs of the layer without a tree."""
        side = -(-self.side // self.stride)
        return self.inputs * self.size**2 * self.outputs * side**2


class Layer(nn.Module):
    """Comparison, ±1 convolution, norm, comparison; and one channel of what follows, so that bits are written."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("weight", torch.from_numpy(grown(shape)))
        self.norm = nn.BatchNorm2d(shape.outputs)
        self.register_buffer("last", torch.ones(1, shape.outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        ends = (self.shape.size // 2,) * 4
        bits = nn.functional.pad(torch.where(x >= 0.1, 1.0, -1.0), ends, value=-1.0)
        y = self.norm(nn.functional.conv2d(bits, self.weight, None, self.shape.stride))
        return nn.functional.conv2d(torch.where(y >= 0, 1.0, -1.0), self.last)


def grown(shape: Shape) -> np.ndarray[Any, Any]:
    """Weights whose spanning tree has about this density: each output differs so much from one before it."""
    random, places = np.random.default_rng(0), shape.inputs * shape.size**2
    rows = np.where(random.random((shape.outputs, places)) < 0.5, 1.0, -1.0).astype(np.float32)
    for output in range(1, shape.outputs):
        parent = random.integers(output // 4, output)
        rows[output] = np.where(random.random(places) < shape.density, -rows[parent], rows[parent])
    return rows.reshape(shape.outputs, shape.inputs, shape.size, shape.size)


def program(shape: Shape, work: Path) -> Mapping[str, Any]:
    """Write and compile a program for each level; returns what the cost model says and the tree's density."""
    network = read(fixed_batch(capture(Layer(shape).eval(), Task((Input("x", (1, shape.inputs, *[shape.side] * 2)),)))))
    fuse(network)
    _c_bits_choose.choose(network, "tree")
    arena = _c_arena.plan(network)
    step = next(step for step in network.steps if step.kernel == "tree_bits")
    step.options["ways"] = dict.fromkeys(step.options["ways"], True)
    packing = [one for one in network.steps if one.kernel in ("border", "pack_bits")]
    plain = Step("sign_bits", step.name, step.inputs, step.output, step.options)
    writer = Writer()
    parts = [
        [line for one in packing for line in ("{", *call(writer, one), "}")],
        call(writer, plain),
        call(writer, step),
    ]
    place, memory = work / shape.name, arena + ALIGNMENT
    place.mkdir(parents=True, exist_ok=True)
    _objects(work)
    text = _program(writer, parts, (memory, step.output.buffer.offset, step.output.buffer.bytes), shape)
    (place / "main.c").write_text(text)
    for level in (1, 2):
        objects = sorted(map(str, (work / f"level{level}").glob("*.o")))
        words = [
            "cc",
            *FLAGS,
            f"-I{work / 'source'}",
            str(place / "main.c"),
            *objects,
            "-lm",
            "-o",
            str(place / str(level)),
        ]
        subprocess.run(words, check=True)
    weights = step.options["layer"].signs
    tree = spanning_tree(distances(weights.reshape(len(weights), -1)))
    costs = {
        level: [_c_bits_choose.plain(step, level), _c_bits_choose.along(step, level)] for level in _c_bits_choose.PRICES
    }
    return {"density": tree.length / ((len(weights) - 1) * weights[0].size), "depth": tree.depth, "model_ns": costs,
            "terms": {level: _c_bits_choose.terms(step, level) for level in _c_bits_choose.PRICES}}  # fmt: skip


def _objects(work: Path) -> None:
    """The kernels, compiled once for each level."""
    source = work / "source"
    source.mkdir(exist_ok=True)
    for name, text in kernels().items():
        (source / name).write_text(text)
    for level in (1, 2):
        room = work / f"level{level}"
        room.mkdir(exist_ok=True)
        for path in source.glob("*.c"):
            target = room / f"{path.stem}.o"
            if not target.exists():
                subprocess.run(["cc", *FLAGS, f"-DNN_LEVEL={level}", "-c", str(path), "-o", str(target)], check=True)


def _program(writer: Writer, parts: Sequence[Sequence[str]], sizes: tuple[int, int, int], shape: Shape) -> str:
    memory, offset, result = sizes
    timed = "".join(
        f"        {{ began = now(); {{ {' '.join(lines)} }} spent = now() - began; "
        f"if (spent < best[{place}]) best[{place}] = spent; }}\n"
        + (f"        memcpy(held, nn_arena + {offset}, {result});\n" if place == 1 else "")
        for place, lines in enumerate(parts)
    )
    return f"""#include "bits.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
{chr(10).join(text.replace("const ", "static const ", 1) for text in writer.constants.values())}
static unsigned char nn_memory[{memory}], held[{result}];
static float v_x[{shape.inputs * shape.side**2}];
static double now(void)
{{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}}
int main(void)
{{
    unsigned char *const nn_arena = nn_memory + (-(uintptr_t)nn_memory & {ALIGNMENT - 1});
    double best[3] = {{1e18, 1e18, 1e18}}, began, spent;
    int i;
    for (i = 0; i < {shape.inputs * shape.side**2}; i++)
        v_x[i] = (float)rand() / (float)RAND_MAX - 0.4f;
    for (i = 0; i < {REPEATS}; i++) {{
{timed}    }}
    printf("[%g, %g, %g, %d]\\n", best[0], best[1], best[2], !memcmp(held, nn_arena + {offset}, {result}));
    return 0;
}}
"""


def run(shape: Shape, work: Path, level: int) -> list[float]:
    """Nanoseconds of packing, of every output by itself, along the tree; and whether both gave the same bits."""
    done = subprocess.run([work / shape.name / str(level)], capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout)
    return found


def engines(shape: Shape, seconds: float = 3.0) -> dict[str, float]:
    """Microseconds of the same convolution in ONNX Runtime, with floats and with 8-bit integers, one thread."""
    import time

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    random, found = np.random.default_rng(0), {}
    for name, kind in (("float32", np.float32), ("int8", np.uint8)):
        model = _float_model(shape) if name == "float32" else _integer_model(shape)
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        values = {"x": (random.random((1, shape.inputs, shape.side, shape.side)) * 255).astype(kind)}
        best, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            session.run(None, values)
            best = min(best, time.perf_counter() - began)
        found[name] = 1e6 * best
    return found


def _float_model(shape: Shape) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(grown(shape), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[shape.size // 2] * 4, strides=[shape.stride] * 2)
    return _model(node, [weight], TensorProto.FLOAT, shape)


def _integer_model(shape: Shape) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    values = {"xs": np.float32(0.02), "xz": np.uint8(128), "w": (grown(shape) * 100).astype(np.int8),
              "ws": np.full(shape.outputs, 0.01, np.float32), "wz": np.zeros(shape.outputs, np.int8),
              "ys": np.float32(0.5), "yz": np.uint8(128)}  # fmt: skip
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    node = helper.make_node("QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"],
                            pads=[shape.size // 2] * 4, strides=[shape.stride] * 2)  # fmt: skip
    return _model(node, constants, TensorProto.UINT8, shape)


def _model(node: Any, constants: Sequence[Any], kind: int, shape: Shape) -> bytes:
    from onnx import helper

    given = helper.make_tensor_value_info("x", kind, [1, shape.inputs, shape.side, shape.side])
    made = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph([node], "layer", [given], [made], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    text: bytes = model.SerializeToString()
    return text
