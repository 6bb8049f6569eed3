"""What fewer tokens cost and save: counts beside the published ones, latency, accuracy, and the same tokens everywhere.

    python benchmarks/tokens.py counts                                # DeiT-T, -S, -B: tokens and MACs
    python benchmarks/tokens.py accuracy --data DATA                  # the ViT for CIFAR-10, PyTorch and engines
    python benchmarks/tokens.py prepare                               # DeiT-S as files of three engines, f32 and int8
    python benchmarks/tokens.py race --engine onnx --threads 1        # one interleaved run of those files
    python benchmarks/tokens.py explain --engine onnx                 # the engine's own clock, operator by operator
    python benchmarks/tokens.py prepare_vit, race_vit --engine onnx   # the same for the ViT
    python benchmarks/tokens.py tuned --epochs 4 --rates 1 0.7        # trained after the cut; integer: 8 bits on top

Each stage replaces its own rows of ``benchmarks/results/tokens.json`` and writes ``docs/tokens.md``. DeiT-S has
random weights: numbers of tokens, and with them latencies, do not depend on weights. ``DATA`` holds
``vit_cifar10.safetensors`` and ``cifar10_test.npz``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _tokens_page as page
import numpy as np
import torch
from _tokens_explain import explain
from _tokens_files import ENGINES, accepted, applied, cut, write
from _tokens_tuned import integer, tuned
from _tokens_vit import accuracy, prepare_vit, race_vit
from _tokens_vit import place as vit_place
from torch import nn

from edgepack import models, parts
from edgepack.artifact import MANIFEST, Artifact
from edgepack.compress._macs import macs
from edgepack.compress._tokens import tokens_behind
from edgepack.compress.quantize import Quantize
from edgepack.compress.reorganize import Reorganize
from edgepack.compressing import PassRun
from edgepack.contracts import Contender, Graph, Runtime, Settings
from edgepack.data import Arrays
from edgepack.devices.host import Host
from edgepack.graph import capture
from edgepack.models.resolution import fit
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Input, Task
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
DEIT = {"DeiT-T": "deit_tiny", "DeiT-S": "deit_small", "DeiT-B": "deit_base"}
RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
FORMS: dict[str, dict[str, Any]] = {
    "float": {},
    "int8 static": {"activations": "static"},
    "int8 dynamic": {"activations": "dynamic"},
}
LARGER = (240, 256, 272, 288)
CALIBRATION = 8  # pictures; of random weights nothing better can be said
PACKAGES = ("torch", "timm", "onnxruntime", "openvino", "ai-edge-litert")


def deit(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.load(f"timm:{name}_patch16_224", Path())


def counts(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens behind each cut and multiply-accumulates, as counted while the network runs and by the formula."""
    task = one_picture(224)
    image = (torch.zeros(1, 3, 224, 224),)
    for label in options.networks:
        module = deit(DEIT[label])
        for rate in options.rates:
            lengths = [197]
            for _ in range(3):
                lengths.append(tokens_behind(lengths[-1], 1, rate, True))
            width = int(module.embed_dim)  # type: ignore[arg-type]
            yield {
                "network": label, "keep_rate": rate, "tokens": lengths,
                "macs": macs(cut(module, task, rate), image), "formula": formula(width, lengths),
            }  # fmt: skip


def one_picture(side: int) -> Task:
    item = Input("x", (1, 3, side, side))
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
    return Task((item,), calibration=Arrays((item,), {"x": pixels}, None, True))


