"""What lies in a saved Core ML package."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.contents import key
from edgepack.contracts import Census
from edgepack.errors import require
from edgepack.silence import silence

TYPES = {"fp16": "float16", "fp32": "float32", "bool": "bool"}


def read(package: Path) -> Any:
    """The main function of a saved package, in coremltools' words."""
    with silence():
        reader = require("coremltools.converters.mil.frontend.milproto.load", "coreml")
        spec = require("coremltools.models.utils", "coreml").load_spec(str(package))
        folder = package / "Data" / "com.apple.CoreML" / "weights"
        program = reader.load(spec, specification_version=spec.specificationVersion, file_weights_dir=str(folder))
    return program.functions["main"]


def census(function: Any, half: bool) -> Census:
    """Count what lies in a package.

    Args:
        function: its main function.
        half: note the operators that stayed float32.
    """
    operators, weights, contents, wide = Counter[str](), Counter[str](), [], 0
    for operator in function.operations:
        if operator.op_type != "const":
            operators[operator.op_type] += 1
            wide += operator.op_type != "cast" and _is_wide(operator)
            continue
        value = operator.outputs[0]
        array = np.asarray(value.val)
        if array.ndim and array.dtype.kind in "fiub":
            name, bits = _stored(value)
            weights[name] += -(-array.size * bits // 8)
            contents.append(key(array))
    notes = [f"{wide} operators stay float32: 16 bits do not hold one of their constants"] if half and wide else []
    if operators["batch_norm"]:
        notes.append(f"{operators['batch_norm']} batch_norm operators are left; the pass fold may help")
    return Census(dict(operators), dict(weights), tuple(notes), tuple(item for item in contents if item is not None))


def packed_values(function: Any) -> Iterator[np.ndarray[Any, Any]]:
    """The values of a package's constants of 4 bits."""
    for operator in function.operations:
        if operator.op_type == "const" and _stored(operator.outputs[0])[0] == "int4":
            yield np.asarray(operator.outputs[0].val).astype(np.int8)


def _is_wide(operator: Any) -> bool:
    return any(value.is_tensor_or_scalar_of(dtype="fp32") is True for value in operator.outputs)


def _stored(value: Any) -> tuple[str, int]:
    """Name and bits of the type a constant is stored in."""
    types = require("coremltools.converters.mil.mil", "coreml").types
    word = str(types.builtin_to_string(value.dtype))
    return TYPES.get(word, word), int(re.sub(r"\D", "", word) or 8)
