"""What fewer tokens cost and save: counts beside the published ones, latency, accuracy, and the same tokens everywhere.

    python benchmarks/tokens.py counts                                # DeiT-T, -S, -B: tokens and MACs
    python benchmarks/tokens.py accuracy --data DATA                  # the ViT for CIFAR-10, PyTorch and engines
    python benchmarks/tokens.py prepare                               # DeiT-S as files of three engines, f32 and int8
    python benchmarks/tokens.py race --engine onnx --threads 1        # one interleaved run of those files

Each stage replaces its own rows of ``benchmarks/results/tokens.json`` and writes ``docs/tokens.md``. DeiT-S has
random weights: numbers of tokens, and with them latencies, do not depend on weights. ``DATA`` holds
``vit_cifar10.safetensors`` and ``cifar10_test.npz``.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import _tokens_page as page
import numpy as np
import torch
from torch import Tensor, nn

from edgepack import models, parts
from edgepack.artifact import GOLDEN, MANIFEST, Artifact, Golden, Manifest, Parity, describe_files
from edgepack.compress._cuts import Cut, cuts_of
from edgepack.compress._macs import macs
from edgepack.compress._tokens import tokens_behind
from edgepack.compress.quantize import Quantize
from edgepack.compress.reorganize import Reorganize
from edgepack.compressing import PassRun
from edgepack.contracts import INTEGERS, Contender, Exporter, Graph, Pass, Runtime, Settings
from edgepack.data import Arrays
from edgepack.devices.host import Host
from edgepack.graph import capture, nudged, run_graph
from edgepack.parity import least_db
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Input, Task
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
DEIT = {"DeiT-T": "deit_tiny", "DeiT-S": "deit_small", "DeiT-B": "deit_base"}
RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
ENGINES = {"onnx": "onnxruntime", "openvino": "openvino", "tflite": "tflite"}
FORMS: dict[str, dict[str, Any]] = {
    "float": {},
    "int8 static": {"activations": "static"},
    "int8 dynamic": {"activations": "dynamic"},
}
CALIBRATION = 8  # pictures; of random weights nothing better can be said
CIFAR = {"scale": 255, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
CIFAR_BATCH = 100
PACKAGES = ("torch", "timm", "onnxruntime", "openvino", "ai-edge-litert")


def cut(module: nn.Module, task: Task, rate: float) -> nn.Module:
    """A copy of the network at a keep rate; at 1 just a copy."""
    copied = copy.deepcopy(module)
    return copied if rate == 1 else applied(Reorganize(keep_rate=rate), copied, task)[0]


def applied(item: Pass, module: nn.Module, task: Task) -> tuple[nn.Module, Plan]:
    run = PassRun(ROOT / "build" / "work", 0, Plan(), Silent(), module, task)
    return item.apply(module, task, run).eval(), run.plan


def deit(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.load(f"timm:{name}_patch16_224", Path())


def counts() -> Iterator[dict[str, Any]]:
    """Tokens behind each cut and multiply-accumulates, as counted while the network runs and by the formula."""
    task = Task((Input("x", (1, 3, 224, 224)),))
    image = (torch.zeros(1, 3, 224, 224),)
    for label, name in DEIT.items():
        module = deit(name)
        for rate in (1.0, *RATES):
            lengths = [197]
            for _ in range(3):
                lengths.append(tokens_behind(lengths[-1], 1, rate, True))
            width = int(module.embed_dim)  # type: ignore[arg-type]
            yield {
                "network": label, "keep_rate": rate, "tokens": lengths,
                "macs": macs(cut(module, task, rate), image), "formula": formula(width, lengths),
            }  # fmt: skip


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


def write(engine: str, graph: Graph, plan: Plan, task: Task, folder: Path) -> Artifact:
    """One artifact, with golden answers that are compared before it is timed."""
    exporter = parts.find(Exporter, engine)()
    simulation = exporter.lower(graph, plan)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    census = exporter.write(simulation, folder)
    inputs = task.samples(1)
    inputs = {name: values.astype(np.float32) for name, values in inputs.items()}
    answers = run_graph(simulation, inputs)
    Golden(inputs, answers, answers).save(folder / GOLDEN)
    parity = Parity("not run")
    if simulation.dialect.startswith(INTEGERS):
        parity = replace(parity, least_db=least_db(answers, run_graph(nudged(simulation), inputs)))
    manifest = Manifest(
        engine, folder.name, simulation.dialect, simulation.inputs, simulation.outputs, describe_files(folder),
        parity=parity, census={"operators": dict(census.operators), "notes": list(census.notes)},
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder)


def race(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One interleaved run: the uncut network of this form, then each keep rate."""
    runtime = parts.find(Runtime, ENGINES[options.engine])()
    folders = {rate: place(options.work, options.engine, options.form, options.batch, rate) for rate in options.rates}
    settings = Settings(
        threads=options.threads, max_seconds=options.seconds, cold=False, half_width=0.012, instances=options.instances
    )
    contenders = [Contender(f"{rate:g}", Artifact.open(folder), runtime) for rate, folder in folders.items()]
    for rate, profile in zip(folders, Host().measure(contenders, settings), strict=True):
        ratio = profile.ratio
        if ratio is not None:
            yield {
                "engine": options.engine, "form": options.form, "batch": options.batch, "threads": options.threads,
                "keep_rate": rate, "faster": 1 / ratio.value, "low": 1 / ratio.high, "high": 1 / ratio.low,
                "p50_ms": profile.latency_ms.p50, "state": profile.conditions["state"],
                "census": (Artifact.open(folders[rate]).manifest.census or {}),
            }  # fmt: skip


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