def formula(width: int, lengths: Sequence[int]) -> int:
    """MACs of a DeiT with cuts behind the attention of blocks 3, 6 and 9 (of 0 … 11), MLPs four times as wide."""
    total = 196 * 3 * 16**2 * width + width * 1000
    for block in range(12):
        before, after = lengths[(block - 1) // 3 if block else 0], lengths[block // 3]
        total += 4 * before * width**2 + 2 * before**2 * width + 8 * after * width**2
    return total


def prepare(options: argparse.Namespace) -> None:
    """Write DeiT-S as every file the races need; those that are there already stay."""
    module = deit("deit_small")
    for batch in options.batches:
        task = deit_task(batch)
        for form in options.forms:
            for rate in options.rates:
                made: tuple[Graph, Plan] | None = None
                for engine in options.engines:
                    folder = place(options.work, engine, form, batch, rate)
                    if (folder / MANIFEST).exists():
                        continue
                    began = time.perf_counter()
                    made = made or compressed(module, task, rate, form)
                    write(engine, *made, task, folder)
                    sys.stdout.write(f"{folder.name} {time.perf_counter() - began:.0f} s\n")
                    sys.stdout.flush()


def deit_task(batch: int) -> Task:
    item = Input("x", (batch, 3, 224, 224), dynamic=("batch",) if batch == 1 else ())
    pictures = np.random.default_rng(0).standard_normal((CALIBRATION, 3, 224, 224)).astype(np.float32)
    return Task((item,), calibration=Arrays((item,), {"x": pictures}, None, True))


def compressed(module: nn.Module, task: Task, rate: float, form: str) -> tuple[Graph, Plan]:
    found, plan = cut(module, task, rate), Plan()
    if form != "float":
        found, plan = applied(Quantize(explain=False, rounding="nearest", **FORMS[form]), found, task)
    return capture(found, task), plan


def place(work: Path, engine: str, form: str, batch: int, rate: float) -> Path:
    return work / f"deit-s {engine} {form} batch {batch} keep {rate:g}"


def race(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One interleaved run: the uncut network of this form, then each keep rate."""
    runtime = parts.find(Runtime, ENGINES[options.engine])()
    folders = {rate: place(options.work, options.engine, options.form, options.batch, rate) for rate in options.rates}
    settings = Settings(
        threads=options.threads, max_seconds=options.seconds, cold=False, half_width=0.012, instances=options.instances
    )
    contenders = [Contender(f"{rate:g}", accepted(folder, runtime), runtime) for rate, folder in folders.items()]
    for rate, profile in zip(folders, Host().measure(contenders, settings), strict=True):
        ratio = profile.ratio
        if ratio is not None:
            yield {
                "engine": options.engine, "form": options.form, "batch": options.batch, "threads": options.threads,
                "keep_rate": rate, "faster": 1 / ratio.value, "low": 1 / ratio.high, "high": 1 / ratio.low,
                "p50_ms": profile.latency_ms.p50, "state": profile.conditions["state"],
                "census": (Artifact.open(folders[rate]).manifest.census or {}),
            }  # fmt: skip


def equal(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Keep rates at which DeiT-S on larger images costs what it costs uncut on its own."""
    small = macs(deit("deit_small"), (torch.zeros(1, 3, 224, 224),))
    for side in LARGER:
        module, task = fit(deit("deit_small"), side, side), one_picture(side)
        run = PassRun(options.work, 0, Plan(), Silent(), module, task)
        Reorganize(cost_of=224).apply(module, task, run)
        found = run.findings["tokens"]
        tokens = list(dict.fromkeys(count for row in found["blocks"] for count in row["tokens"]))
        yield {
            "side": side, "keep_rate": found["keep_rate"], "tokens": tokens, "small": small,
            "uncut": found["macs"]["before"], "macs": found["macs"]["after"],
        }  # fmt: skip


def clocked(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times of operators of the uncut network and of one cut at the last of the rates; DeiT-S, then the ViT."""
    engine, rate = options.engine, options.rates[-1]
    pairs = {
        "DeiT-S": [place(options.work, engine, "float", 1, one) for one in (1.0, rate)],
        "ViT": [vit_place(options.work, engine, one) for one in (1.0, rate)],
    }
    for network, folders in pairs.items():
        if all((folder / MANIFEST).exists() for folder in folders):
            whole, fewer = (Artifact.open(folder) for folder in folders)
            yield {
                "network": network,
                "keep_rate": rate,
                **explain(engine, whole, fewer, options.runs, options.threads),
            }


PREPARE = {"prepare": prepare, "prepare_vit": prepare_vit}
STAGES: dict[str, tuple[Any, tuple[str, ...]]] = {  # what makes the rows, and what tells one from another
    "counts": (counts, ("network", "keep_rate")),
    "race": (race, ("engine", "form", "batch", "threads", "keep_rate")),
    "accuracy": (accuracy, ("keep_rate",)),
    "race_vit": (race_vit, ("engine", "keep_rate", "blocks")),
    "tuned": (tuned, ("keep_rate", "epochs", "blocks")),
    "integer": (integer, ("keep_rate", "epochs", "blocks", "engine")),
    "equal": (equal, ("side",)),
    "explain": (clocked, ("network", "engine", "keep_rate")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*PREPARE, *STAGES, "document"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tokens", help="files that are timed")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=tuple(ENGINES))
    parser.add_argument("--engine", choices=ENGINES, default="onnx")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=("float",))
    parser.add_argument("--form", choices=FORMS, default="float")
    parser.add_argument("--batches", nargs="+", type=int, default=(1,))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rates", nargs="+", type=float, default=(1.0, *RATES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, per race")
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--networks", nargs="+", choices=DEIT, default=tuple(DEIT), help="that are counted")
    parser.add_argument("--runs", type=int, default=30, help="of the engine's own clock")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--blocks", nargs="+", type=int, default=(), help="that are cut, of the ViT that is trained")
    parser.add_argument("--samples", type=int, help="at most this many images, for trying things out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models.prepare_torchvision()
    if options.stage in PREPARE:
        options.work.mkdir(parents=True, exist_ok=True)
        PREPARE[options.stage](options)
        return
    rows, key = STAGES.get(options.stage, (lambda options: (), ()))
    facts = {"processor": Host().facts().get("processor", "unknown processor"), "versions": versions(*PACKAGES)}
    page.store(options.stage, (), key, facts)
    for row in rows(options):
        page.store(options.stage, [row], key, facts)


if __name__ == "__main__":
    main()
