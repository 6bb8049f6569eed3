"""The trained ViT of ``tokens.py``: cut and trained on, beside the uncut network trained on the same schedule."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgepack import metrics, models
from edgepack.compress._tune import Tune
from edgepack.compress.reorganize import Reorganize
from edgepack.compressing import PassRun
from edgepack.data import open_data
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Input, Task

ROOT = Path(__file__).resolve().parent.parent
CIFAR: dict[str, Any] = {"scale": 255, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
SHRINK = 0.3
BATCH = 100


def vit(data: Path) -> nn.Module:
    return models.load("models.py:vit_cifar10", ROOT / "examples" / "zoo", data / "vit_cifar10.safetensors")


def vit_task(options: argparse.Namespace) -> Task:
    item = Input("x", (1, 3, 32, 32), **CIFAR)
    spec = {"data": "cifar10_train20k.npz"} | ({"samples": options.images} if options.images else {})
    training = open_data(spec, (item,), options.data)
    return Task((item,), training=training, metric=metrics.find("top1", ROOT), augment="crop-flip")


def settings(options: argparse.Namespace) -> Tune:
    return Tune(
        epochs=options.epochs, optimizer="adamw", lr=options.lr, batch=128, held_out=options.held_out,
        share=options.share, weight_decay=0.01,
    )  # fmt: skip


def tuned(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The ViT trained at each keep rate (1: uncut), the weights kept as files; a killed run goes on where it was."""
    original, task = vit(options.data), vit_task(options)
    test = pictures(options.data, options.samples)
    for rate in options.rates:
        job = PassRun(options.work / f"tuned {options.epochs} keep {rate:g}", 0, Plan(), Silent(), original, task)
        found = Reorganize(keep_rate=rate, tune=settings(options), shrink=SHRINK).apply(
            copy.deepcopy(original), task, job
        )
        torch.save(found.state_dict(), options.work / f"vit {options.epochs} keep {rate:g}.pt")
        learnt = job.findings["tune"]
        yield {
            "keep_rate": rate, "epochs": options.epochs, "top1": top1(found, *test), "samples": len(test[1]),
            "seconds": learnt["seconds"], "kept": learnt["kept"], "history": learnt["epochs"],
            "settings": asdict(settings(options)), "shrink": SHRINK, "images": len(task.training or ()),
        }  # fmt: skip


def pictures(data: Path, samples: int | None) -> tuple[Any, Any]:
    """Test images as the network takes them, and their classes."""
    with np.load(data / "cifar10_test.npz") as stored:
        pixels, labels = stored["x"][:samples], stored["y"][:samples]
    mean, std = (np.array(CIFAR[name], np.float32) for name in ("mean", "std"))
    values = ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(values, np.float32), labels


def top1(module: nn.Module, images: Any, labels: Any) -> float:
    right = 0
    with torch.no_grad():
        for start in range(0, len(images), BATCH):
            found = module(torch.from_numpy(images[start : start + BATCH])).argmax(1).numpy()
            right += int((found == labels[start : start + BATCH]).sum())
    return right / len(labels)
