"""The ViT of ``_tokens_vit.py`` cut and trained, beside the uncut network trained on the same schedule; 8 bits too."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _tokens_files import ENGINES, applied, cut, write
from _tokens_vit import BATCH, ITEM, answers, pictures, vit, where
from torch import nn

from edgepack import metrics, parts
from edgepack.artifact import MANIFEST, Artifact
from edgepack.compress._macs import macs
from edgepack.compress._tune import Tune
from edgepack.compress.quantize import Quantize
from edgepack.compress.reorganize import Reorganize
from edgepack.compressing import PassRun
from edgepack.contracts import Runtime
from edgepack.data import open_data
from edgepack.graph import capture
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Task

ROOT = Path(__file__).resolve().parent.parent
SHRINK = 0.3
CALIBRATION = 512
TRAINING = "cifar10_train20k.npz"


def training_task(options: argparse.Namespace) -> Task:
    training = open_data(TRAINING, (ITEM,), options.data)
    return Task((ITEM,), training=training, metric=metrics.find("top1", ROOT), augment="crop-flip")


def settings(epochs: int) -> Tune:
    return Tune(
        epochs=epochs, optimizer="adamw", lr=1e-3, batch=128, held_out=500, share=0.9, weight_decay=0.01,
        precision="bfloat16",
    )  # fmt: skip


def tuned(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The ViT trained at each keep rate (1: uncut), the weights kept as files; a killed run goes on where it was."""
    original, task = vit(options.data), training_task(options)
    test = pictures(options.data, options.samples)
    for rate in options.rates:
        job = PassRun(options.work / f"tuned {called(options, rate)}", 0, Plan(), Silent(), original, task)
        item = Reorganize(
            keep_rate=rate, blocks=tuple(options.blocks), tune=settings(options.epochs), shrink=SHRINK
        )  # fmt: skip
        found = item.apply(copy.deepcopy(original), task, job)
        torch.save(found.state_dict(), weights(options, rate))
        learnt = job.findings["tune"]
        yield {
            "keep_rate": rate, "epochs": options.epochs, "top1": top1(found, *test), "samples": len(test[1]),
            "seconds": learnt["seconds"], "kept": learnt["kept"], "history": learnt["epochs"],
            "settings": asdict(settings(options.epochs)), "shrink": SHRINK, "images": len(task.training or ()),
            "macs": macs(found, (torch.zeros(1, 3, 32, 32),)),
            **({"blocks": list(options.blocks), "untrained": top1(cut(original, task, rate, options.blocks), *test)}
               if options.blocks else {}),
        }  # fmt: skip


def integer(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Top-1 of the trained networks in 8 bits, real files in their engines; files that are there already stay."""
    images, labels = pictures(options.data, options.samples)
    for rate in options.rates:
        folders = {engine: options.work / f"tuned int8 {engine} {called(options, rate)}" for engine in options.engines}
        write_integer(options, rate, {name: path for name, path in folders.items() if not (path / MANIFEST).exists()})
        for engine, folder in folders.items():
            artifact = Artifact.open(folder)
            session = parts.find(Runtime, ENGINES[engine])().load(artifact, 1)
            size = BATCH if engine != "tflite" else 1
            outputs = artifact.manifest.outputs
            (logits,) = answers(lambda x, session=session: session.run({"x": x}), outputs, images, size)
            session.close()
            yield {
                "keep_rate": rate, "epochs": options.epochs, "engine": engine, "samples": len(labels),
                "top1": float((logits.argmax(1) == labels).mean()), "dialect": artifact.manifest.dialect,
                **({"blocks": list(options.blocks)} if options.blocks else {}),
            }  # fmt: skip


def write_integer(options: argparse.Namespace, rate: float, folders: Mapping[str, Path]) -> None:
    if not folders:
        return
    calibration = open_data({"data": TRAINING, "samples": CALIBRATION}, (ITEM,), options.data)
    task = Task((ITEM,), calibration=calibration)
    network = cut(vit(options.data), task, rate, options.blocks)
    network.load_state_dict(torch.load(weights(options, rate), weights_only=True))
    found, plan = applied(Quantize(explain=False), network, task)
    for engine, folder in folders.items():
        write(engine, capture(found, task), plan, task, folder)


def weights(options: argparse.Namespace, rate: float) -> Path:
    found: Path = options.work / f"vit {called(options, rate)}.pt"
    return found


def called(options: argparse.Namespace, rate: float) -> str:
    """What files of one training are called."""
    return f"{options.epochs} keep {rate:g}{where(options.blocks)}"


def top1(module: nn.Module, images: Any, labels: Any) -> float:
    right = 0
    with torch.no_grad():
        for start in range(0, len(images), BATCH):
            found = module(torch.from_numpy(images[start : start + BATCH])).argmax(1).numpy()
            right += int((found == labels[start : start + BATCH]).sum())
    return right / len(labels)
