"""Batch norms in training: memory and time of a step in four modes. Writes results/tune_norms.json, docs/tune_norms.md.

    python benchmarks/tune_norms.py               # memory, then time: half a minute each on a free core
    python benchmarks/tune_norms.py --document    # only write the page from the stored results

One block of each stage of ResNet-50. *Train* uses the statistics of the batch; *Eval* frozen ones; *Tune* merges them
into the convolutions in each step; *Deploy* has merged them once, and trains other weights. Steps of all modes take
turns in random order, so that what else the machine does falls on all of them; memory is that of fresh processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
from torch import Tensor, nn

from edgepack import models
from edgepack.artifact import write_text
from edgepack.compress._graph import GraphView
from edgepack.compress._norms import fold_norms
from edgepack.compress._tune_norms import pairs_of, tuned
from edgepack.compressing import PassRun
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.statistics import bootstrap
from edgepack.task import Input, Task
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tune_norms.json"
BLOCKS = {"layer1": (256, 56), "layer2": (512, 28), "layer3": (1024, 14), "layer4": (2048, 7)}
MODES = ("train", "eval", "tune", "deploy")
BATCH, ROUNDS = 8, 10
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def block(name: str) -> nn.Module:
    """The second block of a stage, with random statistics."""
    torch.manual_seed(0)
    models.prepare_torchvision()
    found: nn.Module = getattr(models.load("torchvision:resnet50", Path()), name)[1]
    return networks.with_statistics(found).eval()


def in_mode(module: nn.Module, mode: str, channels: int, size: int) -> tuple[nn.Module, contextlib.ExitStack]:
    """The block in one of the modes, until the stack is closed."""
    stack = contextlib.ExitStack()
    task = Task((Input("x", (1, channels, size, size)),))
    if mode == "tune":
        found = pairs_of(GraphView.of(module, task))
        assert len(found) == 3
        stack.enter_context(tuned(found))
    elif mode == "deploy":
        job = PassRun(Path(), 0, Plan(), Silent(), module, task)
        module, _ = fold_norms(GraphView.of(module, task), task, job)
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())
    return module.train(mode == "train"), stack


def step_of(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """One step of gradient descent, with a gradient for what lies before the block too."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()

    return step


def example(channels: int, size: int, batch: int = BATCH) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, channels, size, size).requires_grad_()


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """What the forward pass keeps for the backward pass, besides parameters and input."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(x)
    own = {value.untyped_storage().data_ptr() for value in (*module.parameters(), *module.buffers(), x)}
    del result
    return sum(size for place, size in kept.items() if place not in own)


def measure_memory(name: str, mode: str) -> dict[str, int]:
    """Of this process: the highest resident memory of a step above that before it."""
    channels, size = BLOCKS[name]
    module, stack = in_mode(block(name), mode, channels, size)
    with stack:
        saved = saved_bytes(module, example(channels, size))
        step_of(module, example(channels, 4, 2))()  # loads what the first step of a process loads
        for value in module.parameters():
            value.grad = None
        x = example(channels, size)
        step = step_of(module, x)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        step()
        return {"peak_bytes": _status("VmHWM") - before, "saved_bytes": saved}


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{key}:")))


def fresh(name: str, mode: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, __file__, "--memory-of", name, mode], check=True, capture_output=True,
                          text=True, env={**os.environ, **MAPPED})  # fmt: skip
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def times(name: str) -> dict[str, list[float]]:
    """Milliseconds of each mode's steps, one per round."""
    channels, size = BLOCKS[name]
    draw, found = random.Random(0), {mode: [] for mode in MODES}  # type: dict[str, list[float]]
    with contextlib.ExitStack() as stack:
        steps = {}
        for mode in MODES:
            module, own = in_mode(block(name), mode, channels, size)
            stack.enter_context(own)
            steps[mode] = step_of(module, example(channels, size))
            steps[mode]()
        for _ in range(ROUNDS):
            for mode in draw.sample(MODES, len(MODES)):
                began = time.perf_counter()
                steps[mode]()
                found[mode].append(1000 * (time.perf_counter() - began))
    return found


def row(name: str, mode: str, taken: Mapping[str, list[float]]) -> dict[str, Any]:
    """Median of a mode's steps, and of their ratio to Eval's step of the same round."""
    ratios = np.asarray(taken[mode])[:, None] / np.asarray(taken["eval"])[:, None]
    median = lambda rows: float(np.median(rows[:, 0]))  # noqa: E731
    interval = bootstrap(ratios, median, seed=0)
    return {"block": name, "mode": mode, "step_ms": float(np.median(taken[mode])), "ratio": median(ratios),
            "low": interval.low, "high": interval.high}  # fmt: skip


