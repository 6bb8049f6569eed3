"""Where the time goes by the engines' own clocks: operators of the uncut network and of a cut one."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgepack.artifact import GOLDEN, Artifact, Golden

WARM = 3
Times = dict[tuple[str, str], list[float]]  # milliseconds of each run, by name and kind of an operator


def explain(engine: str, uncut: Artifact, cut: Artifact, runs: int, threads: int) -> dict[str, Any]:
    """Milliseconds by kind of operator, in turns; medians over the runs, added up over operators of a kind."""
    clocks = [CLOCKS[engine](artifact, threads) for artifact in (uncut, cut)]
    for run in range(WARM + runs):
        for call, _ in clocks:
            call(run >= WARM)
    whole, fewer = (by_kind(read()) for _, read in clocks)
    return {
        "engine": engine, "runs": runs, "threads": threads,
        "operators": {kind: [whole.get(kind, 0.0), fewer.get(kind, 0.0)] for kind in {**whole, **fewer}},
    }  # fmt: skip


def by_kind(times: Times) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for (_, kind), values in times.items():
        found[kind] += statistics.median(values)
    return {kind: round(found[kind], 4) for kind in sorted(found, key=lambda kind: -found[kind])}


def onnx_clock(artifact: Artifact, threads: int) -> tuple[Callable[[bool], None], Callable[[], Times]]:
    import onnxruntime as ort

    folder = tempfile.mkdtemp()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "times")
    session = ort.InferenceSession(artifact.file(".onnx"), options, providers=["CPUExecutionProvider"])
    inputs = dict(Golden.load(artifact.folder / GOLDEN).inputs)

    def read() -> Times:
        times: Times = defaultdict(list)
        for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                times[event["name"], event["args"]["op_name"]].append(event["dur"] / 1000)
        return {key: values[WARM:] for key, values in times.items()}

    return lambda _: session.run(None, inputs), read


def openvino_clock(artifact: Artifact, threads: int) -> tuple[Callable[[bool], None], Callable[[], Times]]:
    import openvino as ov

    settings = {"PERF_COUNT": "YES", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip
    compiled = ov.Core().compile_model(artifact.file(".xml"), "CPU", settings)
    request, inputs = compiled.create_infer_request(), dict(Golden.load(artifact.folder / GOLDEN).inputs)
    times: Times = defaultdict(list)

    def call(counts: bool) -> None:
        request.infer(inputs)
        for item in request.get_profiling_info() if counts else ():
            if item.real_time.total_seconds() > 0:
                times[item.node_name, item.node_type].append(1000 * item.real_time.total_seconds())

    return call, lambda: times


CLOCKS: Mapping[str, Callable[[Artifact, int], tuple[Callable[[bool], None], Callable[[], Times]]]] = {
    "onnx": onnx_clock,
    "openvino": openvino_clock,
}
