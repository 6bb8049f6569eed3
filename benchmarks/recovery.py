"""What training regains of a harsh compression. Writes results/recovery.json and docs/recovery.md.

    python benchmarks/recovery.py                 # every case
    python benchmarks/recovery.py rounded         # cases whose name contains one of these words; rows of others stay
    python benchmarks/recovery.py --document      # only write the page from the stored results

ResNet-20 on CIFAR-10, its weights rounded to 3 bits or most of them set to 0, is trained to follow the network it was
made from: with labels and without. It is scored on all 10,000 test images; the best epoch is chosen on training images
that are held out, so nothing is chosen on the images that score.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import networks
import torch
from torch import nn

from edgepack import metrics
from edgepack.artifact import write_text
from edgepack.compress._tune import Hold, Tune, tune
from edgepack.compress._tune_hold import Grid, masked, on_grids
from edgepack.compressing import PassRun
from edgepack.data import Data, open_data
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Task
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "recovery.json"
NETWORK = "resnet20 (CIFAR-10)"
IMAGES, BITS, SPARSITY = 8000, 3, 0.6
SETTINGS = Tune(epochs=2, batch=64, held_out=400, precision="bfloat16")
TEACHING = {"labels and teacher": SETTINGS, "teacher alone, no labels": replace(SETTINGS, labels=False)}


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Of convolutions and linear layers, by name."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    return {f"{name}.weight": layer.weight for name, layer in layers.items()}


def rounded(module: nn.Module) -> tuple[AbstractContextManager[None], Hold]:
    """Each weight to the nearest of 2 · (2^(bits−1) − 1) + 1 steps, one scale per output channel."""
    largest = 2 ** (BITS - 1) - 1
    grids = {}
    for name, weight in weights_of(module).items():
        size = weight.detach().abs().flatten(1).amax(1)
        grids[name] = Grid((size / largest).view(-1, *[1] * (weight.dim() - 1)), largest)
    return on_grids(module, grids), Hold()


def sparse(module: nn.Module) -> tuple[AbstractContextManager[None], Hold]:
    """The smallest weights of the whole network are 0 and stay 0."""
    weights = weights_of(module).values()
    limit = torch.cat([weight.detach().abs().flatten() for weight in weights]).quantile(SPARSITY)
    return nullcontext(), Hold(project=[masked(weight, weight.detach().abs() > limit) for weight in weights])


CASES: dict[str, Callable[[nn.Module], tuple[AbstractContextManager[None], Hold]]] = {
    f"rounded to {BITS} bits": rounded,
    f"{SPARSITY:.0%} of the weights 0": sparse,
}


@contextmanager
def nothing() -> Any:
    yield


def accuracy(module: nn.Module, data: Data) -> float:
    right = 0
    with torch.no_grad():
        for batch in data.batches(200):
            assert batch.targets is not None
            found = module(torch.from_numpy(batch.inputs["input"])).argmax(1).numpy()
            right += int((found == batch.targets).sum())
    return right / len(data)


def run(original: nn.Module, harm: Any, settings: Tune | None, task: Task) -> tuple[nn.Module, Mapping[str, Any]]:
    """The compressed network, trained as the settings say, with what training recorded."""
    module = copy.deepcopy(original)
    with tempfile.TemporaryDirectory() as folder:
        job = PassRun(Path(folder), 0, Plan(), Silent(), original, task)
        around, hold = harm(module)
        with around:
            tune(module, task, job, settings, hold)
        return module, job.findings.get("tune", {})


def rows_of(name: str, original: nn.Module, task: Task, test: Data) -> list[dict[str, Any]]:
    before = accuracy(run(original, CASES[name], None, task)[0], test)
    rows = []
    for words, settings in TEACHING.items():
        module, found = run(original, CASES[name], settings, task)
        after = accuracy(module, test)
        rows.append({
            "case": name, "teaching": words, "before": before, "after": after, "settings": asdict(settings),
            "images": len(task.training or ()), "seconds": found["seconds"], "kept": found["kept"],
            "epochs": found["epochs"],
        })  # fmt: skip
        shown = ("case", "teaching", "before", "after", "seconds")
        print(json.dumps({key: rows[-1][key] for key in shown}), flush=True)  # noqa: T201
    return rows


def document(data: Mapping[str, Any]) -> str:
    whole = data["float"]
    lines = ["| compression | learnt from | before | after | of the loss regained | training |", "| --- " * 6 + "|"]
    for row in data["rows"]:
        regained = (row["after"] - row["before"]) / (whole - row["before"])
        settings = row["settings"]
        lines.append(f"| {row['case']} | {row['teaching']} | {100 * row['before']:.2f} % | {100 * row['after']:.2f} % "
                     f"| {100 * regained:.0f} % | {settings['epochs']} epochs of {row['images']:,} images, "
                     f"{settings.get('precision', 'float32')}, {row['seconds']:.0f} s |")  # fmt: skip
    return (
        "# What training regains\n\nWritten by `python benchmarks/recovery.py` from "
        "`benchmarks/results/recovery.json`; do not edit.\n\nResNet-20 on CIFAR-10, top-1 on all "
        f"{data['scored']:,} test images; the network before compression has {100 * whole:.2f} %. Weights are rounded "
        "to the nearest step, one scale per output channel, or the smallest are set to 0 at once; both stay so while "
        "training. The teacher is the network before compression. The best epoch was chosen on training images "
        "held out; no test image took part in any choice. Seconds are of a machine with other work on it, "
        f"{data['threads']} thread.\n\n" + "\n".join(lines) + "\n\n"
        f"Versions: {', '.join(f'{k} {v}' for k, v in data['versions'].items())}; {data['machine']}.\n"
    )


def store(path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    order = list(CASES)
    data = {
        **facts,
        "rows": sorted(rows, key=lambda row: order.index(row["case"])),
        "versions": versions("torch", "numpy"),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    write_text(path, json.dumps(data, indent=1) + "\n")
    write_text(ROOT / "docs" / "recovery.md", document(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--document", action="store_true", help="only write docs/recovery.md from the stored results")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.document:
        write_text(ROOT / "docs" / "recovery.md", document(json.loads(options.results.read_text())))
        return
    torch.set_num_threads(1)
    network = next(item for item in networks.networks() if item.name == NETWORK)
    original = networks.load(network, options.data).eval()
    test = open_data("cifar10_test.npz", network.inputs, options.data)
    training = open_data({"data": "cifar10_train20k.npz", "samples": IMAGES}, network.inputs, options.data)
    task = Task(network.inputs, training=training, metric=metrics.find("top1", ROOT), augment="crop-flip")
    facts = {"float": accuracy(original, test), "scored": len(test), "threads": torch.get_num_threads()}
    rows = json.loads(options.results.read_text())["rows"] if options.results.exists() else []
    for name in CASES:
        if options.words and not any(word in name for word in options.words):
            continue
        rows = [row for row in rows if row["case"] != name] + rows_of(name, original, task, test)
        store(options.results, rows, facts)


if __name__ == "__main__":
    main()
