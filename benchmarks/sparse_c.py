"""Sparse 1×1 convolutions as C beside dense engines. Writes results/sparse_c.json and docs/sparse_c.md.

    python benchmarks/sparse_c.py --stages prepare --work FOLDER   # make all files first; nothing is timed
    python benchmarks/sparse_c.py --stages race --work FOLDER      # then time them, some seconds per row
    python benchmarks/sparse_c.py --stages layers --work FOLDER    # single layers: is the faster kernel chosen?
    python benchmarks/sparse_c.py --stages document                # only the page, from what is stored

MobileNetV1 (Howard et al., arXiv:1704.04861) as timm writes it, with random weights and statistics, and at a quarter of
its width with the trained weights of the data folder. The smallest weights of each 1×1 convolution are set to zero,
singly or in blocks of output channels; every engine computes the same network. Nothing is said of accuracy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import networks as zoo
import numpy as np
import torch
from _c_page import _ratio, _section, _table
from _cases import Case, Fold, open_case
from c_latency import artifacts, race
from torch import nn

from edgepack import models
from edgepack.artifact import MANIFEST, Artifact, Manifest, describe_files, write_text
from edgepack.contracts import Graph
from edgepack.devices.host import Host
from edgepack.export import _c_planes
from edgepack.export._c_sparse import best_block, cost, dense_cost
from edgepack.export.c import C as CExporter
from edgepack.graph import capture
from edgepack.plan import Plan
from edgepack.runtimes.c import C
from edgepack.task import Input, Task
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "sparse_c.json", ROOT / "docs" / "sparse_c.md"
PACKAGES = ("onnxruntime", "openvino", "ai-edge-litert", "timm")
NAMES = {"wide": "MobileNetV1", "quarter": "MobileNetV1-0.25"}
ROWS: Sequence[tuple[str, float, int]] = (  # network, sparsity, outputs that share their zeros
    ("wide", 0.8, 1), ("wide", 0.9, 1), ("wide", 0.7, 4), ("wide", 0.8, 4), ("wide", 0.9, 4),
    ("quarter", 0.8, 1), ("quarter", 0.9, 1),
)  # fmt: skip
SHAPES = ((32, 64, 112), (128, 128, 56), (256, 256, 28), (512, 512, 14))  # inputs, outputs, side
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9)
SAMPLES = 2
ENGINES = ("ONNX Runtime", "OpenVINO", "TFLite")
CLOSE = 1.1  # kernels within this factor of each other are equally good
Row = Mapping[str, Any]


def prune(weight: torch.Tensor, sparsity: float, block: int) -> None:
    """Set the smallest weights (O, I, 1, 1) to zero in place, by magnitude summed over blocks of outputs."""
    matrix = weight.detach().flatten(1)
    sizes = matrix.abs().reshape(-1, block, matrix.shape[1]).sum(1)
    limit = sizes.flatten().kthvalue(max(1, round(sparsity * sizes.numel()))).values
    matrix.mul_((sizes > limit).repeat_interleave(block, 0))


def case_of(network: str, sparsity: float, block: int, options: argparse.Namespace) -> Case:
    torch.manual_seed(0)
    if network == "wide":
        module = zoo.with_statistics(models.load("timm:mobilenetv1_100", Path())).eval()
    else:
        module = open_case("mobilenet_v1", options.data, options.work, 4).module
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            prune(layer.weight, sparsity, block)
    images = np.random.default_rng(0).standard_normal((SAMPLES, 3, 224, 224)).astype(np.float32)
    item = Input("input", (1, 3, 224, 224), layout="NCHW")
    return Case(f"sparse-{network}-{sparsity}-{block}", module, item, (Fold(images, ()),), work=options.work)


def measured(case: Case, seconds: float) -> Row:
    made, _ = artifacts(case, "float")
    notes = (made["c"].manifest.census or {})["notes"]
    sizes = {format: artifact.size_bytes for format, artifact in made.items()}
    return {**race(case, "float", seconds), "notes": list(notes), "size_bytes": sizes}


# --- single layers -------------------------------------------------------------------------------------------------


class Beside(nn.Module):
    """One image through the same layer with more and more zeros; largest values keep the files small."""

    def __init__(self, inputs: int, outputs: int, block: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(inputs, outputs, 1) for _ in SPARSITIES)
        for layer, sparsity in zip(self.layers, SPARSITIES, strict=True):
            prune(layer.weight, sparsity, block)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x).amax((2, 3)) for layer in self.layers)


def files(graph: Graph, folder: Path) -> Artifact:
    """A network as C, without comparing its answers: tests do."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    exporter = CExporter()
    simulation = exporter.lower(graph, Plan())
    exporter.write(simulation, folder)
    found = describe_files(folder)
    manifest = Manifest("c", "c", simulation.dialect, simulation.inputs, simulation.outputs, found)
    write_text(folder / MANIFEST, manifest.to_json())
    return Artifact.open(folder)


