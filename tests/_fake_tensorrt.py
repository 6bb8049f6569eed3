"""A stand-in of the tensorrt package and of a GPU's driver: ONNX Runtime computes what an engine would.

It offers only what tests/tensorrt_surface.json lists. That file was recorded from the docstrings of NVIDIA's own
Python bindings, one TensorRT 10 and one TensorRT 11.
"""

from __future__ import annotations

import ctypes
import json
import pickle
import sys
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import onnx
import onnxruntime as ort
from edgepack import parts
from edgepack.contracts import Runtime
from edgepack.runtimes import _tensorrt_cuda as cuda

SURFACE = json.loads(Path(__file__).with_name("tensorrt_surface.json").read_text(encoding="utf-8"))


class Library:
    """The driver's C interface; device memory is host memory."""

    def __init__(self, name: str = "NVIDIA Test", capability: tuple[int, int] = (8, 7), init: int = 0) -> None:
        self.name, self.capability, self.init = name.encode(), capability, init
        self.memory: dict[int, ctypes.Array] = {}
        self.contexts = self.streams = 0

    def cuInit(self, flags):
        return self.init

    def cuDeviceGetCount(self, count):
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = 40 + index
        return 0

    def cuDeviceGetName(self, name, size, device):
        assert device == 40
        assert size >= len(self.name)
        name.value = self.name
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capability[{75: 0, 76: 1}[attribute]]
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 7
        self.contexts += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device):
        self.contexts -= 1
        return 0

    def cuCtxSetCurrent(self, context):
        return 0 if context.value == 7 else 201

    def cuStreamCreate(self, stream, flags):
        stream._obj.value = 9
        self.streams += 1
        return 0

    def cuStreamSynchronize(self, stream):
        return 0 if stream.value == 9 else 400

    def cuStreamDestroy_v2(self, stream):
        self.streams -= 1
        return 0

    def cuMemAlloc_v2(self, pointer, size):
        buffer = (ctypes.c_ubyte * size)()
        pointer._obj.value = ctypes.addressof(buffer)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0

    def cuMemFree_v2(self, address):
        del self.memory[address]
        return 0

    def cuMemcpyHtoDAsync_v2(self, to, source, size, stream):
        assert size <= len(self.memory[to])
        ctypes.memmove(to, source, size)
        return 0

    def cuMemcpyDtoHAsync_v2(self, to, source, size, stream):
        assert size <= len(self.memory[source])
        ctypes.memmove(to, source, size)
        return 0

    def cuGetErrorString(self, status, words):
        words._obj.value = b"invalid something"
        return 0


DTYPES = {1: "FLOAT", 2: "UINT8", 7: "INT64", 10: "HALF"}
NUMPY = {"FLOAT": np.float32, "UINT8": np.uint8, "INT64": np.int64, "HALF": np.float16}


def enum(version: str, name: str) -> type[IntEnum]:
    return IntEnum(name, {word: number for number, word in enumerate(SURFACE[version]["enums"][name])})


class ILogger:
    Severity = IntEnum("Severity", {word: n for n, word in enumerate(SURFACE["10.16.1.11"]["severities"])})

    def __init__(self):
        self.started = True


class ParserError:
    def __init__(self, text):
        self.text = text

    def desc(self):
        return self.text

    def node_name(self):
        return "node_0"

    def node_operator(self):
        return "Conv"


class ITimingCache:
    def __init__(self, data):
        self.data = data

    def serialize(self):
        return self.data + b"t"


class IOptimizationProfile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, input, min, opt, max):
        assert all(isinstance(shape, tuple) for shape in (min, opt, max))
        self.shapes[input] = (min, opt, max)


class IBuilderConfig:
    def __init__(self):
        self.flags, self.pools, self.profiles, self.cache = {"TF32"}, {}, [], None

    def set_flag(self, flag):
        self.flags.add(flag.name)

    def clear_flag(self, flag):
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool, pool_size):
        self.pools[pool.name] = pool_size

    def add_optimization_profile(self, profile):
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class OnnxParser:
    refusal: str | None = None

    def __init__(self, network, logger):
        assert logger.started
        self.network = network

    def parse(self, model, path=None):
        self.network.model = bytes(model)
        return self.refusal is None

    @property
    def num_errors(self):
        return 0 if self.refusal is None else 1

    def get_error(self, index):
        return ParserError(self.refusal)


class Builder:
    builds: list = []  # noqa: RUF012
    fails = False

    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags=0):
        return SimpleNamespace(flags=flags, model=None)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        if self.fails:
            self.logger.log(ILogger.Severity.ERROR, "no tactic for node_0")
            return None
        self.builds.append(SimpleNamespace(network=network, config=config))
        return memoryview(pickle.dumps((network.model, config.profiles)))


class Engine:
    def __init__(self, data):
        model, self.profiles = pickle.loads(bytes(data))
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graph = onnx.load_model_from_string(model).graph
        self.values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}

    @property
    def num_io_tensors(self):
        return len(self.values)

    def get_tensor_name(self, index):
        return list(self.values)[index]

    def get_tensor_dtype(self, name):
        return DTYPES[self.values[name].elem_type]

    def create_execution_context(self):
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses = engine, {}, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name):
        zeros = {key: np.zeros(shape, NUMPY[self.engine.get_tensor_dtype(key)]) for key, shape in self.shapes.items()}
        names = [port.name for port in self.engine.session.get_outputs()]
        return dict(zip(names, self.engine.session.run(names, zeros), strict=True))[name].shape

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        assert stream_handle == 9
        names = [port.name for port in self.engine.session.get_outputs()]
        feeds = {name: self.array(name, shape) for name, shape in self.shapes.items()}
        for name, value in zip(names, self.engine.session.run(names, feeds), strict=True):
            self.array(name, value.shape)[...] = value
        return True

    def array(self, name, shape):
        dtype = np.dtype(NUMPY[self.engine.get_tensor_dtype(name)])
        size = int(np.prod(shape)) * dtype.itemsize
        return (
            np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(self.addresses[name])).view(dtype).reshape(shape)
        )


class Deserializer:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        return Engine(serialized_engine)


STANDING_IN = {"Runtime": Deserializer, "ICudaEngine": Engine, "IExecutionContext": Context} | {
    cls.__name__: cls
    for cls in (ILogger, ParserError, ITimingCache, IOptimizationProfile, IBuilderConfig, OnnxParser, Builder)
}


def module(version: str) -> SimpleNamespace:
    enums = {name: enum(version, name) for name in ("BuilderFlag", "NetworkDefinitionCreationFlag", "MemoryPoolType")}
    classes = {name: STANDING_IN[name] for name in ("ILogger", "OnnxParser", "Builder", "Runtime")}
    return SimpleNamespace(__version__=version, nptype=NUMPY.__getitem__, **enums, **classes)


class Place:
    """A machine with a GPU, as far as edgepack can tell."""

    def __init__(self, monkeypatch, folder: Path) -> None:
        self._patch, self.folder = monkeypatch, folder
        self.on()

    def on(self, version: str = "10.16.1.11", **gpu) -> None:
        self.library = Library(**gpu)
        self._patch.setattr(cuda, "_open", lambda: self.library)
        self._patch.setitem(sys.modules, "tensorrt", module(version))

    def runtime(self, **options) -> Runtime:
        return parts.find(Runtime, "tensorrt")(**{"cache": str(self.folder), **options})
