"""An interpreter of saved Core ML packages: their operators and stored weights, computed by PyTorch.

coremltools reads the package back into MIL, Core ML's own language; the functions of the ``_mil_*`` modules compute
its operators. This shows what the *file* says, on any machine; how Apple's engines round is not part of it. Values
that the file calls float16 are exact 16-bit numbers where they are stored; computed ones are held in float32, or
rounded to 16 bits after every operator when asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgepack.errors import Unsupported, nearest, require
from edgepack.runtimes import _mil_images, _mil_indexing, _mil_layers, _mil_math, _mil_recurrent, _mil_shapes
from edgepack.runtimes._mil_constants import CONSTANTS
from edgepack.silence import unlogged

OPERATORS: dict[str, Callable[..., Any]] = {
    name: function
    for module in (_mil_math, _mil_layers, _mil_shapes, _mil_indexing, _mil_images, _mil_recurrent)
    for name, function in module.OPERATORS.items()
}
Watch = Callable[["Operator", Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Operator:
    """One operator of a program.

    Attributes:
        kind: MIL's type, such as ``conv``.
        name: in the file.
        arguments: parameter → name of a value, or names of several.
        outputs: names of its results.
        half: for each output, whether the file calls it float16.
        last_use: values that nothing needs afterwards.
    """

    kind: str
    name: str
    arguments: Mapping[str, str | tuple[str, ...]]
    outputs: tuple[str, ...]
    half: tuple[bool, ...]
    last_use: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for value in self.arguments.values() for name in _names(value))


@dataclass(frozen=True)
class Program:
    """The main function of a package.

    Attributes:
        inputs: names, in order.
        outputs: names, in order.
        constants: dense weights and parameters by name; scalars as Python values.
        operators: in the order of the file.
        rounds: round values that the file calls float16 to 16 bits after every operator.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Any]
    operators: tuple[Operator, ...]
    rounds: bool = False

    @classmethod
    def load(cls, package: Path, rounds: bool = False) -> Program:
        """Read a package.

        Raises:
            Unsupported: it has operators the interpreter does not know; names them.
            Exception: whatever coremltools raises for a damaged file.
        """
        function = read(package)
        found = [operator for operator in function.operations if not is_constant(operator)]
        unknown = sorted({operator.op_type for operator in found} - OPERATORS.keys())
        if unknown:
            raise Unsupported(
                f"the Core ML interpreter has no operator {', '.join(unknown)}", nearest(unknown[0], OPERATORS)
            )
        constants = {name: _argument(value) for name, value in dense_constants(function, exact=not rounds).items()}
        outputs = tuple(value.name for value in function.outputs)
        return cls(tuple(function.inputs), outputs, constants, _operators(found, outputs, constants), rounds)

    def run(self, inputs: Mapping[str, Tensor], watch: Watch | None = None) -> dict[str, Tensor]:
        """Compute the outputs; ``watch`` sees every operator with its results."""
        values: dict[str, Any] = {**self.constants, **inputs}
        with torch.inference_mode():
            for operator in self.operators:
                results = self._results(operator, values)
                values.update(results)
                if watch is not None:
                    watch(operator, results)
                for name in operator.last_use:
                    del values[name]
        return {name: _mil_math.tensor(values[name]) for name in self.outputs}

    def _results(self, operator: Operator, values: Mapping[str, Any]) -> dict[str, Tensor]:
        arguments = {
            name: values[source] if isinstance(source, str) else [values[item] for item in source]
            for name, source in operator.arguments.items()
        }
        try:
            found = OPERATORS[operator.kind](**arguments)
        except (TypeError, ValueError) as error:
            raise Unsupported(
                f"the Core ML interpreter cannot compute {operator.kind} {operator.name!r}: {error}"
            ) from error
        results = found if isinstance(found, tuple | list) else (found,)
        if self.rounds:
            pairs = zip(results, operator.half, strict=True)
            results = [result.half().float() if half else result for result, half in pairs]
        return dict(zip(operator.outputs, results, strict=True))


def read(package: Path) -> Any:
    """The main function of a saved package, as coremltools' MIL."""
    with unlogged():  # coremltools says on import which versions it was tested with, and that it is not on a Mac
        reader = require("coremltools.converters.mil.frontend.milproto.load", "coreml-run")
        spec = require("coremltools.models.utils", "coreml-run").load_spec(str(package))
        weights = package / "Data" / "com.apple.CoreML" / "weights"
        program = reader.load(spec, specification_version=spec.specificationVersion, file_weights_dir=str(weights))
    return program.functions["main"]


def is_constant(operator: Any) -> bool:
    return str(operator.op_type).startswith("const")


def dense_constants(function: Any, exact: bool = False) -> dict[str, Any]:
    """Every constant of a MIL function by name, decompressed; arrays, NumPy scalars and strings.

    Args:
        exact: decompress in float32 what the file decompresses in float16.
    """
    dense: dict[str, Any] = {}
    for operator in function.operations:
        if operator.op_type == "const":
            dense[operator.outputs[0].name] = operator.outputs[0].val
        elif is_constant(operator):
            arguments = {name: dense[value.name] for name, value in operator.inputs.items()}
            if exact:
                arguments = {name: _widened(value) for name, value in arguments.items()}
            results = CONSTANTS[operator.op_type](**arguments)
            results = results if isinstance(results, tuple) else (results,)
            dense |= {output.name: value for output, value in zip(operator.outputs, results, strict=True)}
    return dense


def _widened(value: Any) -> Any:
    return value.astype(np.float32) if getattr(value, "dtype", None) == np.float16 else value


def _argument(value: Any) -> Any:
    """A constant as operators take it: tensors of float32, int32 or bool; scalars and strings as Python's own."""
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.ndim == 0:
        return array.item()
    wide = {"f": np.float32, "i": np.int32, "u": np.int32, "b": np.bool_}.get(array.dtype.kind)
    if wide is None:
        return array.tolist()
    return torch.from_numpy(np.array(array, dtype=wide))


def _operators(found: Sequence[Any], outputs: Sequence[str], constants: Mapping[str, Any]) -> tuple[Operator, ...]:
    seen = {*outputs, *constants}
    operators: list[Operator] = []
    for operator in reversed(found):
        arguments = {
            name: tuple(item.name for item in value) if isinstance(value, list | tuple) else value.name
            for name, value in operator.inputs.items()
        }
        made = tuple(value.name for value in operator.outputs)
        used = dict.fromkeys(name for value in arguments.values() for name in _names(value))
        last = tuple(name for name in (*used, *made) if name not in seen)
        seen |= {*last}
        half = tuple(_is_half(value) for value in operator.outputs)
        operators.append(Operator(operator.op_type, operator.name or "", arguments, made, half, last))
    return tuple(reversed(operators))


def _is_half(value: Any) -> bool:
    return bool(value.is_tensor_or_scalar_of(dtype="fp16"))


def _names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
