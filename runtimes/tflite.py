"""LiteRT, formerly TensorFlow Lite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from edgepack.contracts import INTEGERS, Arrays, Runtime, Session, Step
from edgepack.errors import InputError, MissingExtra, require
from edgepack.runtimes._inputs import Gate
from edgepack.silence import muted
from edgepack.versions import installed

if TYPE_CHECKING:
    import numpy as np

    from edgepack.artifact import Artifact

DELEGATE = "DELEGATE"
OUTPUTS = 8  # of a subgraph's table in the schema
PACKAGES = {"ai-edge-litert": "ai_edge_litert", "tflite-runtime": "tflite_runtime"}


@dataclass(frozen=True, kw_only=True)
class Tflite(Runtime):
    """Run TFLite files with LiteRT on the CPU, or with tflite-runtime where only that is installed.

    Attributes:
        xnnpack: let XNNPACK run the operators that it can; without it TFLite's own kernels run all of them.
    """

    formats: ClassVar[tuple[str, ...]] = ("tflite",)

    xnnpack: bool = True

    def version(self) -> str:
        package, module = _engine()
        return installed(package) or str(module.__name__)

    def load(self, artifact: Artifact, threads: int | None = None) -> Session:
        return _Session(self._interpreter(artifact, threads, self.xnnpack), artifact)

    def trace(self, artifact: Artifact, inputs: Arrays) -> list[Step]:
        if self.xnnpack and artifact.manifest.dialect.startswith(INTEGERS):
            interpreter = self._showing(artifact)
        else:
            interpreter = self._interpreter(artifact, None, xnnpack=False, keep=True)
        session = _Session(interpreter, artifact)
        session.run(inputs)
        nodes = interpreter._get_ops_details()
        names = {index: name for name, index in session.inputs}
        computed = {int(tensor) for node in nodes for tensor in node["outputs"]}
        return [
            Step(
                operator=node["op_name"],
                name="",
                inputs=tuple(
                    names.get(int(t), str(t)) for t in node["inputs"] if int(t) in computed or int(t) in names
                ),
                outputs={str(tensor): interpreter.get_tensor(int(tensor)) for tensor in node["outputs"]},
            )
            for node in nodes
            if node["op_name"] != DELEGATE
        ]

    def _showing(self, artifact: Artifact) -> Any:
        """XNNPACK rounds integers otherwise than TFLite's own kernels, and keeps no values but outputs."""
        schema = require("ai_edge_litert.schema_py_generated", "tflite-run")

        return self._interpreter(artifact, None, xnnpack=True, content=all_outputs(schema, artifact.file(".tflite")))

    def _interpreter(
        self, artifact: Artifact, threads: int | None, xnnpack: bool, keep: bool = False, content: bytes | None = None
    ) -> Any:
        _, module = _engine()
        path = artifact.file(".tflite")
        kinds = module.OpResolverType
        try:
            with muted(2):  # the engine announces its delegate
                interpreter = module.Interpreter(
                    model_path=str(path) if content is None else None,
                    model_content=content,
                    num_threads=threads,
                    experimental_op_resolver_type=kinds.AUTO if xnnpack else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
                    experimental_preserve_all_tensors=keep,
                )
                interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            artifact.check_hashes()
            raise InputError(
                f"LiteRT {self.version()} cannot load {path}: {_sentence(error)}", "export again"
            ) from error
        return interpreter


def all_outputs(schema: Any, path: Path) -> bytes:
    """A file whose every computed value is an output: a longer list at its end, and the offset to it."""
    import numpy as np

    data = bytearray(path.read_bytes())
    main = schema.Model.GetRootAs(data, 0).Subgraphs(0)
    operators = [main.Operators(index) for index in range(main.OperatorsLength())]
    computed = sorted({int(tensor) for operator in operators for tensor in operator.OutputsAsNumpy()})
    place = main._tab.Pos + main._tab.Offset(OUTPUTS)
    data += bytes(-len(data) % 4)
    data[place : place + 4] = np.uint32(len(data) - place).tobytes()
    return bytes(data + np.uint32(len(computed)).tobytes() + np.array(computed, "<i4").tobytes())


class _Session:
    def __init__(self, interpreter: Any, artifact: Artifact) -> None:
        self._interpreter = interpreter
        self._gate = Gate(artifact.manifest.inputs)
        self.inputs = _places(interpreter, artifact, "inputs")
        self._outputs = _places(interpreter, artifact, "outputs")

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        self._gate.check(inputs)
        interpreter = self._interpreter
        for name, index in self.inputs:
            interpreter.set_tensor(index, inputs[name])
        interpreter.invoke()
        return {name: interpreter.get_tensor(index) for name, index in self._outputs}

    def close(self) -> None:
        del self._interpreter


def _places(interpreter: Any, artifact: Artifact, side: str) -> list[tuple[str, int]]:
    """Name and number of each input (or output) tensor, in the manifest's order."""
    signatures: list[dict[str, dict[str, int]]] = list(interpreter._get_full_signature_list().values())
    found = signatures[0][side] if signatures else {}
    wanted = [spec.name for spec in getattr(artifact.manifest, side)]
    if set(wanted) != set(found):
        raise InputError(
            f"{artifact.folder}: the manifest names the {side} {wanted}, the model {sorted(found)}", "export again"
        )
    return [(name, int(found[name])) for name in wanted]


def _engine() -> tuple[str, ModuleType]:
    """The installed engine: package name and module."""
    for package, module in PACKAGES.items():
        try:
            return package, require(f"{module}.interpreter", "tflite-run")
        except MissingExtra:
            continue
    return "ai-edge-litert", require("ai_edge_litert.interpreter", "tflite-run")


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