def layers(shape: tuple[int, int, int], block: int, work: Path) -> Iterator[Row]:
    """Of one shape at every sparsity: time of both kernels, and what the rule expects of their ratio."""
    inputs, outputs, side = shape
    torch.manual_seed(0)
    module, kernels = Beside(inputs, outputs, block).eval(), {"conv_f32": 1e9, "sparse_f32": 0.0}
    graph = capture(module, Task((Input("input", (1, inputs, side, side), dynamic=(), layout="NCHW"),)))
    image = np.random.default_rng(0).standard_normal((1, inputs, side, side)).astype(np.float32)
    times = {}
    for kernel, forced in kernels.items():
        with patch.object(_c_planes, "cost", lambda *_, forced=forced: forced):
            artifact = files(graph, work / "layers" / f"{inputs}-{outputs}-{side}-{block}-{kernel}")
        found = C().layer_times(artifact, {"input": image})
        times[kernel] = [spent for name, _, spent in found if name == kernel]
    for layer, sparsity, dense, sparse in zip(module.layers, SPARSITIES, *times.values(), strict=True):
        matrix = layer.weight.detach().flatten(1).numpy()
        chosen = best_block(matrix, side * side)
        expected = cost(matrix, side * side, chosen) / dense_cost(matrix, side * side)
        yield {"shape": shape, "block": block, "sparsity": sparsity, "dense_ms": dense, "sparse_ms": sparse,
               "chosen_block": chosen, "expected": expected}  # fmt: skip


# --- the page ------------------------------------------------------------------------------------------------------


def document(stored: Row) -> str:
    head = (
        "# Sparse 1×1 convolutions as C beside dense engines\n\nWritten by `python benchmarks/sparse_c.py` from "
        "`benchmarks/results/sparse_c.json`; do not edit."
    )
    named = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    end = f"{stored['machine'].get('processor', 'unknown processor')}; {named}."
    return "\n\n".join([head, _race(stored["rows"]), _rule(stored.get("layers", ())), end]) + "\n"


def _race(rows: Sequence[Row]) -> str:
    def cells() -> Iterator[list[str]]:
        for row in rows:
            engines = {engine["engine"]: engine for engine in row["rows"]}
            timed = [engines[name] for name in ENGINES if "low" in engines.get(name, {})]
            best = min(timed, key=lambda engine: engine["p50_ms"])
            faster = f"**{1 / best['c_over_engine']:.2f}** [{1 / best['high']:.2f}, {1 / best['low']:.2f}]"
            ratios = [_ratio(engines.get(name)) for name in ENGINES]
            where = [NAMES[row["network"]], f"{row['sparsity']:.0%}", str(row["block"])]
            sizes = [f"{row['size_bytes'][format] / 1e6:.2f}" for format in ("c", "onnx")]
            yield [*where, f"{engines['C']['p50_ms']:.3f}", faster, *ratios, *sizes, row["state"]]

    text = (
        "Float32, batch 1, one thread, all files of a row interleaved in one process, the same weights in every file. "
        "*Block*: output channels that share their zeros. *Faster*: the best dense engine's time over that of C, with "
        "the 95 % interval. Then C over each engine (below 1: C is faster; the engine's median in brackets), and "
        "megabytes of compiled C (code and constants) and of the ONNX file. The engines compute zeros like other "
        "weights. A run that was *not reached* ended before its intervals were as narrow as they are asked to be."
    )
    heads = ["network", "zeros in 1×1", "block", "C p50 ms", "faster", *ENGINES, "C MB", "ONNX MB", "run"]
    return _section("Networks", text, _table(heads, cells()))


