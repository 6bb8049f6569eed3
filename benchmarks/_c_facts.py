"""What C files take and compute beside other files of the same network: memory, sizes, equality, instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import _emulated
from _cases import Case
from _judge import Tally, caller
from _ours import ours_float

from edgepack.artifact import Artifact

Row = dict[str, Any]


def beside(artifacts: Mapping[str, Artifact]) -> Row:
    """Of one network in every format: bytes, and how far C is from its simulation on the golden samples."""
    found = artifacts["c"]
    parity, constants = found.manifest.parity, (found.manifest.census or {})["weight_bytes"]
    return {
        "arena_bytes": arena(found),
        "tflite_arena_bytes": tflite_arena(artifacts["tflite"].file(".tflite")) if "tflite" in artifacts else None,
        "size_bytes": {format: artifact.size_bytes for format, artifact in artifacts.items()},
        "text_bytes": found.files_bytes,
        "constants_bytes": sum(constants.values()),
        "float_bytes": found.manifest.float_size_bytes,
        "simulation": {"max_rel": parity.max_rel, "rounded": parity.rounded, "otherwise": parity.rounded_otherwise,
                       "samples": parity.samples},
    }  # fmt: skip


def arena(artifact: Artifact) -> int:
    """Bytes of memory for inner values, as the header says."""
    found = re.search(r"ARENA_BYTES (\d+)", (artifact.folder / "model.h").read_text(encoding="utf-8"))
    assert found is not None
    return int(found.group(1))


def tflite_arena(path: Path) -> int:
    """Bytes on which LiteRT's interpreter placed inner values, inputs and outputs, XNNPACK left out.

    Temporary values of its kernels are tensors too; constants, which lie in the file, are not counted.
    """
    import ai_edge_litert.schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    content = path.read_bytes()
    model = schema.ModelT.InitFromPackedBuf(content)
    tensors = model.subgraphs[0].tensors
    constant = {index for index, tensor in enumerate(tensors) if _stored(model.buffers[tensor.buffer])}
    interpreter = Interpreter(
        model_content=content, experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    interpreter.allocate_tensors()
    details = [detail for detail in interpreter.get_tensor_details() if detail["index"] not in constant]
    return sum(stop - start for start, stop in _joined(_spans(interpreter, details)))


def _stored(buffer: Any) -> bool:
    return bool((buffer.data is not None and len(buffer.data)) or buffer.offset > 1)


def _spans(interpreter: Any, details: list[Mapping[str, Any]]) -> Iterator[tuple[int, int]]:
    for detail in details:
        values = interpreter.tensor(detail["index"])()
        yield values.ctypes.data, values.ctypes.data + values.nbytes


def _joined(spans: Iterator[tuple[int, int]]) -> list[list[int]]:
    """Spans of addresses, those that touch as one."""
    found: list[list[int]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], stop)
        else:
            found.append([start, stop])
    return found


def on_processors(artifact: Artifact, work: Path) -> Iterator[Row]:
    """The self-test and the instructions of one call, on every processor that can be emulated here."""
    work.mkdir(parents=True, exist_ok=True)
    for processor in _emulated.PROCESSORS:
        lacking = processor.missing()
        if not processor.floats and artifact.manifest.dialect == "float32":
            lacking = "no floating-point unit: not run"
        yield {"processor": processor.name, **({"why": lacking} if lacking else _counted(processor, artifact, work))}


def _counted(processor: _emulated.Processor, artifact: Artifact, work: Path) -> Row:
    program = processor.build(artifact.folder, work)
    done = processor.run(program)
    difference = re.search(r"largest difference (\S+) of", done.stdout)
    assert difference is not None, done.stderr
    return {
        "passed": done.returncode == 0,
        "max_rel": float(difference.group(1)),
        "instructions": processor.instructions(program, _emulated.plugin(work)),
        "size_bytes": processor.reachable_bytes(artifact.folder, work),
    }


def scored(case: Case) -> Row:
    """A network of any size as C files of each picture's size: score, and distance from the simulation."""
    tally, made = Tally(case), dict[tuple[int, ...], Artifact]()
    for images, _ in case.folds[0].scored:
        if images.shape[2:] not in made:
            made[images.shape[2:]] = ours_float(case, "c", images.shape[2:])
    with ExitStack() as stack:
        calls = {size: caller(artifact, stack) for size, artifact in made.items()}
        tally.add(0, lambda images: calls[images.shape[2:]](images))
    parities = [artifact.manifest.parity for artifact in made.values()]
    return {
        "score": dict(tally.result()),
        "simulation": {"max_rel": max(parity.max_rel or 0.0 for parity in parities), "rounded": 0, "otherwise": None,
                       "samples": sum(parity.samples for parity in parities)},
        "files": [{"shape": list(size), "arena_bytes": arena(artifact), "size_bytes": artifact.size_bytes,
                   "tflite_arena_bytes": tflite_arena(ours_float(case, "tflite", size).file(".tflite"))}
                  for size, artifact in made.items()],
        "float_bytes": case.float_bytes,
    }  # fmt: skip
