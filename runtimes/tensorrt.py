"""TensorRT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgepack.contracts import Arrays, Runtime, Session
from edgepack.errors import DeviceError, InputError, IntegrityError, MissingExtra, Unsupported, require
from edgepack.runtimes import _tensorrt_cuda as cuda
from edgepack.runtimes import _tensorrt_engine as engines
from edgepack.runtimes._inputs import Gate
from edgepack.samples import compute, count, has_dynamic_batch

if TYPE_CHECKING:
    from edgepack.artifact import Artifact

SETTINGS = "tensorrt.json"
OLDEST, NEWEST = (10, 9), (11,)
EXTRA = "tensorrt-run"
# Largest difference from the float32 simulation, over the largest value, that the number format itself explains.
LIMITS = {"float32": 1e-4, "tf32": 1e-2, "float16": 2e-2}


@dataclass(frozen=True, kw_only=True)
class Tensorrt(Runtime):
    """Run ONNX files exported for TensorRT on an NVIDIA GPU.

    The first load builds an engine for this GPU, which takes from seconds to minutes; later loads take it from the
    cache folder. Engines are kept per model, settings, GPU and TensorRT version and are never used elsewhere.

    Attributes:
        compute: number format of the engine (``float32``, ``tf32``, ``float16``); None for what the
            artifact says.
        device: number of the GPU.
        cache: folder that keeps engines; None for edgepack's folder in the user's cache.
        engine: an engine file to use instead of building one. It must have been built here, from this artifact.
    """

    formats: ClassVar[tuple[str, ...]] = ("tensorrt",)

    compute: str | None = None
    device: int = 0
    cache: str | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        if self.compute not in (None, *LIMITS):
            raise ValueError(f"compute is one of {', '.join(LIMITS)}, not {self.compute!r}")
        if self.device < 0:
            raise ValueError(f"device is 0 for the first GPU, not {self.device}")

    def version(self) -> str:
        """TensorRT's version.

        Raises:
            MissingExtra: the package is not installed; says too whether driver or GPU are missing.
            DeviceError: there is no driver or no GPU.
        """
        try:
            trt = _module()
        except MissingExtra as error:
            raise self._all_missing(error) from error
        cuda.Driver().gpu(self.device)
        return str(trt.__version__)

    def _all_missing(self, package: MissingExtra) -> MissingExtra:
        try:
            cuda.Driver().gpu(self.device)
        except DeviceError as error:
            return MissingExtra(f"{package.message}, and {error.message}", package.hint)
        return package

    def limit(self, artifact: Artifact) -> float:
        """Largest difference from the simulation, over its largest value, that is no fault of the artifact."""
        return LIMITS[self._settings(artifact)["compute"]]

    def load(self, artifact: Artifact, threads: int | None = None) -> Session:
        self.version()
        trt = _module()
        settings = self._settings(artifact)
        model = _model(artifact)
        driver = cuda.Driver()
        gpu = driver.gpu(self.device)
        identity = engines.Identity(
            model=artifact.manifest.files[model.name].sha256,
            settings=engines.settings_key(settings),
            gpu=gpu.name,
            compute_capability=gpu.compute_capability,
            tensorrt=str(trt.__version__),
        )
        place = cuda.Place(driver, self.device)
        log = _log(trt)
        try:
            plan = self._plan(trt, artifact, model, settings, identity, log)
            return _Session(trt, plan, place, artifact, settings, log)
        except BaseException:
            place.close()
            raise

    def _plan(
        self,
        trt: Any,
        artifact: Artifact,
        model: Path,
        settings: Mapping[str, Any],
        identity: engines.Identity,
        log: Any,
    ) -> bytes:
        """The engine: as handed in, from the artifact, from the cache, or built now."""
        handed = [artifact.folder / name for name in artifact.manifest.files if name.endswith(".engine")]
        if self.engine is not None or handed:
            return engines.open_engine(Path(self.engine) if self.engine is not None else handed[0], identity)
        folder = engines.cache_folder(self.cache)
        found = engines.kept(folder, identity)
        if found is None:
            data = model.read_bytes()
            if artifact.manifest.dialect == "float16" or settings["compute"] == "float16":
                from edgepack.runtimes._tensorrt_types import typed

                data = typed(data, settings["compute"])
            found = engines.build(trt, data, settings, log, folder / f"{identity.timing_key}.timings")
            engines.keep(folder, identity, found)
        return found

    def _settings(self, artifact: Artifact) -> dict[str, Any]:
        path = artifact.folder / SETTINGS
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["schema"] != 1 or found["compute"] not in LIMITS or not isinstance(found["profiles"], dict):
                raise ValueError("not settings of this edgepack")
        except (OSError, ValueError, KeyError, TypeError) as error:
            artifact.check_hashes()
            raise InputError(f"{path}: no settings of a TensorRT engine: {error}", "export again") from error
        return {**found, "compute": self.compute or found["compute"]}


class _Session:
    def __init__(
        self, trt: Any, plan: bytes, place: cuda.Place, artifact: Artifact, settings: Mapping[str, Any], log: Any
    ) -> None:
        self._runtime = engines.started(trt.Runtime, log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise IntegrityError(
                f"TensorRT cannot read the engine of {artifact.folder}: {log.last()}", "build it again"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise DeviceError(f"the GPU cannot hold the engine of {artifact.folder}: {log.last()}")
        self._place, self._log = place, log
        self._manifest = artifact.manifest
        self._gate = Gate(artifact.manifest.inputs)
        self._profiles: Mapping[str, Mapping[str, list[int]]] = settings["profiles"]
        self._addresses: dict[str, int] = {}
        self._dtypes = _dtypes(trt, self._engine, artifact)
        self._most = _largest_batch(artifact, self._profiles)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        self._gate.check(inputs)
        self._place.enter()
        specs = self._manifest.inputs
        if self._most is not None and count(specs, inputs) > self._most:
            return compute(self._call, specs, self._manifest.outputs, inputs, self._most)
        return self._call(inputs)

    def _call(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        arrays = {spec.name: np.ascontiguousarray(inputs[spec.name]) for spec in self._manifest.inputs}
        for name, array in arrays.items():
            self._check_size(name, array.shape)
            if not self._context.set_input_shape(name, array.shape):
                raise InputError(f"the engine refuses input {name!r} of shape {array.shape}: {self._log.last()}")
            self._place.upload(array, self._bind(name, array.nbytes))
        results = {}
        for spec in self._manifest.outputs:
            results[spec.name] = np.empty(tuple(self._context.get_tensor_shape(spec.name)), self._dtypes[spec.name])
            self._bind(spec.name, results[spec.name].nbytes)
        if not self._context.execute_async_v3(self._place.stream):
            raise DeviceError(f"the engine failed on the GPU: {self._log.last()}")
        for name, array in results.items():
            self._place.download(self._addresses[name], array)
        self._place.wait()
        return results

    def close(self) -> None:
        self._place.enter()
        del self._context, self._engine, self._runtime
        self._place.close()

    def _bind(self, name: str, size_bytes: int) -> int:
        address = self._place.buffer(name, max(size_bytes, 1))
        if self._addresses.get(name) != address:
            if not self._context.set_tensor_address(name, address):
                raise DeviceError(f"the engine refuses the buffer of {name!r}: {self._log.last()}")
            self._addresses[name] = address
        return address

    def _check_size(self, name: str, shape: tuple[int, ...]) -> None:
        profile = self._profiles.get(name)
        if profile is None:
            return
        for axis, (low, size, high) in enumerate(zip(profile["min"], shape, profile["max"], strict=True)):
            if not low <= size <= high:
                raise InputError(
                    f"input {name!r} has shape {shape}; the engine takes {low} to {high} along axis {axis}",
                    "export with other sizes: options batch and axes",
                )


def _module() -> Any:
    """TensorRT. Raises MissingExtra: it is not installed, cannot be loaded, or has another version."""
    try:
        trt = require("tensorrt", EXTRA)
    except (ImportError, OSError) as error:
        raise MissingExtra(
            f"the package 'tensorrt' is installed but cannot be loaded: {error}", f"pip install 'edgepack[{EXTRA}]'"
        ) from error
    numbers = tuple(int(word) for word in str(trt.__version__).split(".")[:2] if word.isdigit())
    if numbers < OLDEST or numbers[:1] > NEWEST:
        raise MissingExtra(
            f"TensorRT {trt.__version__} is installed, edgepack needs {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}",
            f"pip install 'edgepack[{EXTRA}]'",
        )
    return trt


def _log(trt: Any) -> Any:
    """A quiet logger that remembers TensorRT's complaints."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.lines.append(msg.strip())

        def last(self) -> str:
            return self.lines[-1] if self.lines else "it gives no reason"

    return Log()