def _rule(rows: Sequence[Row]) -> str:
    def cells() -> Iterator[list[str]]:
        for row in rows:
            inputs, outputs, side = row["shape"]
            ratio = row["sparse_ms"] / row["dense_ms"]
            where = [f"{inputs} → {outputs}, {side}×{side}", str(row["block"]), f"{row['sparsity']:.0%}"]
            times = [f"{1e3 * row[name]:.0f}" for name in ("dense_ms", "sparse_ms")]
            wrong = (ratio < 1) != (row["expected"] < 1) and not 1 / CLOSE < ratio < CLOSE
            said = ("sparse" if row["expected"] < 1 else "dense") + (" (slower)" if wrong else "")
            yield [*where, *times, f"{ratio:.2f}", f"{row['expected']:.2f}", said]

    text = (
        "Which kernel a 1×1 convolution gets is decided by a cost that is counted from its weights: columns of blocks "
        "with a weight that is not zero, outputs, pixels in whole vectors (`export/_c_sparse.py`). Here both kernels "
        "ran, microseconds, the least of 20 calls. *Expected*: the rule's ratio of sparse to dense. Choices that are "
        f"slower by more than {CLOSE - 1:.0%} say so. Changes of layout around a layer are weighed besides, for the "
        "whole network at once (`export/_c_planes.py`)."
    )
    heads = ["layer", "block", "zeros", "dense µs", "sparse µs", "sparse ÷ dense", "expected", "choice"]
    return _section("Dense or sparse", text, _table(heads, cells()))


def store(path: Path, part: str, key: Sequence[str], rows: Sequence[Row]) -> None:
    """Add rows to a part, over those of the same key, and write the page."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [], "layers": []}
    rows = json.loads(json.dumps(rows))
    keys = [[row[name] for name in key] for row in rows]
    kept = [row for row in stored[part] if [row[name] for name in key] not in keys]
    stored |= {part: sorted([*kept, *rows], key=lambda row: [str(row[name]).rjust(20) for name in key])}
    stored |= {"versions": versions(*PACKAGES), "machine": Host().facts()}
    write_text(path, json.dumps(stored, indent=1, allow_nan=False) + "\n")
    if path == RESULTS:
        write_text(DOCUMENT, document(stored))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=("prepare", "race", "layers", "document"), default=["race"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(range(len(ROWS))), help="of the table, from 0")
    parser.add_argument("--seconds", type=float, default=15.0, help="per row")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "sparse_c")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for network, sparsity, block in (ROWS[place] for place in options.rows):
        if not {"prepare", "race"} & set(options.stages):
            break
        case = case_of(network, sparsity, block, options)
        if "race" in options.stages:
            key = {"network": network, "sparsity": sparsity, "block": block}
            store(options.results, "rows", tuple(key), [{**key, **measured(case, options.seconds)}])
        else:
            artifact = artifacts(case, "float")[0]["c"]
            C().load(artifact).close()  # compiled once
            sys.stderr.write(f"{case.name}: {(artifact.manifest.census or {})['notes']}\n")
    if "layers" in options.stages:
        for shape in SHAPES:
            for block in (1, 4):
                rows = list(layers(shape, block, options.work))
                store(options.results, "layers", ("shape", "block", "sparsity"), rows)
    if "document" in options.stages:
        write_text(DOCUMENT, document(json.loads(options.results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
