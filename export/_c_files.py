"""A planned network as a folder of C: model.h, model.c, weights.c, kernels, selftest.c and CMakeLists.txt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.export import _c_bits_calls  # noqa: F401  (its kernels are among the calls)
from edgepack.export._c_arena import ALIGNMENT
from edgepack.export._c_calls import CTYPES, Writer, argument, call
from edgepack.export._c_graph import Array, Network, Step, View
from edgepack.export._c_pack import definition, number

Samples = Mapping[str, Array]
KERNELS = "c_kernels"


@dataclass(frozen=True)
class Form:
    """What the files say besides the network.

    Attributes:
        prefix: of every name that others can see.
        arena_bytes: memory of inner values.
        inputs, answers: samples of the self-test, one row each.
        tolerance: of answers, times the largest; 0 for equality.
    """

    prefix: str
    arena_bytes: int
    inputs: Samples
    answers: Samples
    tolerance: float


def sanitized(name: str) -> str:
    """A name as the begin of C's names."""
    word = re.sub(r"[^0-9A-Za-z]+", "_", name).strip("_").lower()
    return word if word and not word[0].isdigit() else f"m{'_' if word else ''}{word}".rstrip("_")


def write(network: Network, folder: Path, form: Form) -> list[Array]:
    """Write every file; returns the constants they hold."""
    writer = Writer()
    texts = kernels()
    texts["model.c"] = _model(network, writer, form)
    texts["model.h"] = _header(network, form)
    texts["weights.c"] = '#include "weights.h"\n#include <math.h>\n\n' + "\n".join(writer.constants.values())
    declared = "".join(f"extern {text.partition(' = ')[0]};\n" for text in writer.constants.values())
    texts["weights.h"] = f"#ifndef NN_WEIGHTS_H\n#define NN_WEIGHTS_H\n#include <stdint.h>\n\n{declared}\n#endif\n"
    texts["selftest.c"] = _selftest(network, form)
    texts["CMakeLists.txt"] = template("CMakeLists.txt")
    for name, text in sorted(texts.items()):
        (folder / name).write_text(prefixed(text, form.prefix), encoding="utf-8", newline="\n")
    return writer.contents


def kernels() -> dict[str, str]:
    """The kernels' files as they are kept."""
    room = files("edgepack.export") / KERNELS
    return {item.name: item.read_text(encoding="utf-8") for item in room.iterdir() if item.name.endswith((".c", ".h"))}


def template(name: str) -> str:
    return (files("edgepack.export") / KERNELS / f"{name}.in").read_text(encoding="utf-8")


def prefixed(text: str, prefix: str) -> str:
    """Kernels and model call everything nn_…; several networks in one program need names of their own."""
    text = re.sub(r'(?<![A-Za-z0-9_"])nn_(?=[a-z0-9])', f"{prefix}_", text)
    return re.sub(r"(?<![A-Za-z0-9_])NN_(?=[A-Z0-9])", f"{prefix.upper()}_", text)


def _signature(network: Network) -> str:
    reads = [f"const {CTYPES[view.dtype]} *{argument(name)}" for name, view in network.inputs.items()]
    writes = [f"{CTYPES[view.dtype]} *{argument(name)}" for name, view in network.outputs.items()]
    return f"void nn_run({', '.join((*reads, *writes))})"


def _header(network: Network, form: Form) -> str:
    lines = []
    for side in (network.inputs, network.outputs):
        for name, view in side.items():
            shape = " x ".join(map(str, view.shape)) or "1"
            lines.append(f" *   {argument(name)}: {name}, {CTYPES[view.dtype]}, {shape}, the last axis densest")
    return template("model.h").format(
        arguments="\n".join(lines),
        arena=form.arena_bytes,
        sizes="\n".join(
            f"#define NN_{argument(name)[2:].upper()}_SIZE {view.count}"
            for side in (network.inputs, network.outputs)
            for name, view in side.items()
        ),
        run=_signature(network),
    )


def _model(network: Network, writer: Writer, form: Form) -> str:
    body = []
    for number_, step in enumerate(network.steps):
        body += [f"    {{ /* {number_}: {step.name} */"]
        body += [f"        {line}" for line in call(writer, step)]
        body += [f"        NN_DONE({number_}, {_begin(writer, step)})", "    }"]
    table = [f"    {_quoted(json.dumps(described(step)))}," for step in network.steps]
    return template("model.c").format(
        size=form.arena_bytes + ALIGNMENT,
        mask=ALIGNMENT - 1,
        run=_signature(network),
        body="\n".join(body),
        table="\n".join(table),
        count=len(network.steps),
    )


def _begin(writer: Writer, step: Step) -> str:
    """Where the memory of a step's output begins: its buffer, not the view."""
    whole = View(step.output.buffer, (), (), ())
    return writer.pointer(whole, True)


def described(step: Step) -> dict[str, Any]:
    """What a trace needs to know of a step."""
    view = step.output
    places = [view.axis(axis) for axis in range(len(view.sizes))]
    return {
        "kernel": step.kernel,
        "name": step.name,
        "inputs": [_identity(source) for source in step.inputs if source.buffer.constant is None],
        "output": _identity(view),
        "dtype": view.dtype,
        "size": view.buffer.size,
        "offset": view.offset,
        "shape": [view.sizes[place] for place in places],
        "strides": [view.strides[place] for place in places],
    }


def _identity(view: View) -> str:
    place = str(view.buffer.offset) if view.buffer.place == "arena" else view.buffer.place
    return f"{place}:{view.offset}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _selftest(network: Network, form: Form) -> str:
    arrays, calls, checks, reads, writes = [], [], [], [], []
    rows = len(next(iter(form.inputs.values())))
    for name, view in network.inputs.items():
        arrays.append(definition(f"in_{argument(name)}", form.inputs[name].reshape(-1), "static const "))
        calls.append(f"in_{argument(name)} + row * {view.count}")
        reads.append(f"    read_all(file, {argument(name)}, sizeof {argument(name)});")
    for name, view in network.outputs.items():
        arrays.append(definition(f"expected_{argument(name)}", form.answers[name].reshape(-1), "static const "))
        arrays.append(f"static {CTYPES[view.dtype]} out_{argument(name)}[{view.count}];\n")
        calls.append(f"out_{argument(name)}")
        expected = f"expected_{argument(name)} + row * {view.count}"
        checks.append(f"        worst = further(worst, apart(out_{argument(name)}, {expected}, {view.count}));")
        writes.append(f"    fwrite(out_{argument(name)}, sizeof out_{argument(name)}, 1, file);")
    held = [f"    static {CTYPES[view.dtype]} {argument(name)}[{view.count}];" for name, view in network.inputs.items()]
    given = [argument(name) for name in network.inputs] + [f"out_{argument(name)}" for name in network.outputs]
    return template("selftest.c").format(
        arrays="\n".join(arrays), rows=rows, arguments=", ".join(calls), checks="\n".join(checks),
        tolerance=number(form.tolerance), held="\n".join(held), reads="\n".join(reads), given=", ".join(given),
        writes="\n".join(writes),
    )  # fmt: skip


def size_of(contents: list[Array]) -> int:
    """Bytes of constants once compiled."""
    return sum(np.asarray(array).nbytes for array in contents)