def _model(artifact: Artifact) -> Path:
    """The ONNX file, once its hash is checked: an engine must not be kept under the name of another model."""
    artifact.check_hashes()
    return artifact.file(".onnx")


def _dtypes(trt: Any, engine: Any, artifact: Artifact) -> dict[str, Any]:
    """NumPy type of each output; inputs and outputs must be those of the manifest."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    wanted = {spec.name: spec.dtype for spec in (*artifact.manifest.inputs, *artifact.manifest.outputs)}
    try:
        found = {name: str(np.dtype(trt.nptype(engine.get_tensor_dtype(name)))) for name in names}
    except TypeError as error:
        raise Unsupported(f"{artifact.folder}: an input or output has a type NumPy lacks: {error}") from error
    if found != wanted:
        raise InputError(f"{artifact.folder}: the manifest names {wanted}, the engine {found}", "export again")
    return {name: np.dtype(dtype) for name, dtype in found.items()}


def _largest_batch(artifact: Artifact, profiles: Mapping[str, Mapping[str, list[int]]]) -> int | None:
    """Samples that one call takes at most, None where the batch is fixed."""
    specs = artifact.manifest.inputs
    if not has_dynamic_batch(specs) or not has_dynamic_batch(artifact.manifest.outputs):
        return None
    return min(profiles[spec.name]["max"][spec.shape.index("batch")] for spec in specs)