def document(data: Mapping[str, Any]) -> str:
    head = "| block | mode | kept for the backward pass | peak memory of a step | of Eval | step | step ÷ Eval's |"
    lines = [head, "| --- " * 7 + "|"]
    whole = {entry["block"]: entry["peak_bytes"] for entry in data["rows"] if entry["mode"] == "eval"}
    for entry in data["rows"]:
        share = entry["peak_bytes"] / whole[entry["block"]]
        lines.append(f"| {entry['block']} | {entry['mode'].capitalize()} | {entry['saved_bytes'] / 2**20:.1f} MiB "
                     f"| {entry['peak_bytes'] / 2**20:.1f} MiB | {share:.2f} | {entry['step_ms']:.0f} ms "
                     f"| {entry['ratio']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}] |")  # fmt: skip
    return (
        "# Batch norms while training\n\nWritten by `python benchmarks/tune_norms.py` from "
        "`benchmarks/results/tune_norms.json`; do not edit.\n\nThe second block of each stage of ResNet-50, "
        f"{data['batch']} samples at the sizes of 224×224 images, forward, backward and step. *Train* uses the "
        "statistics of the batch, *Eval* frozen ones, *Tune* (what `tune` does by default) merges frozen ones into the "
        "convolutions in each step, *Deploy* has merged them beforehand and so trains other weights. Tune's gradients "
        f"are Eval's within {data['gradients']:.0e} in float64 and {data['gradients_smooth']:.0e} in float32 with SiLU "
        f"for ReLU (with ReLU {data['gradients_float32']:.0e}: one whose input is 0 within rounding passes a gradient "
        "in one and not in the other): norm of the difference over norm of the gradient, the worst of every parameter "
        "and the input of every block. Peak memory is resident memory above that before the step, of a fresh process; "
        "where the weights outweigh the activations, as in layer4, keeping the merged weights costs what is saved. "
        f"Times: {data['rounds']} rounds in which the four modes take turns in random order, one thread; the ratio is "
        "the median of the rounds' ratios, with its 95 % interval.\n\n" + "\n".join(lines) + "\n\n"
        f"Versions: {', '.join(f'{k} {v}' for k, v in data['versions'].items())}; {data['machine']}.\n"
    )


def gradients_apart(kind: torch.dtype, activation: nn.Module | None = None) -> float:
    """Largest ‖difference‖ / ‖gradient‖ of Tune's gradients from Eval's; with another activation than ReLU."""
    worst = 0.0
    for name, (channels, size) in BLOCKS.items():
        plain = block(name)
        plain.relu = activation or plain.relu
        found = pairs_of(GraphView.of(plain, Task((Input("x", (1, channels, size, size)),))))
        plain.to(kind)
        x = example(channels, size, 2).detach().to(kind)
        wanted = _gradients(plain, x)
        with tuned(found):
            given = _gradients(plain, x)
        worst = max(worst, *(float((a - b).norm() / b.norm()) for a, b in zip(given, wanted, strict=True)))
    return worst


def _gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(module(x).square().mean(), [*module.parameters(), x]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", action="store_true", help="only write docs/tune_norms.md from the stored results")
    parser.add_argument("--memory-of", nargs=2, metavar=("BLOCK", "MODE"), help="print what one fresh process takes")
    parser.add_argument("--part", choices=("memory", "time", "gradients"), help="only this; the rest stays as stored")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(measure_memory(*options.memory_of)))  # noqa: T201
        return
    stored = json.loads(options.results.read_text()) if options.results.exists() else {"rows": []}
    if not options.document:
        rows = {(entry["block"], entry["mode"]): entry for entry in stored["rows"]}
        for name in BLOCKS:
            taken = times(name) if options.part in (None, "time") else {}
            for mode in MODES:
                new = row(name, mode, taken) if taken else {}
                new |= fresh(name, mode) if options.part in (None, "memory") else {}
                rows[name, mode] = {"block": name, "mode": mode, **rows.get((name, mode), {}), **new}
        if options.part in (None, "gradients"):
            stored["gradients"] = gradients_apart(torch.float64)
            stored["gradients_float32"] = gradients_apart(torch.float32)
            stored["gradients_smooth"] = gradients_apart(torch.float32, nn.SiLU())
        stored |= {
            "rows": [rows[name, mode] for name in BLOCKS for mode in MODES], "batch": BATCH, "rounds": ROUNDS,
            "versions": versions("torch", "torchvision"),
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        }  # fmt: skip
        write_text(options.results, json.dumps(stored, indent=1) + "\n")
    if all("peak_bytes" in entry and "ratio" in entry for entry in stored["rows"]):
        write_text(ROOT / "docs" / "tune_norms.md", document(stored))


if __name__ == "__main__":
    main()
