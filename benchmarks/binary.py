"""Binary networks: what the tree term saves, what it costs, how fast the kernels are. Writes results/binary.json, docs/binary.md.

    python benchmarks/binary.py train            # float, binary without the term, binary with it; goes on where it stopped

A small ResNet on the 10,000 training images of Fashion-MNIST in the data folder, scored on the 3,000 others.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _binary_net import BINARY, Residual
from torch import nn

from edgepack import metrics
from edgepack.compress._tune import Tune, tune
from edgepack.compress.binarize import Binarize
from edgepack.compressing import PassRun
from edgepack.data import open_data
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Input, Task

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
    for name in options.networks:
        path = options.work / f"{name}.pt"
        if path.exists():
            continue
        module, row = NETWORKS[name](options)
        row = {**row, "accuracy": accuracy(module, options.data)}
        torch.save(module, path)
        torch.save(row, path.with_suffix(".row"))
        sys.stdout.write(f"{name}: {row['accuracy']:.4f}\n{row.get('trees', '')}\n")
        sys.stdout.flush()


def accuracy(module: nn.Module, folder: Path) -> float:
    data, right = open_data({"data": DATA, "prefix": "test_"}, (IMAGE,), folder), 0
    with torch.no_grad():
        for batch in data.batches(200):
            (images,) = batch.inputs.values()
            right += int((module(torch.from_numpy(images)).argmax(1).numpy() == batch.targets).sum())
    return right / len(data)


STAGES: Mapping[str, Callable[[argparse.Namespace], None]] = {"train": train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=tuple(NETWORKS))
    parser.add_argument("--weight", type=float, default=WEIGHT, help="of the term that shortens trees")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "binary", help="what is trained and timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