def accuracy(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Top-1 of the trained ViT at each keep rate, and whether engines keep the tokens that PyTorch keeps."""
    network = models.load("models.py:vit_cifar10", ROOT / "examples" / "zoo", options.data / "vit_cifar10.safetensors")
    item = Input("x", (1, 3, 32, 32), **CIFAR)
    with np.load(options.data / "cifar10_test.npz") as stored:
        pixels, labels = stored["x"][: options.samples], stored["y"][: options.samples]
    mean, std = (np.array(CIFAR[name], np.float32) for name in ("mean", "std"))
    images = np.ascontiguousarray(((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2), np.float32)
    task = Task((item,))
    for rate in options.rates:
        module = cut(network, task, rate)
        graph = capture(Told(module).eval() if rate < 1 else module, task)
        logits, *kept = answers(lambda x, graph=graph: run_graph(graph, {"x": x}), graph, images)
        row: dict[str, Any] = {
            "keep_rate": rate, "samples": len(labels), "top1": float((logits.argmax(1) == labels).mean()),
            "macs": macs(module, (torch.zeros(1, 3, 32, 32),)), "engines": {},
        }  # fmt: skip
        for engine in options.engines:
            row["engines"][engine] = beside(engine, graph, task, images, labels, logits, kept, options.work)
        write_plain(options, module, task, rate)
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
        yield row


def answers(call: Any, graph: Graph, images: Any, size: int = CIFAR_BATCH) -> list[Any]:
    """All outputs for all images, in batches."""
    rows = [call(images[start : start + size]) for start in range(0, len(images), size)]
    return [np.concatenate([row[spec.name] for row in rows]) for spec in graph.outputs]


def beside(
    engine: str, graph: Graph, task: Task, images: Any, labels: Any, logits: Any, kept: Any, work: Path
) -> dict[str, Any]:
    """An engine's top-1, the images on which every cut kept PyTorch's tokens, and the logits on those."""
    artifact = write(engine, graph, Plan(), task, work / "told")
    session = parts.find(Runtime, ENGINES[engine])().load(artifact, 1)
    size = CIFAR_BATCH if engine != "tflite" else 1
    found, *places = answers(lambda x: session.run({"x": x}), graph, images, size)
    session.close()
    same = np.ones(len(labels), bool)
    for theirs, ours in zip(places, kept, strict=True):
        same &= (np.sort(theirs.astype(np.int64), 1) == np.sort(ours, 1)).all(1)
    difference = np.abs(found[same] - logits[same]).max() / np.abs(logits).max()
    return {"top1": float((found.argmax(1) == labels).mean()), "same_tokens": float(same.mean()),
            "max_rel": float(difference)}  # fmt: skip


def write_plain(options: argparse.Namespace, module: nn.Module, task: Task, rate: float) -> None:
    """The ViT as it is, for its own race."""
    for engine in options.engines:
        write(engine, capture(module, task), Plan(), task, options.work / f"vit {engine} keep {rate:g}")


def race_vit(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    runtime = parts.find(Runtime, ENGINES[options.engine])()
    settings = Settings(max_seconds=options.seconds, cold=False, half_width=0.012, instances=options.instances)
    contenders = [
        Contender(f"{rate:g}", Artifact.open(options.work / f"vit {options.engine} keep {rate:g}"), runtime)
        for rate in options.rates
    ]
    for profile in Host().measure(contenders, settings):
        yield {
            "engine": options.engine, "keep_rate": float(profile.label), "p50_ms": profile.latency_ms.p50,
            "ratio": None if profile.ratio is None else asdict(profile.ratio), "state": profile.conditions["state"],
        }  # fmt: skip


STAGES: dict[str, tuple[Any, tuple[str, ...]]] = {  # what makes the rows, and what tells one from another
    "counts": (lambda options: counts(), ("network", "keep_rate")),
    "race": (race, ("engine", "form", "batch", "threads", "keep_rate")),
    "accuracy": (accuracy, ("keep_rate",)),
    "race_vit": (race_vit, ("engine", "keep_rate")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", *STAGES, "document"))
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
    parser.add_argument("--samples", type=int, help="at most this many images, for trying things out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models.prepare_torchvision()
    if options.stage == "prepare":
        prepare(options)
        return
    rows, key = STAGES.get(options.stage, (lambda options: (), ()))
    facts = {"processor": Host().facts().get("processor", "unknown processor"), "versions": versions(*PACKAGES)}
    page.store(options.stage, (), key, facts)
    for row in rows(options):
        page.store(options.stage, [row], key, facts)


if __name__ == "__main__":
    main()
