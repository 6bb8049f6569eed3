"""ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from edgepack.contracts import Arrays, Runtime, Session, Step
from edgepack.errors import InputError, Unsupported, require
from edgepack.runtimes import _onnx_operators
from edgepack.runtimes._inputs import Gate
from edgepack.versions import installed

if TYPE_CHECKING:
    import numpy as np

    from edgepack.artifact import Artifact


@dataclass(frozen=True, kw_only=True)
class Onnxruntime(Runtime):
    """Run ONNX files with ONNX Runtime on the CPU.

    Attributes:
        optimize: let the engine fuse and rewrite the graph when it loads it.
        spin: let idle threads wait actively: a little faster alone, much slower on a machine with other work.
    """

    formats: ClassVar[tuple[str, ...]] = ("onnx",)
    proves: ClassVar[tuple[str, ...]] = ("tensorrt",)

    optimize: bool = True
    spin: bool = False

    def version(self) -> str:
        require("onnxruntime", "onnx-run")
        return installed("onnxruntime") or str(require("onnxruntime", "onnx-run").__version__)

    def load(self, artifact: Artifact, threads: int | None = None) -> Session:
        ort = require("onnxruntime", "onnx-run")
        path, options = artifact.file(".onnx"), self._options(ort, threads, artifact)
        if artifact.manifest.format in self.proves:
            # It would round float biases to integers, which the other engine does not.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if artifact.manifest.dialect.startswith("s8"):  # signed kernels, which it else takes on ARM only
            options.add_session_config_entry("session.qdqisint8allowed", "1")
        try:
            engine = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except _errors() as error:
            artifact.check_hashes()
            sentence = f"ONNX Runtime {self.version()} cannot load {path}: {_sentence(error)}"
            if type(error).__name__ == "NotImplemented":
                raise Unsupported(sentence) from error
            raise InputError(sentence, "export again") from error
        return _Session(engine, artifact)

    def trace(self, artifact: Artifact, inputs: Arrays) -> list[Step]:
        ort, onnx = require("onnxruntime", "onnx-run"), require("onnx", "onnx")
        model = onnx.load(artifact.file(".onnx"))
        ports = {port.name for port in model.graph.output}
        inner = [name for node in model.graph.node for name in node.output if name and name not in ports]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
        options = replace(self, optimize=False)._options(ort, None, artifact)
        engine = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [port.name for port in engine.get_outputs()]
        values = dict(zip(names, engine.run(names, dict(inputs)), strict=True))
        live = {*inputs, *values}
        return [
            Step(
                node.op_type,
                node.name,
                tuple(name for name in node.input if name in live),
                {name: values[name] for name in node.output if name in values},
            )
            for node in model.graph.node
        ]

    def _options(self, ort: Any, threads: int | None, artifact: Artifact) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if self.optimize else level.ORT_DISABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spin else "0")
        if _onnx_operators.needed(artifact):
            options.register_custom_ops_library(str(_onnx_operators.operators()))
        return options


class _Session:
    def __init__(self, engine: Any, artifact: Artifact) -> None:
        self._engine = engine
        self._run = engine.run
        self._gate = Gate(artifact.manifest.inputs)
        self._names = [spec.name for spec in artifact.manifest.outputs]
        found = {port.name for port in (*engine.get_inputs(), *engine.get_outputs())}
        wanted = [spec.name for spec in (*artifact.manifest.inputs, *artifact.manifest.outputs)]
        if set(wanted) != found:
            raise InputError(
                f"{artifact.folder}: the manifest names {wanted}, the model {sorted(found)}", "export again"
            )

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        self._gate.check(inputs)
        return dict(zip(self._names, self._run(self._names, inputs), strict=True))

    def close(self) -> None:
        del self._engine, self._run


def _errors() -> tuple[type[Exception], ...]:
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", "onnx-run")
    names = "Fail InvalidArgument InvalidGraph InvalidProtobuf NoModel NoSuchFile NotImplemented RuntimeException"
    return (UnicodeDecodeError, *(getattr(state, name) for name in names.split()))  # an error text it cannot decode


def _sentence(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
