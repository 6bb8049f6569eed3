"""What each step of `quantize` brings on MobileNetV1-0.25. Writes results/ablation.json and docs/ablation.md.

    python benchmarks/ablation.py              # all settings, ONNX Runtime and OpenVINO
    python benchmarks/ablation.py defaults     # settings whose name contains one of these words

300 ImageNet samples in two halves: the network is quantized on one, the written files answer the other, and the
other way round. Nothing is chosen on the images that score.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch

from edgepack.artifact import write_text
from edgepack.compress.quantize import Quantize
from edgepack.compressing import compress
from edgepack.contracts import Graph
from edgepack.data import Batch
from edgepack.export._onnx_form import to_onnx
from edgepack.export._onnx_integer import name_pools
from edgepack.export.onnx import Onnx
from edgepack.export.openvino import MODEL, Openvino
from edgepack.exporting import Source
from edgepack.progress import Silent
from edgepack.task import Task
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
NETWORK = "mobilenet_v1 0.25 (ImageNet sample)"
SETTINGS = {
    "defaults": Quantize(),
    "weights rounded to the nearest": Quantize(rounding="nearest"),
    "no bias correction": Quantize(bias_correct=False),
    "no equalization": Quantize(equalize=False),
    "ranges of all values (minmax)": Quantize(calibrate="minmax"),
    "none of these": Quantize(rounding="nearest", bias_correct=False, equalize=False, calibrate="minmax"),
}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Images:
    """Preprocessed images held in memory."""

    values: Array
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            part = {"input": self.values[start : start + size]}
            yield Batch(part, part, None)


def run_onnx(simulation: Graph, images: Array, folder: Path) -> Array:
    import onnxruntime

    model = to_onnx(simulation, Onnx().opset)
    name_pools(model.graph)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: images[i : i + 1]})[0] for i in range(len(images))])


def run_openvino(simulation: Graph, images: Array, folder: Path) -> Array:
    import openvino

    Openvino().write(simulation, folder)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(folder / MODEL, "CPU", settings)
    return np.concatenate([model(images[i : i + 1])[0] for i in range(len(images))])


ENGINES = {"onnx": (Onnx(), run_onnx), "openvino": (Openvino(), run_openvino)}


def answers(network: networks.Network, setting: Quantize, images: Array, data: Path) -> dict[str, Array]:
    """What each engine's file answers for every image, quantized on the half that the image is not in."""
    order = np.random.default_rng(0).permutation(len(images))
    halves = np.split(order, 2)
    found: dict[str, Array] = {}
    for seen, asked in (halves, halves[::-1]):
        with tempfile.TemporaryDirectory() as name:
            task = Task(network.inputs, calibration=Images(images[seen]))
            compress(networks.load(network, data), task, [setting], Path(name), Silent())
            source = Source.open(Path(name) / "compressed")
            for engine, (exporter, run) in ENGINES.items():
                simulation = exporter.lower(source.graph, source.plan)
                values = run(simulation, images[asked], Path(name))
                found.setdefault(engine, np.zeros((len(images), values.shape[1]), np.float32))[asked] = values
    return found


def judge(values: Array, original: Array, targets: Array) -> dict[str, float]:
    difference = np.square(values.astype(np.float64) - original).sum()
    return {
        "agreement": float((values.argmax(1) == original.argmax(1)).mean()),
        "top1": float((values.argmax(1) == targets).mean()),
        "sqnr_db": float(10 * np.log10(np.square(original.astype(np.float64)).sum() / difference)),
    }


def document(data: Mapping[str, Any]) -> str:
    lines = ["| setting | engine | agreement with float | top-1 | SQNR of logits |", "| --- " * 5 + "|"]
    for row in data["rows"]:
        lines.append(f"| {row['setting']} | {row['engine']} | {100 * row['agreement']:.1f} % "
                     f"| {100 * row['top1']:.1f} % | {row['sqnr_db']:.1f} dB |")  # fmt: skip
    return (
        "# What each step of quantization brings\n\nWritten by `python benchmarks/ablation.py` from "
        "`benchmarks/results/ablation.json`; do not edit.\n\nMobileNetV1-0.25 with leaky ReLUs, eight bits, "
        f"{data['images']} ImageNet samples in two halves: quantized on one, scored on the other, and the other way "
        f"round. The float network has {100 * data['float_top1']:.1f} % top-1. The files are run in their engines. "
        "Each row changes the defaults in what it names; with so few images one agreement is uncertain by about two "
        "points, so the SQNR says more.\n\n" + "\n".join(lines) + "\n\n"
        f"Versions: {', '.join(f'{k} {v}' for k, v in data['versions'].items())}; {data['machine']}.\n"
    )


def load_images(network: networks.Network, data: Path) -> tuple[Array, Array]:
    evaluation = networks.task_of(network, data).evaluation
    assert evaluation is not None
    batches = list(evaluation.batches(50))
    targets = [batch.targets for batch in batches if batch.targets is not None]
    return np.concatenate([batch.inputs["input"] for batch in batches]), np.concatenate(targets)


def write(path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    order = list(SETTINGS)
    data = {
        **facts,
        "rows": sorted(rows, key=lambda row: (order.index(row["setting"]), row["engine"])),
        "versions": versions("torch", "onnx", "onnxruntime", "openvino"),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    write_text(path, json.dumps(data, indent=1) + "\n")
    write_text(ROOT / "docs" / "ablation.md", document(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only settings whose name contains one of these")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "ablation.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = next(item for item in networks.networks() if item.name == NETWORK)
    images, targets = load_images(network, options.data)
    module = networks.load(network, options.data).eval()
    with torch.no_grad():
        original = torch.cat([module(part) for part in torch.from_numpy(images).split(50)]).numpy()
    facts = {"images": len(images), "float_top1": float((original.argmax(1) == targets).mean())}
    rows = json.loads(options.results.read_text())["rows"] if options.results.exists() else []
    for name, setting in SETTINGS.items():
        if options.words and not any(word in name for word in options.words):
            continue
        rows = [row for row in rows if row["setting"] != name]
        for engine, values in answers(network, setting, images, options.data).items():
            rows.append({"setting": name, "engine": engine, **judge(values, original, targets)})
            print(json.dumps(rows[-1]), flush=True)  # noqa: T201
        write(options.results, rows, facts)


if __name__ == "__main__":
    main()
