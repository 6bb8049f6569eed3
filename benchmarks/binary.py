"""Binary networks: what the tree term saves, how fast kernels are. Writes results/binary.json, docs/binary.md.

    python benchmarks/binary.py train      # float, binary without the term, binary with it; goes on where it stopped
    python benchmarks/binary.py project    # trees of the binary one shortened without training
    python benchmarks/binary.py export     # C of all three, ONNX of the float one with floats and 8-bit integers
    python benchmarks/binary.py race       # time them: nothing else should run
    python benchmarks/binary.py programs   # programs of single layers
    python benchmarks/binary.py kernels    # time those: nothing else should run
    python benchmarks/binary.py document   # only write the page from the stored results

A small ResNet on the 10,000 training images of Fashion-MNIST in the data folder, scored on the 3,000 others.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import _binary_kernels as layers
import _binary_page as page
import torch
from _binary_kernels import Shape
from _binary_net import BINARY, Residual
from safetensors.torch import load_file
from torch import nn

from edgepack import metrics
from edgepack.artifact import MANIFEST, Artifact
from edgepack.compress._binarizing import tree_costs
from edgepack.compress._binary import Binary
from edgepack.compress._projecting import shorten, take_statistics
from edgepack.compress._tune import Tune, tune
from edgepack.compress.binarize import Binarize
from edgepack.compress.fold import Fold
from edgepack.compress.quantize import Quantize
from edgepack.compressing import COMPRESSED, PassRun, compress
from edgepack.contracts import Exporter, Settings
from edgepack.data import open_data
from edgepack.devices.host import Host
from edgepack.export.c import C
from edgepack.export.onnx import Onnx
from edgepack.exporting import export
from edgepack.plan import Plan
from edgepack.profiling import profile
from edgepack.progress import Silent
from edgepack.task import Input, Task
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
DATA = "fashion_mnist_subset.npz"
IMAGE = Input("image", (1, 1, 28, 28), mean=(0.286,), std=(0.353,), scale=255.0)
FLOAT = Tune(epochs=7, lr=0.05, weight_decay=5e-4, batch=64, held_out=0, teacher="none", norms="train",
             precision="bfloat16")  # fmt: skip
BINARIES = Tune(epochs=14, optimizer="adamw", lr=3e-3, weight_decay=0.0, batch=64, held_out=0, share=0.7,
                norms="train", precision="bfloat16")  # fmt: skip
WEIGHT, DENSITY = 3.0, 0.135  # of the term


def task(data: Path) -> Task:
    train = open_data({"data": DATA, "prefix": "train_"}, (IMAGE,), data)
    some = open_data({"data": DATA, "prefix": "train_", "samples": 256}, (IMAGE,), data)
    return Task((IMAGE,), calibration=some, training=train, metric=metrics.find("top1", ROOT), augment="flip")


def float_network(options: argparse.Namespace) -> tuple[nn.Module, Mapping[str, Any]]:
    torch.manual_seed(0)
    module = Residual(1)
    run = running(options, "float", module)
    trained = tune(module.train(), task(options.data), run, FLOAT)
    return trained, {**run.findings["tune"], "settings": asdict(FLOAT)}


def binary_network(options: argparse.Namespace, name: str) -> tuple[nn.Module, Mapping[str, Any]]:
    original = stored(options, "float")
    run = running(options, name, original)
    term = {"plain": "none", "tree": "tree"}[name]
    chosen = Binarize(layers=BINARY, shortcuts=False, mst=term, mst_weight=options.weight, mst_density=DENSITY,
                      tune=BINARIES)  # fmt: skip
    trained = chosen.apply(copy.deepcopy(original), task(options.data), run)
    return trained, {**run.findings["tune"], "trees": run.findings["binarize"], "settings": asdict(BINARIES),
                     "mst": term, "mst_weight": options.weight, "mst_density": DENSITY}  # fmt: skip


NETWORKS: Mapping[str, Callable[[argparse.Namespace], tuple[nn.Module, Mapping[str, Any]]]] = {
    "float": float_network,
    "plain": lambda options: binary_network(options, "plain"),
    "tree": lambda options: binary_network(options, "tree"),
}


def running(options: argparse.Namespace, name: str, original: nn.Module) -> PassRun:
    folder = options.work / name
    folder.mkdir(parents=True, exist_ok=True)
    return PassRun(folder, 0, Plan(), Watcher(), copy.deepcopy(original), Task((IMAGE,)), identity=name)


class Watcher(Silent):
    """Says when an epoch begins."""

    def start(self, text: str, total: int | None = None) -> Callable[[int], None]:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        return super().start(text, total)


def stored(options: argparse.Namespace, name: str) -> nn.Module:
    module: nn.Module = torch.load(options.work / f"{name}.pt", weights_only=False)
    return module


def train(options: argparse.Namespace) -> None:
    known = options.work / "rows.json"
    rows = json.loads(known.read_text()) if known.exists() else {}
    for name in options.networks:
        path = options.work / f"{name}.pt"
        if path.exists():
            continue
        module, row = NETWORKS[name](options)
        row = {**row, "accuracy": accuracy(module, options.data)}
        torch.save(module, path)
        kept = {key: row[key] for key in ("settings", "seconds", "trees", "mst_weight", "mst_density") if key in row}
        rows[name] = {"network": name, "accuracy": row["accuracy"], "samples": 3000, **kept}
        known.write_text(json.dumps(rows))
        page.RESULTS.put("networks", list(rows.values()), facts())
        sys.stdout.write(f"{name}: {row['accuracy']:.4f}\n{row.get('trees', '')}\n")
        sys.stdout.flush()


def accuracy(module: nn.Module, folder: Path) -> float:
    data, right = open_data({"data": DATA, "prefix": "test_"}, (IMAGE,), folder), 0
    with torch.no_grad():
        for batch in data.batches(200):
            (images,) = batch.inputs.values()
            right += int((module(torch.from_numpy(images)).argmax(1).numpy() == batch.targets).sum())
    return right / len(data)


def project(options: argparse.Namespace) -> None:
    """The network without the term, its trees shortened by several shares of their length."""
    rows = []
    latent = load_file(options.work / "plain" / "tune" / "state.safetensors")
    pixels = json.loads((options.work / "rows.json").read_text())["plain"]["trees"]["layers"]
    for share in (0.0, 0.2, 0.4, 0.6):
        module = stored(options, "plain")
        binary = {name: layer for name, layer in module.named_modules() if isinstance(layer, Binary)}
        for name, layer in binary.items():
            shorten(layer.layer.weight.data, latent[f"module/{name}.layer.parametrizations.weight.original"], share)
        if share:
            take_statistics(module, task(options.data))
        costs = [tree_costs(layer, pixels[name]["pixels"]) for name, layer in binary.items()]
        total = {
            key: sum(row[key] for row in costs)
            for key in ("weights", "stored_bits", "dense_operations", "tree_operations")
        }
        rows.append({"share": share, "accuracy": accuracy(module, options.data),
                     "bits": total["stored_bits"] / total["weights"],
                     "saved": total["dense_operations"] / total["tree_operations"]})  # fmt: skip
        sys.stdout.write(f"{rows[-1]}\n")
    page.RESULTS.put("projected", rows, facts())


def export_all(options: argparse.Namespace) -> None:
    """Files of the race; those that are there stay."""
    small = replace(task(options.data), training=None, metric=None, augment="")
    onnx, packed, c = Onnx(), Onnx(name="packed", binary="packed"), C()
    jobs: dict[str, tuple[str, list[Any], list[Exporter]]] = {
        "float": ("float", [Fold()], [onnx, c]), "int8": ("float", [Quantize(explain=False)], [onnx]),
        "plain": ("plain", [Fold()], [onnx, packed, c]), "tree": ("tree", [Fold()], [c]),
    }  # fmt: skip
    for name, (network, passes, exporters) in jobs.items():
        out = options.work / "race" / name
        if not (out / COMPRESSED / MANIFEST).exists():
            compress(stored(options, network), small, passes, out, Silent())
        for exporter in exporters:
            if not (out / (exporter.name or exporter.format) / MANIFEST).exists():
                (found,) = export(out, [exporter], Silent())
                made = found.artifact
                error, census = made.manifest.parity.max_rel, made.manifest.census
                sys.stdout.write(f"{name} {made.folder.name}: {error}, {census}\n")


RACE = {"float, ONNX Runtime": "float/onnx", "8 bits, ONNX Runtime": "int8/onnx", "float, C": "float/c",
        "binary, ONNX Runtime": "plain/onnx", "binary packed, ONNX Runtime": "plain/packed",
        "binary, C": "plain/c", "binary, tree term, C": "tree/c"}  # fmt: skip


def race(options: argparse.Namespace) -> None:
    artifacts = [Artifact.open(options.work / "race" / place) for place in RACE.values()]
    settings = Settings(max_seconds=options.seconds, cold=False)
    found = profile(artifacts, Host(), None, settings, Silent())
    rows = [
        {"file": name, "ms": item.conditions["floor_ms"], "bytes": artifact.size_bytes,
         "ratio": None if item.ratio is None else asdict(item.ratio)}
        for name, artifact, item in zip(RACE, artifacts, found, strict=True)
    ]  # fmt: skip
    page.RESULTS.put("race", rows, facts())


SHAPES = [
    *(Shape(64, 64, 3, 32, 1, density) for density in (0.05, 0.1, 0.2, 0.4)),
    *(Shape(128, 128, 3, 32, 1, density) for density in (0.1, 0.2)),
    *(Shape(64, 64, 3, 56, 1, density) for density in (0.1, 0.2)),
    *(Shape(64, 64, 3, side, 1, density) for side in (8, 14, 16) for density in (0.1, 0.2)),
    Shape(64, 128, 3, 28, 2, 0.1), Shape(128, 128, 3, 7, 1, 0.1), Shape(128, 128, 3, 16, 1, 0.1),
    Shape(256, 256, 3, 16, 1, 0.1), Shape(128, 256, 1, 28, 1, 0.1),
]  # fmt: skip


def programs(options: argparse.Namespace) -> None:
    work = options.work / "kernels"
    work.mkdir(parents=True, exist_ok=True)
    found = {shape.name: layers.program(shape, work) for shape in SHAPES}
    (work / "found.json").write_text(json.dumps(found))


def kernels(options: argparse.Namespace) -> None:
    work, rows = options.work / "kernels", []
    known = json.loads((work / "found.json").read_text())
    for shape in SHAPES:
        times = {str(level): layers.run(shape, work, level) for level in (1, 2)}
        assert all(found[3] for found in times.values()), shape
        stride = f" stride {shape.stride}" if shape.stride > 1 else ""
        side = f"{shape.size}×{shape.size}{stride} at {shape.side}×{shape.side}"
        row = {"shape": f"{shape.inputs}→{shape.outputs} {side}", "operations": shape.operations, "ns": times,
               **{key: known[shape.name][key] for key in ("density", "depth", "model_ns")}}  # fmt: skip
        if shape == SHAPES[1]:
            row["engines"] = layers.engines(shape)
        rows.append(row)
    page.RESULTS.put("kernels", rows, facts())


def facts() -> dict[str, Any]:
    return {
        "processor": Host().facts().get("processor", "unknown processor"),
        "versions": versions("torch", "onnxruntime"),
    }


STAGES: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "train": train, "project": project, "export": export_all, "race": race, "programs": programs, "kernels": kernels,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "document"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=tuple(NETWORKS))
    parser.add_argument("--weight", type=float, default=WEIGHT, help="of the term that shortens trees")
    parser.add_argument("--seconds", type=float, default=40.0, help="of the race, at most")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "binary", help="what is trained and timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stage == "document":
        page.RESULTS.rewrite()
        return
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
