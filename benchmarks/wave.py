"""A network born small predicts waves. Writes results/wave.json, docs/wave.md and docs/wave.png.

    python benchmarks/wave.py train --networks dense       # a plain network; goes on where it was stopped
    python benchmarks/wave.py train --networks apriori     # the same, its kernels products of one-way filters
    python benchmarks/wave.py write                        # both forms of the second, and the first, for each engine
    python benchmarks/wave.py race                         # time them: nothing else should run
    python benchmarks/wave.py document

The task is that of "A priori compression of convolutional neural networks for wave simulators": from three frames of a
vibrating membrane, the next one. Frames come from ``edgepack.waves``; the test membranes are others than those learnt.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from edgepack import waves
from edgepack.artifact import Artifact, write_text
from edgepack.compress._tune import Tune, tune
from edgepack.compress.factorize import Factorize
from edgepack.compressing import PassRun
from edgepack.contracts import Settings
from edgepack.data import Arrays
from edgepack.devices.host import Host
from edgepack.losses import Loss
from edgepack.metrics import Metric
from edgepack.plan import Plan
from edgepack.profiling import profile, write_module
from edgepack.progress import Silent
from edgepack.task import Input, Task
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results" / "wave.json"
DOCUMENT, PICTURE = ROOT / "docs" / "wave.md", ROOT / "docs" / "wave.png"
NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
SIZE, PAST, CHANNELS, KERNEL, FORM, RANK = 32, 3, 16, 5, "cp", 32
TRAINING, TEST = 1000, 200
TUNE = Tune(epochs=12, lr=4e-3, optimizer="adamw", batch=20, teacher="none", norms="eval", held_out=50)
ITEM = Input("frames", (1, PAST, SIZE, SIZE), layout="NCHW")
SHOWN, ENLARGED = 3, 4  # membranes in the picture, pixels per point


class Predictor(nn.Module):
    """The last frame plus what four convolutions say of the change."""

    def __init__(self) -> None:
        super().__init__()
        widths = [PAST, CHANNELS, CHANNELS, CHANNELS, 1]
        pairs = itertools.pairwise(widths)
        layers = [[nn.Conv2d(a, b, KERNEL, padding=KERNEL // 2), nn.ReLU()] for a, b in pairs]
        self.change = nn.Sequential(*[layer for pair in layers for layer in pair][:-1])

    def forward(self, frames: Tensor) -> Tensor:
        """(N, past, n, n) → (N, 1, n, n)."""
        return frames[:, -1:] + self.change(frames)


def far(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean relative L2 distance."""
    return ((outputs - targets).flatten(1).norm(dim=1) / targets.flatten(1).norm(dim=1).clamp_min(1e-6)).mean()


def task() -> Task:
    data = [Arrays((ITEM,), {"frames": x}, y) for x, y in (
        waves.samples(TRAINING, SIZE, PAST, seed=0), waves.samples(TEST, SIZE, PAST, seed=2))]  # fmt: skip
    metric = Metric(name="relative L2", score=waves.relative_l2, higher_is_better=False)
    return Task(
        (ITEM,), training=data[0], evaluation=data[1], metric=metric, loss=Loss(name="relative L2", compute=far)
    )


def test_of(module: nn.Module, of: Task) -> tuple[float, np.ndarray]:
    """Mean relative L2 on the test membranes, and the predictions."""
    assert of.evaluation is not None
    (batch,) = of.evaluation.batches(TEST)
    with torch.no_grad():
        found = module(torch.from_numpy(batch.inputs["frames"])).numpy()
    return float(waves.relative_l2(found, batch.targets).mean()), found


def train(name: str, work: Path) -> None:
    torch.manual_seed(0)
    original, of = Predictor().eval(), task()
    learning = Task(of.inputs, training=of.training, metric=of.metric, loss=of.loss)
    run = PassRun(work / name, 0, Plan(), Silent(), original, learning)
    if name == "dense":
        module = tune(Predictor().eval(), learning, run, TUNE)
        counts = [sum(value.numel() for value in module.parameters())] * 2
    else:
        born = Factorize(when="before-training", method=FORM, rank=RANK, targets=(), tune=TUNE)
        module = born.apply(Predictor().eval(), learning, run)
        counts = run.findings["products"]["parameters"]
    torch.save(module, work / f"{name}.pt")
    error, found = test_of(module, of)
    np.save(work / f"{name}.npy", found[:SHOWN])
    row = {"network": name, "parameters": counts[1], "relative_l2": error, "seconds": run.findings["tune"]["seconds"]}
    sys.stdout.write(f"{row} {run.notes}\n")
    keep("networks", row)


