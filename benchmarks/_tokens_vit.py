"""The trained ViT for CIFAR-10 of ``tokens.py`` when cut: its accuracy in PyTorch and in engines, and its latency."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _tokens_files import ENGINES, accepted, cut, write
from torch import Tensor, nn

from edgepack import models, parts
from edgepack.compress._cuts import Cut, cuts_of
from edgepack.compress._macs import macs
from edgepack.contracts import Contender, Graph, Runtime, Settings, TensorSpec
from edgepack.devices.host import Host
from edgepack.graph import capture, run_graph
from edgepack.plan import Plan
from edgepack.task import Input, Task

ROOT = Path(__file__).resolve().parent.parent
CIFAR: dict[str, Any] = {"scale": 255, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
ITEM = Input("x", (1, 3, 32, 32), **CIFAR)
BATCH = 100


class Told(nn.Module):
    """A network that also says which candidates each of its cuts kept."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        places: list[Tensor] = []

        def watch(cut: Cut, scores: Tensor, kept: Tensor | None) -> None:
            assert kept is not None
            places.append(kept)

        cuts = cuts_of(self.module)
        for one in cuts:
            one.watch = watch
        logits = self.module(x)
        for one in cuts:
            one.watch = None
        return (logits, *places)


def vit(data: Path) -> nn.Module:
    return models.load("models.py:vit_cifar10", ROOT / "examples" / "zoo", data / "vit_cifar10.safetensors")


def pictures(data: Path, samples: int | None) -> tuple[Any, Any]:
    """Test images as the network takes them, and their classes."""
    with np.load(data / "cifar10_test.npz") as stored:
        pixels, labels = stored["x"][:samples], stored["y"][:samples]
    mean, std = (np.array(CIFAR[name], np.float32) for name in ("mean", "std"))
    values = ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(values, np.float32), labels


def accuracy(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Top-1 of the trained ViT at each keep rate, and whether engines keep the tokens that PyTorch keeps."""
    network, task = vit(options.data), Task((ITEM,))
    images, labels = pictures(options.data, options.samples)
    for rate in options.rates:
        module = cut(network, task, rate)
        graph = capture(Told(module).eval() if rate < 1 else module, task)
        logits, *kept = answers(lambda x, graph=graph: run_graph(graph, {"x": x}), graph.outputs, images)
        row: dict[str, Any] = {
            "keep_rate": rate, "samples": len(labels), "top1": float((logits.argmax(1) == labels).mean()),
            "macs": macs(module, (torch.zeros(1, 3, 32, 32),)), "engines": {},
        }  # fmt: skip
        for engine in options.engines:
            row["engines"][engine] = beside(engine, graph, task, images, labels, logits, kept, options.work)
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
        yield row


def answers(call: Any, outputs: Sequence[TensorSpec], images: Any, size: int = BATCH) -> list[Any]:
    """All outputs for all images, in batches."""
    rows = [call(images[start : start + size]) for start in range(0, len(images), size)]
    return [np.concatenate([row[spec.name] for row in rows]) for spec in outputs]


def beside(
    engine: str, graph: Graph, task: Task, images: Any, labels: Any, logits: Any, kept: Any, work: Path
) -> dict[str, Any]:
    """An engine's top-1, the images on which every cut kept PyTorch's tokens, and the logits on those."""
    artifact = write(engine, graph, Plan(), task, work / "told")
    session = parts.find(Runtime, ENGINES[engine])().load(artifact, 1)
    size = BATCH if engine != "tflite" else 1
    found, *places = answers(lambda x: session.run({"x": x}), graph.outputs, images, size)
    session.close()
    same = np.ones(len(labels), bool)
    for theirs, ours in zip(places, kept, strict=True):
        same &= (np.sort(theirs.astype(np.int64), 1) == np.sort(ours, 1)).all(1)
    difference = np.abs(found[same] - logits[same]).max() / np.abs(logits).max()
    return {"top1": float((found.argmax(1) == labels).mean()), "same_tokens": float(same.mean()),
            "max_rel": float(difference)}  # fmt: skip


def prepare_vit(options: argparse.Namespace) -> None:
    """Write the ViT as every file its races need."""
    network, task = vit(options.data), Task((ITEM,))
    for rate in options.rates:
        graph = capture(cut(network, task, rate, options.blocks), task)
        for engine in options.engines:
            write(engine, graph, Plan(), task, place(options.work, engine, rate, options.blocks))


def place(work: Path, engine: str, rate: float, blocks: Sequence[int] = ()) -> Path:
    return work / f"vit {engine} keep {rate:g}{where(blocks) if rate < 1 else ''}"


def where(blocks: Sequence[int]) -> str:
    """What files of a network say of the blocks that are cut; nothing of the default ones."""
    return f" in {'-'.join(map(str, blocks))}" if blocks else ""


def race_vit(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    runtime = parts.find(Runtime, ENGINES[options.engine])()
    settings = Settings(max_seconds=options.seconds, cold=False, half_width=0.012, instances=options.instances)
    contenders = [
        Contender(f"{rate:g}", accepted(place(options.work, options.engine, rate, options.blocks), runtime), runtime)
        for rate in options.rates
    ]
    for profile in Host().measure(contenders, settings):
        yield {
            "engine": options.engine, "keep_rate": float(profile.label), "p50_ms": profile.latency_ms.p50,
            "ratio": None if profile.ratio is None else asdict(profile.ratio), "state": profile.conditions["state"],
            **({"blocks": list(options.blocks)} if options.blocks else {}),
        }  # fmt: skip
