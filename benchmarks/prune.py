"""Fewer channels: what training regains, and how much faster. Writes results/prune.json and docs/prune.md.

    python benchmarks/prune.py choose               # the pass and Torch-Pruning's own pruner, not trained
    python benchmarks/prune.py train --roles pruned-0.1-5  # the pass's, with its teacher, at this rate, for 5 epochs
    python benchmarks/prune.py train --roles removed4-0.2-5-light-sharp  # other widths, weights of losses, temperature
    python benchmarks/prune.py train --roles plain-0.1-5   # Torch-Pruning's, on labels alone; goes on where it stopped
    python benchmarks/prune.py score                # on 10,000 test images, which took part in nothing before
    python benchmarks/prune.py export               # what is raced
    python benchmarks/prune.py race                 # time it: nothing else should run
    python benchmarks/prune.py budget               # the pass with a budget of latency: nothing else should run either
    python benchmarks/prune.py document             # only write the page from the stored results

ResNet-32 for CIFAR-10, whose shortcuts slice and pad channels, so that only the widths inside its blocks can go.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import _prune_page as page
import networks as zoo
import torch
from torch import nn

from edgepack import metrics
from edgepack.artifact import Artifact
from edgepack.compress._macs import macs
from edgepack.compress._tune import Tune, tune
from edgepack.compress.prune import Prune
from edgepack.compressing import PassRun
from edgepack.contracts import Settings
from edgepack.data import open_data
from edgepack.devices.host import Host
from edgepack.plan import Plan
from edgepack.profiling import profile, write_module
from edgepack.progress import Silent
from edgepack.task import Task
from edgepack.tracing import example_inputs
from edgepack.versions import versions
from factorize import accuracy

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("original", "pruned", "pruned4", "plain")
TARGETS = ("onnx", "openvino", "tflite")
PACKAGES = ("torch", "torch-pruning", "onnxruntime", "openvino", "ai-edge-litert")
IMAGES, MULTIPLE = 20000, 8
OPTIONS = Prune(macs_ratio=0.4999, multiple=MULTIPLE, samples=1024, targets=())
CHOICES = {"pruned": OPTIONS, "pruned4": replace(OPTIONS, multiple=4)}
CHOICES |= {name.replace("pruned", "removed"): replace(chosen, reconstruct=False) for name, chosen in CHOICES.items()}
BUDGET = Prune(latency_ratio=0.7, multiple=MULTIPLE, samples=256)
PLAIN = Tune(batch=128, norms="train", held_out=0, precision="bfloat16", teacher="none")
TAUGHT = replace(PLAIN, teacher="original", features=("auto",), feature_weight=4.0)
TUNE = {f"{role}-{rate:g}-{epochs}": replace(base, lr=rate, epochs=epochs)
        for role, base in (*((role, TAUGHT) for role in CHOICES), ("plain", PLAIN))
        for rate in (0.02, 0.05, 0.1, 0.2) for epochs in (5, 11, 15)}  # fmt: skip
TUNE |= {f"{name}-mixup": replace(settings, mixup=True) for name, settings in TUNE.items()}
TUNE |= {f"{name}-light": replace(settings, feature_weight=1.0) for name, settings in TUNE.items()}
TUNE |= {f"{name}-sharp": replace(settings, temperature=2.0) for name, settings in TUNE.items()}
TUNE |= {f"{name}-again": replace(settings, seed=1) for name, settings in TUNE.items()}


def load(data: Path) -> tuple[nn.Module, Task]:
    """The trained network, and its task without test images."""
    network = next(item for item in zoo.networks() if item.name == "resnet32 (CIFAR-10)")
    training = open_data({"data": "cifar10_train20k.npz", "samples": IMAGES}, network.inputs, data)
    metric = metrics.find("top1", ROOT)
    return zoo.load(network, data).eval(), Task(network.inputs, training=training, metric=metric, augment="crop-flip")


def job(module: nn.Module, task: Task, work: Path, role: str) -> PassRun:
    return PassRun(work / role, 0, Plan(), Silent(), copy.deepcopy(module), task, identity=role)


def choose(options: argparse.Namespace) -> None:
    """Both networks before training."""
    module, task = load(options.data)
    for role, settings in CHOICES.items():
        run = job(module, task, options.work, role)
        keep(options, role, settings.apply(copy.deepcopy(module), task, run))
        for note in run.notes:
            say(note)
        if role not in page.MADE_AS:
            share = run.findings["channels"]["macs"]
            page.RESULTS.store("choice", {**run.findings["channels"], "role": role}, facts())
    plain = magnitude(module, task)
    keep(options, "plain", plain)
    widths = {path: layer.out_channels for path, layer in plain.named_modules() if isinstance(layer, nn.Conv2d)}
    page.RESULTS.store("choice", {"role": "plain", "macs": [share[0], cost(plain, task)], "widths": widths,
                          "parameters": [count(module), count(plain)]}, facts())  # fmt: skip
    keep(options, "original", module)


def magnitude(module: nn.Module, task: Task) -> nn.Module:
    """Torch-Pruning's magnitude pruner as it is by default: half of the channels of each layer.

    It cannot follow the shortcuts, so that the second convolutions of the blocks are named as layers to be ignored.
    """
    import torch_pruning

    network = copy.deepcopy(module)
    stays = [layer for path, layer in network.named_modules() if path in ("conv1", "linear") or path.endswith("conv2")]
    torch_pruning.pruner.MagnitudePruner(
        network, example_inputs(task.specs), torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5, ignored_layers=stays, round_to=MULTIPLE,
    ).step()  # fmt: skip
    return network.eval()


def train(options: argparse.Namespace) -> None:
    """What is lost, trained back; goes on where it was stopped."""
    module, task = load(options.data)
    for role in options.roles:
        run = job(module, task, options.work, role)
        run.note = say  # type: ignore[method-assign]
        trained = tune(kept(options, role.partition("-")[0]), task, run, TUNE[role])
        keep(options, f"{role}-trained", trained)
        found = run.findings["tune"]
        row = {"role": role, "images": IMAGES, "settings": asdict(TUNE[role])}
        page.RESULTS.store(
            "training", row | {key: found[key] for key in ("epochs", "kept", "seconds", "ended")}, facts()
        )


def score(options: argparse.Namespace) -> None:
    """Every test image, once."""
    module, task = load(options.data)
    test = open_data({"data": "cifar10_test.npz"}, task.inputs, options.data)
    for role in options.roles:
        untrained = [role] if options.untrained or role == "original" or role in CHOICES else []
        for name in [*untrained, *([f"{role}-trained"] if role in TUNE else [])]:
            network = module if role == "original" else kept(options, name)
            row = {"role": name, "samples": len(test), "top1": accuracy(network.eval(), test)}
            say(json.dumps(row))
            page.RESULTS.store("accuracy", row, facts())


def export(options: argparse.Namespace) -> None:
    _, task = load(options.data)
    for role in ROLES:
        stored = options.work / f"{role if role == 'original' else f'{role}-trained'}.pt"
        for target in TARGETS:
            folder = options.work / "race" / target / role
            shutil.rmtree(folder, ignore_errors=True)
            network = torch.load(stored if stored.exists() else options.work / f"{role}.pt", weights_only=False)
            artifact = write_module(network, task, folder, target)
            size = sum(file.size_bytes for file in artifact.manifest.files.values())
            page.RESULTS.store("size", {"role": role, "target": target, "size_bytes": size}, facts())
            say(f"{role} {target} {size}")


def race(options: argparse.Namespace) -> None:
    for target in options.targets:
        artifacts = [Artifact.open(options.work / "race" / target / role) for role in ROLES]
        found = profile(artifacts, Host(), None, Settings(max_seconds=options.seconds, cold=False), Silent())
        for role, item in zip(ROLES[1:], found[1:], strict=True):
            assert item.ratio is not None
            row = {"role": role, "target": target, "ratio": asdict(item.ratio), "state": item.conditions["state"],
                   "ms": [found[0].conditions["floor_ms"], item.conditions["floor_ms"]]}  # fmt: skip
            say(json.dumps(row))
            page.RESULTS.store("race", row, facts())


def budget(options: argparse.Namespace) -> None:
    """What the pass removes until an engine is fast enough, as it measures."""
    module, task = load(options.data)
    run = job(module, task, options.work, "budget")
    shutil.rmtree(run.workdir, ignore_errors=True)
    BUDGET.apply(copy.deepcopy(module), task, run)
    found = run.findings["channels"]
    widths = [[row["before"], row["after"]] for row in found["layers"]]
    for target, verdict in found["targets"].items():
        row = {"role": "budget", "target": target, "limit": BUDGET.latency_ratio, "macs": found["macs"],
               "parameters": found["parameters"], "widths": widths, **verdict}  # fmt: skip
        say(json.dumps(row))
        page.RESULTS.store("budget", row, facts())


def keep(options: argparse.Namespace, name: str, network: nn.Module) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    torch.save(network, options.work / f"{name}.pt")


def kept(options: argparse.Namespace, name: str) -> nn.Module:
    network: nn.Module = torch.load(options.work / f"{name}.pt", weights_only=False)
    return network


def cost(network: nn.Module, task: Task) -> int:
    return macs(network, example_inputs(task.specs, batch=1))


def count(network: nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def facts() -> dict[str, Any]:
    return {"processor": Host().facts().get("processor", "unknown processor"), "versions": versions(*PACKAGES)}


STAGES: Mapping[str, Any] = {"choose": choose, "train": train, "score": score, "export": export, "race": race,
                             "budget": budget, "document": lambda _: page.RESULTS.rewrite()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=tuple(STAGES))
    parser.add_argument(
        "--roles",
        nargs="+",
        choices=(*ROLES, *(role for role in CHOICES if role not in ROLES), *TUNE),
        default=ROLES,
        metavar="ROLE",
        help="such as plain, or to be trained: plain-0.1-5, pruned-0.1-15-mixup, plain-0.1-5-again (another seed)",
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "prune", help="networks, trained and raced")
    parser.add_argument("--untrained", action="store_true", help="score networks before training too")
    parser.add_argument("--seconds", type=float, default=25.0, help="at most, per race")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for stage in options.stages:
        STAGES[stage](options)


if __name__ == "__main__":
    main()
