"""OpenVINO's own sparse weights: matrix products in 8 bits, with and without zeros, asked to use them and not.

``CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE`` is the share of zeros from which its CPU plugin stores the weights of a matrix
product packed and unpacks them on the way, which saves memory traffic and no multiplications. The plugin does so on
processors with AMX alone, for weights of 8 bits whose sides are multiples of 64 (its graph optimizer says so in
``useSparseWeightsDecompression``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

PROPERTY = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
SIDE, LAYERS, ROWS = 1024, 6, 16
ZEROS, RATES = (0.0, 0.9), (1.0, 0.8)  # of the weights; asked for, 1.0: never
SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}


def network(share: float) -> Any:
    """Matrix products in a row, 8-bit weights with that share of zeros between 8-bit activations."""
    import openvino as ov
    from openvino import opset13 as op

    random = np.random.default_rng(0)
    low, high = np.float32(-4), np.float32(4 * 127 / 128)
    x = value = op.parameter([ROWS, SIDE], np.float32, name="x")
    for _ in range(LAYERS):
        weight = random.integers(-127, 128, (SIDE, SIDE)).astype(np.int8)
        weight[random.random(weight.shape) < share] = 0
        scale = np.full((SIDE, 1), 0.002, np.float32)
        scaled = op.multiply(op.convert(op.constant(weight), "f32"), op.constant(scale))
        value = op.matmul(op.fake_quantize(value, low, high, low, high, 256), scaled, False, True)
    return ov.Model([value], [x], "products")


def measured(seconds: float) -> Iterator[dict[str, Any]]:
    """Milliseconds of a call of each form, interleaved; nothing else should run."""
    import openvino as ov

    core = ov.Core()
    requests = {}
    for share, rate in product(ZEROS, RATES):
        compiled = core.compile_model(network(share), "CPU", SETTINGS | {PROPERTY: rate})
        requests[share, rate] = compiled.create_infer_request(), _kernels(compiled)
    sample = np.random.default_rng(1).standard_normal((ROWS, SIDE)).astype(np.float32)
    times: dict[tuple[float, float], list[float]] = {key: [] for key in requests}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for key, (request, _) in requests.items():
            began = time.perf_counter()
            request.infer({"x": sample})
            times[key].append(1e3 * (time.perf_counter() - began))
    for (share, rate), (_, kernels) in requests.items():
        yield {"row": f"{share:g}, {rate:g}", "zeros": share, "rate": rate, "kernels": kernels,
               "ms": float(np.median(times[share, rate])), "calls": len(times[share, rate])}  # fmt: skip


def _kernels(compiled: Any) -> list[str]:
    """Of the matrix products, as the plugin names them."""
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    return sorted({_word(one["primitiveType"]) for one in facts if _word(one["layerType"]) == "FullyConnected"})


def _word(value: Any) -> str:
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)
