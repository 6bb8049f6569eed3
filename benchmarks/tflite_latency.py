"""Latency of edgepack's TFLite files over those that litert-torch writes by itself, one thread, interleaved.

    python benchmarks/tflite_latency.py                                    # three networks, 60 s each and layout
    python benchmarks/tflite_latency.py --networks torchvision:mobilenet_v2 --seconds 5

Both files hold the same random weights and run on the same engine with its defaults (XNNPACK). ``NHWC`` compares
files that take channels last (``litert_torch.to_channel_last_io`` there), ``NCHW`` those that take what PyTorch does.
Writes ``benchmarks/results/tflite_latency.json`` and ``docs/tflite.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgepack import models, parts
from edgepack.artifact import GOLDEN, MANIFEST, Artifact, Golden, Manifest, describe_files, write_text
from edgepack.contracts import Contender, Exporter, Runtime, Settings, TensorSpec
from edgepack.devices.host import Host
from edgepack.export._tflite_form import quiet
from edgepack.front import with_front
from edgepack.graph import capture, run_graph
from edgepack.plan import Plan
from edgepack.task import Input, Task
from edgepack.versions import versions

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "tflite.md"
RESULTS = Path(__file__).parent / "results" / "tflite_latency.json"
NETWORKS = ("torchvision:mobilenet_v2", "torchvision:resnet50", "timm:deit_small_patch16_224")
LAYOUTS = ("NHWC", "NCHW")
SIZE = 224
SAMPLES = 2


def ours(module: torch.nn.Module, layout: str, folder: Path) -> Artifact:
    """What ``edgepack export --to tflite`` writes."""
    exporter = parts.find(Exporter, "tflite")(layout=layout)
    graph = with_front(capture(module, Task(inputs=(Input("x", (1, 3, SIZE, SIZE)),))), layout, normalize=False)
    simulation = exporter.lower(graph, Plan())
    folder.mkdir(parents=True)
    exporter.write(simulation, folder)
    inputs = {"x": pixels(layout)}
    return described(folder, simulation.inputs, simulation.outputs, inputs, run_graph(simulation, inputs))


def theirs(module: torch.nn.Module, layout: str, folder: Path) -> Artifact:
    """What litert-torch's documentation says to call."""
    folder.mkdir(parents=True)
    with quiet():
        import litert_torch

        nhwc = layout == "NHWC"
        wrapped = litert_torch.to_channel_last_io(module, args=[0]) if nhwc else module
        example = torch.from_numpy(pixels(layout)[:1])
        litert_torch.convert(wrapped.eval(), (example,)).export(str(folder / "model.tflite"))
    with torch.no_grad():
        answers = module(torch.from_numpy(pixels("NCHW"))).numpy()
    inputs = (TensorSpec("args_0", "float32", tuple(example.shape)),)
    outputs = (TensorSpec("output_0", "float32", (1, *answers.shape[1:])),)
    return described(folder, inputs, outputs, {"args_0": pixels(layout)}, {"output_0": answers})


def pixels(layout: str) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(0).standard_normal((SAMPLES, 3, SIZE, SIZE)).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(values, 1, -1)) if layout == "NHWC" else values


def described(
    folder: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    samples: dict[str, np.ndarray[Any, Any]],
    answers: dict[str, np.ndarray[Any, Any]],
) -> Artifact:
    Golden(samples, answers, answers).save(folder / GOLDEN)
    manifest = Manifest("tflite", folder.name, "float32", tuple(inputs), tuple(outputs), describe_files(folder))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder)


def compare(source: str, layout: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """One interleaved run of both files."""
    torch.manual_seed(0)
    models.prepare_torchvision()
    module = models.load(source, Path()).eval()
    runtime = parts.find(Runtime, "tflite")()
    began = time.perf_counter()
    reference = theirs(module, layout, folder / "litert-torch")
    middle = time.perf_counter()
    artifact = ours(module, layout, folder / "edgepack")
    written = time.perf_counter()
    profiles = Host().measure(
        [Contender("litert-torch", reference, runtime), Contender("edgepack", artifact, runtime)], settings
    )
    ratio = profiles[1].ratio
    assert ratio is not None
    return {
        "network": source,
        "layout": layout,
        "ratio": asdict(ratio),
        "latency_ms": {profile.label: asdict(profile.latency_ms) for profile in profiles},
        "size_bytes": {"litert-torch": reference.size_bytes, "edgepack": artifact.size_bytes},
        "export_s": {"litert-torch": round(middle - began, 2), "edgepack": round(written - middle, 2)},
        "conditions": profiles[1].conditions,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    heads = ("network", "layout", "edgepack ÷ litert-torch [95 %]", "verdict", "p50 ms", "p50 ms, litert-torch")
    return f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|\n" + "".join(map(line, rows))


def line(row: dict[str, Any]) -> str:
    ratio, latency = row["ratio"], row["latency_ms"]
    return (
        f"| {row['network'].partition(':')[2]} | {row['layout']} "
        f"| {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] | {ratio['verdict']} "
        f"| {latency['edgepack']['p50']:.2f} | {latency['litert-torch']['p50']:.2f} |\n"
    )


def document(facts: dict[str, Any]) -> str:
    return (
        "# TFLite files beside the converter's own\n\nWritten by `python benchmarks/tflite_latency.py` from "
        "`benchmarks/results/tflite_latency.json`; do not edit.\n\nLatency of edgepack's float32 file over the one "
        "litert-torch writes by itself, same weights, same engine, batch 1, one thread, interleaved; below 1 is "
        f"faster.\n\n{table(facts['rows'])}\n"
        f"Versions: {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}; "
        f"{facts['machine'].get('processor', 'unknown processor')}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, per comparison")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = Settings(threads=1, max_seconds=options.seconds, cold=False)
    rows = []
    for source in options.networks:
        for layout in options.layouts:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(compare(source, layout, settings, Path(folder)))
            sys.stdout.write(table(rows[-1:]))
            sys.stdout.flush()
    facts = {"machine": Host().facts(), "versions": versions("torch", "litert-torch", "ai-edge-litert"), "rows": rows}
    write_text(options.out, json.dumps(facts, indent=1, allow_nan=False) + "\n")
    write_text(DOCUMENT, document(facts))


if __name__ == "__main__":
    main()