def plain(module: nn.Module) -> nn.Module:
    """Chains of convolutions as the dense ones that compute the same: their answers to impulses."""
    copied = copy.deepcopy(module)
    for name, chain in list(copied.change.named_children()):
        if isinstance(chain, nn.Sequential):
            inputs, outputs = chain[0].in_channels, chain[-1].out_channels
            dense = nn.Conv2d(inputs, outputs, KERNEL, padding=KERNEL // 2)
            wide = torch.zeros(inputs, inputs, 4 * KERNEL + 1, 4 * KERNEL + 1)
            wide[range(inputs), range(inputs), 2 * KERNEL, 2 * KERNEL] = 1
            with torch.no_grad():
                bias = chain[-1].bias
                answers = chain(wide) - bias.view(-1, 1, 1)
                reach = slice(2 * KERNEL - KERNEL // 2, 2 * KERNEL + KERNEL // 2 + 1)
                dense.weight.copy_(answers[:, :, reach, reach].flip(2, 3).movedim(0, 1))
                dense.bias.copy_(bias)
            setattr(copied.change, name, dense)
    return copied.eval()


def write(work: Path) -> None:
    of = task()
    chains = torch.load(work / "apriori.pt", weights_only=False)
    forms = {"dense": torch.load(work / "dense.pt", weights_only=False), "factored": chains, "rebuilt": plain(chains)}
    for form, module in forms.items():
        for target in NAMES:
            folder = work / "race" / target / form
            shutil.rmtree(folder, ignore_errors=True)
            write_module(module, Task(of.inputs), folder, target)
    keep("exact", {"network": "rebuilt", "difference": abs(test_of(forms["rebuilt"], of)[0] - test_of(chains, of)[0])})


def race(work: Path, seconds: float) -> None:
    for target in NAMES:
        artifacts = [Artifact.open(work / "race" / target / form) for form in ("dense", "factored", "rebuilt")]
        found = profile(artifacts, Host(), None, Settings(max_seconds=seconds, cold=False), Silent())
        for item in found:
            row = {"network": item.label, "target": target, "ms": item.conditions["floor_ms"]}
            keep("race", {**row, "ratio": None if item.ratio is None else asdict(item.ratio)})


def keep(stage: str, row: Mapping[str, Any]) -> None:
    stored: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    same = [name for name in ("network", "target") if name in row]
    old = [item for item in stored.get(stage, []) if any(item[name] != row[name] for name in same)]
    stored[stage] = sorted([*old, row], key=lambda item: [item[name] for name in same])
    stored["facts"] = {
        "processor": Host().facts().get("processor"),
        "versions": versions("torch", "onnxruntime", "openvino"),
    }
    write_text(STORED, json.dumps(stored, indent=1, allow_nan=False) + "\n")
    write_text(DOCUMENT, document(stored))


def picture(work: Path) -> None:
    """Rows: membranes; columns: the true next frame, the dense network's, the small one's, its error ten times."""
    of = task()
    assert of.evaluation is not None
    (batch,) = of.evaluation.batches(TEST)
    dense, small = (np.load(work / f"{name}.npy") for name in ("dense", "apriori"))
    rows = []
    for index in range(SHOWN):
        true = batch.targets[index, 0]
        fields = [true, dense[index, 0], small[index, 0], 10 * (small[index, 0] - true)]
        rows.append(np.concatenate([_coloured(field / np.abs(true).max()) for field in fields], axis=1))
    Image.fromarray(np.concatenate(rows)).save(PICTURE)


def _coloured(field: np.ndarray) -> np.ndarray:
    """−1 blue, 0 white, 1 red, with a white margin."""
    value = np.clip(field, -1, 1)[..., None]
    red, blue = np.array([178.0, 24, 43]), np.array([33.0, 102, 172])
    colour = np.where(value > 0, 255 + value * (red - 255), 255 - value * (blue - 255))
    large = np.repeat(np.repeat(colour, ENLARGED, 0), ENLARGED, 1)
    return np.pad(large, [(4, 4), (4, 4), (0, 0)], constant_values=255).astype(np.uint8)


def document(stored: Mapping[str, Any]) -> str:
    rows = {row["network"]: row for row in stored["networks"]}
    lines = [
        "# Waves predicted by a network that was born small", "",
        "Written by `python benchmarks/wave.py` from `benchmarks/results/wave.json`; do not edit.", "",
        f"From {PAST} frames of a vibrating membrane ({SIZE} × {SIZE} points, leap-frog solution of the wave "
        f"equation, random Gaussian bumps) the next frame. Four convolutions of {KERNEL} × {KERNEL}, {CHANNELS} "
        f"channels; the small network's kernels are products of one-way filters (`factorize`, before training, {FORM}, "
        f"rank {RANK}). Both were trained alike on {TRAINING:,} membranes; relative L2 on {TEST} others, "
        "not those on which form and rank were chosen.", "",
        "| network | parameters | relative L2 | training s |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [f"| {name} | {row['parameters']:,} | {row['relative_l2']:.4f} | {row['seconds']:.0f} |"
              for name, row in rows.items()]  # fmt: skip
    if {"dense", "apriori"} <= set(rows):
        fewer = rows["dense"]["parameters"] / rows["apriori"]["parameters"]
        ratio = rows["apriori"]["relative_l2"] / rows["dense"]["relative_l2"]
        lines += ["", f"{fewer:.2f} times fewer parameters, {ratio:.3f} times the error."]
    if stored.get("race"):
        lines += ["", "One prediction, one thread, interleaved; *over dense*: latency ratio, 95 % interval.", "",
                  "| engine | form | ms | over dense |", "| --- | --- | --- | --- |"]  # fmt: skip
        for row in sorted(stored["race"], key=lambda row: row["target"]):
            ratio = row["ratio"]
            said = "1" if ratio is None else f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
            lines.append(f"| {NAMES[row['target']]} | {row['network']} | {row['ms']:.4f} | {said} |")
        lines += ["", "True next frame, the dense network's, the small one's, and its error ten times:", "",
                  "![fields](wave.png)"]  # fmt: skip
    named = ", ".join(f"{name} {version}" for name, version in stored["facts"]["versions"].items())
    return "\n".join([*lines, "", f"{stored['facts']['processor']}; {named}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "write", "race", "document"))
    parser.add_argument("--networks", nargs="+", choices=("dense", "apriori"), default=("dense", "apriori"))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wave")
    parser.add_argument("--seconds", type=float, default=20.0, help="at most, per race")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage == "train":
        for name in options.networks:
            train(name, options.work)
    elif options.stage == "write":
        write(options.work)
        picture(options.work)
    elif options.stage == "race":
        race(options.work, options.seconds)
    else:
        write_text(DOCUMENT, document(json.loads(STORED.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
