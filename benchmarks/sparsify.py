"""Networks with zeros: what they lose, and what training regains. Writes results/sparsify.json and docs/sparsify.md.

    python benchmarks/sparsify.py train             # every row of ResNet-32, CIFAR-10, scored on all 10,000 images
    python benchmarks/sparsify.py train --rows 2:4  # one of them; a training goes on where it was stopped
    python benchmarks/sparsify.py sizes             # what files of the network with 80 % zeros take, also compressed
    python benchmarks/sparsify.py race              # time those files: nothing else should run
    python benchmarks/sparsify.py openvino          # OpenVINO's own sparse weights: nothing else should run
    python benchmarks/sparsify.py calls --arm DIR   # instructions of a TFLite file, emulated; DIR: an unpacked aarch64
                                                    # wheel of ai-edge-litert, left out: x86 alone
    python benchmarks/sparsify.py document          # only write the page from the stored results

The best epoch is chosen on training images that are held out, or the last one is taken; no test image takes part in
any choice.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import _sparsify_page as page
import torch
from _sparse_calls import counts
from _sparse_openvino import measured
from torch import nn

import factorize
from edgepack.artifact import GOLDEN, MANIFEST, Artifact
from edgepack.compress._tune import Tune
from edgepack.compress.sparsify import Sparsify
from edgepack.compressing import PassRun
from edgepack.contracts import Settings
from edgepack.devices.host import Host
from edgepack.plan import Plan
from edgepack.profiling import profile, write_module
from edgepack.progress import Silent
from edgepack.task import Task
from factorize import stored_accuracy

ROOT = Path(__file__).resolve().parent.parent
TUNE = Tune(lr=0.02, batch=64, held_out=300, precision="bfloat16")
HARD = replace(TUNE, lr=0.05, norms="train")  # where much was lost, norms have to find new statistics
HARDEST = replace(HARD, epochs=15, lr=0.2, features=("auto",), held_out=0)
ROWS: Mapping[str, Sparsify] = {
    "50 %": Sparsify(sparsity=0.5),
    "50 %, by magnitude": Sparsify(sparsity=0.5, method="magnitude"),
    "2:4": Sparsify(pattern="2:4", tune=replace(TUNE, epochs=3, lr=0.01)),
    "80 %": Sparsify(sparsity=0.8, tune=replace(HARD, epochs=11)),
    "90 %": Sparsify(sparsity=0.9, tune=HARDEST),
    "90 %, gradually": Sparsify(sparsity=0.9, schedule="gradual", tune=HARDEST),
}


def train(name: str, options: argparse.Namespace) -> None:
    """One row: the pass without its training, and with it."""
    module, task = factorize.resnet32(options.data)
    test, task = task.evaluation, replace(task, evaluation=None)
    how = ROWS[name]
    work = work_of(name, options)
    row: dict[str, Any] = {"row": name, "options": {**asdict(how), "tune": None}, "samples": len(test)}
    row["original"] = stored_accuracy(module, test, options.work / "original.json")
    stages = {"before": replace(how, tune=None)} if how.schedule == "one-shot" else {}
    for word, pass_ in (stages | ({} if how.tune is None else {"after": how})).items():
        run = PassRun(work, 0, Plan(), Silent(), module, task)
        run.workdir.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        found = pass_.apply(copy.deepcopy(module), task, run)
        row[f"{word}_seconds"] = time.perf_counter() - began
        torch.save(found, work / f"{word}.pt")
        row[word] = stored_accuracy(found, test, work / f"{word}.json")
        row["zeros"], row["weights"] = zeros(found)
        say(f"{name}: {word} {row[word]}; {run.notes}")
        page.RESULTS.store("rows", row, factorize.facts())
    if how.tune is not None:
        tuned = run.findings["tune"]
        row |= {"settings": asdict(how.tune), "images": factorize.TRAINING}
        row |= {key: tuned[key] for key in ("epochs", "kept", "seconds", "ended")}
        page.RESULTS.store("rows", row, factorize.facts())


def sizes(name: str, options: argparse.Namespace) -> None:
    """Files of the dense network and of a row's, as they are and compressed by gzip."""
    module, task = factorize.resnet32(options.data)
    found = {"dense": module, "sparse": torch.load(work_of(name, options) / "after.pt", weights_only=False).eval()}
    for target in options.targets:
        row: dict[str, Any] = {"row": f"{target}, {name}", "target": target, "network": name}
        for word, network in found.items():
            folder = options.work / "sizes" / word / target
            shutil.rmtree(folder, ignore_errors=True)
            write_module(network, Task(task.inputs), folder, target)
            data = [path.read_bytes() for path in sorted(folder.rglob("*"))
                    if path.is_file() and path.name not in (MANIFEST, GOLDEN)]  # fmt: skip
            row[word] = {"bytes": sum(map(len, data)), "gzip": sum(len(gzip.compress(one, 9)) for one in data)}
        say(f"{row}")
        page.RESULTS.store("sizes", row, factorize.facts())


def race(name: str, options: argparse.Namespace) -> None:
    """Those files timed, dense and sparse interleaved; nothing else should run."""
    for target in options.targets:
        artifacts = [Artifact.open(options.work / "sizes" / word / target) for word in ("dense", "sparse")]
        found = profile(artifacts, Host(), None, Settings(max_seconds=options.seconds, cold=False), Silent())
        assert found[1].ratio is not None
        row = {"row": f"{target}, {name}", "target": target, "network": name, "ratio": asdict(found[1].ratio),
               "ms": [item.conditions["floor_ms"] for item in found]}  # fmt: skip
        say(f"{row}")
        page.RESULTS.store("race", row, factorize.facts())


def calls(options: argparse.Namespace) -> None:
    """Instructions of MobileNetV1, dense and sparse."""
    for share, pattern in ((0.8, "unstructured"), (0.8, "1x2"), (0.8, "1x4"), (0.9, "unstructured"), (0.9, "1x2")):
        for row in counts(options.work, share, pattern, options.arm, options.only):
            say(f"{row}")
            page.RESULTS.store("calls", row, factorize.facts())


def openvino(options: argparse.Namespace) -> None:
    """What OpenVINO's property for sparse weights does here."""
    for row in measured(min(options.seconds, 10.0)):
        say(f"{row}")
        page.RESULTS.store("openvino", row, factorize.facts())


def work_of(name: str, options: argparse.Namespace) -> Path:
    """Where a row's network and checkpoints are."""
    folder: Path = options.work / name.replace(" ", "-").replace("%", "percent").replace(":", "-")
    return folder


def zeros(module: nn.Module) -> tuple[int, int]:
    """Weights of convolutions and linear layers that are zero, and all of them."""
    weights = [item.weight for item in module.modules() if isinstance(item, (nn.Conv2d, nn.Linear))]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


STAGES = {"train": train, "sizes": sizes, "race": race}  # of a row
ALONE = {"calls": calls, "openvino": openvino}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, *ALONE, "document"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=None)
    parser.add_argument("--targets", nargs="+", default=("onnx", "openvino", "tflite"))
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, per race")
    parser.add_argument("--arm", type=Path)
    parser.add_argument("--only", nargs="+", default=(), help="rows of calls, such as 'arm64, 1x2, 0.8'")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "sparsify", help="networks and checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage == "document":
        page.RESULTS.rewrite()
        return
    if options.stage in ALONE:
        ALONE[options.stage](options)
        return
    for name in options.rows or (["80 %"] if options.stage != "train" else list(ROWS)):
        STAGES[options.stage](name, options)


if __name__ == "__main__":
    main()
