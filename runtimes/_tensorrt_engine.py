"""TensorRT engines: built from an artifact, kept per GPU and version, and never loaded where they were not built."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgepack.errors import DeviceError, InputError, IntegrityError, Unsupported

BUILD = 1  # counts changes of how engines are built from the same model and settings
LOGGER = logging.getLogger(__name__)
WORDS = {"tensorrt": "TensorRT", "compute_capability": "compute capability", "gpu": "GPU"}


@dataclass(frozen=True)
class Identity:
    """What an engine is of and for. Engines of different identities never stand for each other.

    Attributes:
        model: SHA-256 of the ONNX file.
        settings: SHA-256 of the settings it was built with.
        gpu: the GPU's name.
        compute_capability: of the GPU, such as ``8.7``.
        tensorrt: TensorRT's version.
    """

    model: str
    settings: str
    gpu: str
    compute_capability: str
    tensorrt: str

    @property
    def key(self) -> str:
        return _digest(asdict(self))

    @property
    def timing_key(self) -> str:
        """Timings of kernels depend on the machine and TensorRT alone."""
        return _digest([self.gpu, self.compute_capability, self.tensorrt])

    def differences(self, other: Identity) -> str:
        """``TensorRT 10.9 instead of 10.16`` …, empty when equal."""
        mine, theirs = asdict(self), asdict(other)
        found = []
        for name in ("gpu", "compute_capability", "tensorrt", "model", "settings"):
            if mine[name] != theirs[name]:
                shown = (mine[name], theirs[name]) if name in WORDS else (mine[name][:8], theirs[name][:8])
                found.append(f"{WORDS.get(name, name)} {shown[1]} instead of {shown[0]}")
        return ", ".join(found)


def settings_key(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings that change an engine."""
    names = ("schema", "compute", "strongly_typed", "workspace_mb", "profiles", "sparse_weights")
    return _digest([BUILD, {name: settings.get(name) for name in names}])


def cache_folder(asked: str | None) -> Path:
    """Where engines are kept: as asked, else in the user's cache folder."""
    if asked is not None:
        return Path(asked).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(root).expanduser() / "edgepack" / "tensorrt"


def tag_of(engine: Path) -> Path:
    """The file beside an engine that says what it is."""
    return engine.with_name(f"{engine.name}.json")


def save(engine: Path, data: bytes, identity: Identity) -> None:
    """Write an engine with its tag; first the engine, so that a tag always has a whole one."""
    tag_of(engine).unlink(missing_ok=True)
    _replace(engine, data)
    tag = {"schema": 1, **asdict(identity), "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    _replace(tag_of(engine), (json.dumps(tag, indent=2) + "\n").encode())


def open_engine(engine: Path, wanted: Identity) -> bytes:
    """Read an engine that was built for exactly this place.

    Raises:
        InputError: there is no such file.
        IntegrityError: nothing vouches for it, or it was changed.
        Unsupported: a foreign engine: another model, other settings, another GPU or another TensorRT.
    """
    tag = _tag(engine)
    found = Identity(**{name: str(tag.get(name, "unknown")) for name in asdict(wanted)})
    if found != wanted:
        raise Unsupported(
            f"{engine} is a foreign engine: {wanted.differences(found)}",
            "leave it out: an engine for this machine is built when the artifact is loaded",
        )
    data = engine.read_bytes()
    if hashlib.sha256(data).hexdigest() != tag.get("sha256"):
        raise IntegrityError(f"{engine} was changed: its SHA-256 does not match its tag", "build it again")
    return data


def kept(folder: Path, wanted: Identity) -> bytes | None:
    """The engine kept for this identity, None when there is none or it is damaged."""
    path = folder / f"{wanted.key}.engine"
    if not tag_of(path).exists():
        return None
    try:
        return open_engine(path, wanted)
    except (InputError, IntegrityError, Unsupported, OSError) as error:
        LOGGER.warning("%s; it is built again", error)
        return None


def keep(folder: Path, identity: Identity, data: bytes) -> None:
    """Keep an engine for the next time; a full or read-only disk only costs that time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save(folder / f"{identity.key}.engine", data, identity)
    except OSError as error:
        LOGGER.warning("the engine was not kept in %s: %s", folder, error)


def build(trt: Any, model: bytes, settings: Mapping[str, Any], log: Any, timings: Path) -> bytes:
    """Build an engine on this machine's GPU; minutes for a large network.

    Args:
        model: ONNX whose types are those the network computes in.
        timings: file of kernel timings, read and written, which makes the next build faster.

    Raises:
        Unsupported: TensorRT refuses the model or finds no way to run it; in its own words.
        DeviceError: TensorRT cannot start.
    """
    builder = started(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        raise Unsupported(f"TensorRT {trt.__version__} does not take the model: {_complaints(parser)}")
    config = builder.create_builder_config()
    (config.set_flag if settings["compute"] == "tf32" else config.clear_flag)(trt.BuilderFlag.TF32)
    if settings.get("sparse_weights"):
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if settings.get("workspace_mb"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace_mb"] << 20)
    if settings["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in settings["profiles"].items():
            profile.set_shape(name, *(tuple(shapes[word]) for word in ("min", "opt", "max")))
        if config.add_optimization_profile(profile) < 0:
            raise Unsupported(f"TensorRT {trt.__version__} refuses the sizes {settings['profiles']}: {log.last()}")
    _use_timings(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Unsupported(f"TensorRT {trt.__version__} finds no engine for the model: {log.last()}")
    _keep_timings(config, timings)
    return bytes(memoryview(plan))


def started(make: Any, log: Any) -> Any:
    """TensorRT's builder or runtime. Raises DeviceError: it cannot start CUDA, which its binding calls a TypeError."""
    try:
        return make(log)
    except TypeError as error:
        raise DeviceError(
            f"TensorRT cannot start on this GPU: {log.last()}", "the driver may be too old for this TensorRT"
        ) from error


def _complaints(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}".strip() for error in errors)


def _use_timings(config: Any, path: Path) -> None:
    data = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timings(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, bytes(memoryview(cache.serialize())))
    except OSError as error:
        LOGGER.warning("timings were not kept in %s: %s", path, error)


def _tag(engine: Path) -> dict[str, Any]:
    if not engine.is_file():
        raise InputError(f"there is no engine {engine}")
    path = tag_of(engine)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{engine} has no tag ({path.name}): nothing says what it was built for", "build it again"
        ) from error
    except ValueError as error:
        raise IntegrityError(f"{path} is damaged: {error}", "build it again") from error
    if not isinstance(found, dict):
        raise IntegrityError(f"{path} is damaged: not a table", "build it again")
    return found


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
