"""OpenVINO."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from edgepack.contracts import Arrays, Runtime, Session, Step
from edgepack.errors import InputError, Unsupported, require
from edgepack.runtimes._inputs import Gate
from edgepack.versions import installed

if TYPE_CHECKING:
    import numpy as np

    from edgepack.artifact import Artifact

HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Openvino(Runtime):
    """Run OpenVINO and ONNX files with OpenVINO on the CPU.

    Attributes:
        precision: ``float32``, ``float16``, ``bfloat16``, or ``default`` for the engine's choice, which is bfloat16
            where the processor has it: faster, and about three digits.
        device: OpenVINO's name of the processor.
    """

    formats: ClassVar[tuple[str, ...]] = ("openvino", "onnx")

    precision: str = "float32"
    device: str = "CPU"

    def __post_init__(self) -> None:
        if self.precision not in (*HINTS, "default"):
            raise ValueError(f"precision is one of {', '.join((*HINTS, 'default'))}, not {self.precision!r}")

    def version(self) -> str:
        module = require("openvino", "openvino-run")
        return installed("openvino") or str(module.__version__)

    def load(self, artifact: Artifact, threads: int | None = None) -> Session:
        ov = require("openvino", "openvino-run")
        path = artifact.file(".onnx" if artifact.manifest.format == "onnx" else ".xml")
        core = ov.Core()
        try:
            model = core.read_model(path)
        except RuntimeError as error:
            artifact.check_hashes()
            raise InputError(
                f"OpenVINO {self.version()} cannot read {path}: {_sentence(error)}", "export again"
            ) from error
        try:
            compiled = core.compile_model(model, self.device, self._settings(threads))
        except RuntimeError as error:
            artifact.check_hashes()
            raise Unsupported(f"OpenVINO {self.version()} cannot run {path}: {_sentence(error)}") from error
        return _Session(compiled, artifact)

    def trace(self, artifact: Artifact, inputs: Arrays) -> list[Step]:
        ov = require("openvino", "openvino-run")
        core = ov.Core()
        model = core.read_model(artifact.file(".onnx" if artifact.manifest.format == "onnx" else ".xml"))
        nodes = _live(model)
        for port in [port for node in nodes for port in node.outputs()]:
            if not port.get_names():
                port.set_names({_identifier(port)})
        model.add_outputs([port for node in nodes for port in node.outputs()])
        request = core.compile_model(model, self.device, replace(self, precision="float32")._settings(None))
        results = request.create_infer_request().infer(dict(inputs))
        values = {name: array for port, array in results.items() for name in port.get_names()}
        return [
            Step(
                node.get_type_name(),
                node.get_friendly_name(),
                tuple(port.get_source_output().get_any_name() for port in node.inputs()
                      if port.get_source_output().get_names()),
                {name: values[name] for port in node.outputs() for name in [port.get_any_name()]},
            )
            for node in nodes
        ]  # fmt: skip

    def _settings(self, threads: int | None) -> dict[str, Any]:
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if self.device == "CPU":
            # Pinned threads of several sessions would share one core.
            settings |= {"NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
            if threads is not None:
                settings["INFERENCE_NUM_THREADS"] = threads
        if self.precision != "default":
            settings["INFERENCE_PRECISION_HINT"] = HINTS[self.precision]
        return settings


def _live(model: Any) -> list[Any]:
    """Operators whose results depend on the inputs, in order."""
    live: dict[str, Any] = {}
    nodes = []
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        sources = [port.get_source_output().get_node().get_friendly_name() for port in node.inputs()]
        if kind == "Parameter" or (kind != "Result" and any(source in live for source in sources)):
            live[node.get_friendly_name()] = node
            if kind != "Parameter":
                nodes.append(node)
    return nodes


def _identifier(port: Any) -> str:
    return f"{port.get_node().get_friendly_name()}:{port.get_index()}"


class _Session:
    def __init__(self, compiled: Any, artifact: Artifact) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._gate = Gate(artifact.manifest.inputs)
        manifest = artifact.manifest
        try:
            self._outputs = [(spec.name, compiled.output(spec.name)) for spec in manifest.outputs]
            for spec in manifest.inputs:
                compiled.input(spec.name)
        except RuntimeError as error:
            wanted = [spec.name for spec in (*manifest.inputs, *manifest.outputs)]
            raise InputError(f"{artifact.folder}: the model lacks one of {wanted}: {_sentence(error)}") from error

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        self._gate.check(inputs)
        # Inputs are only read, so they need no copy; outputs are copied because the next call overwrites them.
        results = self._request.infer(inputs, share_inputs=True, share_outputs=False)
        return {name: results[port] for name, port in self._outputs}

    def close(self) -> None:
        del self._request, self._compiled, self._outputs


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
