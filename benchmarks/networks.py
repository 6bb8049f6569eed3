"""Networks × formats: fold, export, parity, size, score. Writes results/networks.json and docs/networks.md.

    python benchmarks/networks.py                     # everything
    python benchmarks/networks.py resnet20 mobilenet  # networks whose name contains one of these words
    python benchmarks/networks.py --formats tflite    # one format of all of them; rows of the others stay

Zoo networks have random weights and random batch-norm statistics (a fresh network's statistics hide folding
errors). Networks with trained weights need the data folder, ``--data`` (default: ../shared/data beside the
repository); they are scored on all images there. What fails is a row of the table too.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgepack import metrics, models, parts
from edgepack.artifact import write_text
from edgepack.compress.fold import Fold
from edgepack.compressing import BASELINE, compress
from edgepack.contracts import Exporter
from edgepack.data import open_data
from edgepack.errors import EdgepackError
from edgepack.exporting import PACKAGES, export
from edgepack.progress import Silent
from edgepack.task import Input, Task
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "examples" / "zoo"
FORMATS = ("onnx", "openvino", "tflite", "coreml", "tensorrt")
INTERPRETED = {"coreml": 1000}  # images that are scored where an interpreter computes
LABELS = {"float32": "{}", "float16": "{}-float16"}
SIZES = {"height": (16, 128, 512), "width": (16, 128, 512)}  # TensorRT wants to know them
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "scale": 255.0}
CIFAR_VIT = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010), "scale": 255.0}


@dataclass(frozen=True)
class Network:
    """One row: where the network comes from and how it is scored.

    Attributes:
        source: as a recipe's ``model.module``; ``local:NAME`` for one defined here, ``data:FILE`` for one in the
            data folder, ``saved:SUFFIX`` for ResNet-20 written by PyTorch and read back.
        data: what ``task.evaluation`` says, with a ``metric``; empty for random inputs.
    """

    name: str
    source: str
    inputs: tuple[Input, ...]
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    metric: Any = None


def image(size: int, **options: Any) -> tuple[Input, ...]:
    return (Input("input", (1, 3, size, size), **options),)


def networks() -> list[Network]:
    cifar = {"data": "cifar10_test.npz"}
    pairs = {"inputs": "set5/LR_x2", "targets": "set5/HR"}
    any_size = {"dynamic": ("batch", "height", "width"), "scale": 255.0}
    state = {"dynamic": {"batch": 1}}
    return [
        Network("resnet20 (CIFAR-10)", "models.py:resnet20", image(32, **IMAGENET),
                "resnet20_cifar10.safetensors", data=cifar, metric="top1"),
        *(Network(f"resnet20, from .{suffix}", f"saved:{suffix}", image(32, **IMAGENET), data=cifar, metric="top1")
          for suffix in ("pt2", "onnx")),
        Network("resnet32 (CIFAR-10)", "models.py:resnet32", image(32, **IMAGENET),
                "resnet32_cifar10.safetensors", data=cifar, metric="top1"),
        Network("vit (CIFAR-10)", "models.py:vit_cifar10", image(32, **CIFAR_VIT),
                "vit_cifar10.safetensors", data=cifar, metric="top1"),
        Network("mobilenet_v1 0.25 (ImageNet sample)", "models.py:mobilenet_v1_025", image(224, resize=256, **IMAGENET),
                "mobilenet_v1_025_imagenet.safetensors", data={"data": "imagenet_sample"}, metric="top1"),
        Network("imdn x2 (Set5)", "models.py:imdn_x2", image(64, **any_size),
                "imdn_x2.safetensors", data=pairs, metric="psnr_y"),
        Network("imdn x2 (64×64 only)", "models.py:imdn_x2", image(64, scale=255.0), "imdn_x2.safetensors"),
        Network("imdn x2, from .onnx", "data:imdn_x2.onnx", image(64, **any_size), data=pairs, metric="psnr_y"),
        *(Network(name, f"torchvision:{name}", image(224)) for name in ("mobilenet_v2", "resnet50", "densenet121")),
        Network("ssdlite320_mobilenet_v3_large (raw heads)", "local:ssdlite", image(320)),
        *(Network(name, f"timm:{name}", image(224))
          for name in ("deit_small_patch16_224", "convnext_atto", "efficientnet_b0")),
        Network("ViT (transformers)", "transformers:ViTForImageClassification", image(224)),
        Network("two inputs", "local:two_inputs", (*image(32), Input("facts", (1, 6)))),
        Network("LSTM, explicit state", "local:recurrent", (Input("x", (8, 1, 16), **state),
                Input("h", (2, 1, 32), **state), Input("c", (2, 1, 32), **state))),
    ]  # fmt: skip


class SsdHeads(nn.Module):
    """The raw class scores and box offsets of torchvision's SSDlite, before decoding."""

    def __init__(self) -> None:
        super().__init__()
        models.prepare_torchvision()
        from torchvision.models.detection import ssdlite320_mobilenet_v3_large

        whole = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
        self.backbone, self.head = whole.backbone, whole.head

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        heads: dict[str, torch.Tensor] = self.head(list(self.backbone(image).values()))
        return heads


class TwoInputs(nn.Module):
    """An image and a vector of facts."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(16 + 6, 5)

    def forward(self, input: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(torch.cat([self.image(input).flatten(1), facts], 1))
        return scores


class Recurrent(nn.Module):
    """Two LSTM layers whose state goes in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, 2)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> dict[str, torch.Tensor]:
        y, (h, c) = self.lstm(x, (h, c))
        return {"y": y, "h_next": h, "c_next": c}


LOCAL: dict[str, Callable[[], nn.Module]] = {"ssdlite": SsdHeads, "two_inputs": TwoInputs, "recurrent": Recurrent}


def load(network: Network, data: Path) -> nn.Module:
    torch.manual_seed(0)
    kind, _, name = network.source.partition(":")
    if kind == "saved":
        return saved(name, models.load("models.py:resnet20", ZOO, data / "resnet20_cifar10.safetensors"))
    if kind == "local":
        module = LOCAL[name]()
    elif kind == "data":
        return models.load(str(data / name), ROOT)
    else:
        weights = None if network.weights is None else data / network.weights
        module = models.load(network.source, ZOO, weights, network.options)
    return module if network.weights else with_statistics(module)


def saved(suffix: str, module: nn.Module) -> nn.Module:
    """The network as PyTorch's own exporters write it, read back."""
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (torch.randn(2, 3, 32, 32),), dynamic_shapes=batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model.{suffix}"
        if suffix == "pt2":
            torch.export.save(program, path)
        else:
            torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)
        return models.load(path.name, path.parent)


def with_statistics(module: nn.Module) -> nn.Module:
    """Random running statistics and affine parameters in every batch norm, such that activations keep their size."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0, 0.1)
    return module


def task_of(network: Network, data: Path, samples: int | None = None) -> Task:
    if not network.data:
        return Task(network.inputs)
    limit = {"samples": samples} if samples is not None and network.metric == "top1" else {}
    opened = open_data({**network.data, **limit}, network.inputs, data)
    return Task(network.inputs, evaluation=opened, metric=metrics.find(network.metric, data))


def rows(network: Network, data: Path, formats: Sequence[str]) -> list[dict[str, Any]]:
    """Two rows per format; a failure is a row with its exit status and sentence."""
    found = []
    for samples in sorted({INTERPRETED.get(name) for name in formats}, key=str):
        mine = [name for name in formats if INTERPRETED.get(name) == samples]
        with tempfile.TemporaryDirectory() as folder:
            found += _rows(network, task_of(network, data, samples), load(network, data), Path(folder), mine)
    return found


def _rows(network: Network, task: Task, module: nn.Module, out: Path, formats: Sequence[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    began = time.perf_counter()
    try:
        result = compress(module, task, [Fold()], out, Silent())
    except EdgepackError as error:
        return [{"network": network.name, "format": "compress", "exit": error.exit_status, "why": error.message}]
    seconds = time.perf_counter() - began
    shutil.rmtree(out / BASELINE)  # the original in each format is not asked for here
    for name, precision in ((name, precision) for name in formats for precision in ("float32", "float16")):
        options = {"axes": SIZES} if name == "tensorrt" and "height" in network.inputs[0].dynamic else {}
        exporter = parts.find(Exporter, name)(name=LABELS[precision].format(name), precision=precision, **options)
        found.append({"network": network.name, "format": exporter.name, "compress_seconds": round(seconds, 1),
                      "folded": result.notes, **row(out, exporter, task)})  # fmt: skip
        print(json.dumps({k: v for k, v in found[-1].items() if k != "folded"}), flush=True)  # noqa: T201
        shutil.rmtree(out / exporter.name, ignore_errors=True)
    return found


def row(out: Path, exporter: Exporter, task: Task) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        (result,) = export(out, [exporter], Silent(), task)
    except EdgepackError as error:
        return {"exit": error.exit_status, "why": error.message}
    manifest = result.artifact.manifest
    assert manifest.float_size_bytes
    return {
        "parity": manifest.parity.max_rel,
        "against_original_db": manifest.parity.sqnr_original_db,
        "agreement": manifest.parity.agreement,
        "status": manifest.parity.status,
        "size_bytes": result.artifact.size_bytes,
        "size_ratio": result.artifact.size_bytes / manifest.float_size_bytes,
        "score": manifest.score,
        "operators": sum((manifest.census or {}).get("operators", {}).values()),
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| network | format | max rel. error | size ÷ float | score (original) | seconds |", "| --- " * 6 + "|"]
    for item in results:
        if "why" in item:
            lines.append(f"| {item['network']} | {item['format']} | exit {item['exit']}: {item['why']} | | | |")
            continue
        score = item["score"]
        text = "" if score is None else f"{shown(score, 'this')} ({shown(score, 'original')})"
        lines.append(f"| {item['network']} | {item['format']} | {item['parity']:.1e} | {item['size_ratio']:.3f} "
                     f"| {text} | {item['seconds']} |")  # fmt: skip
    return "\n".join(lines)


def shown(score: Mapping[str, Any], key: str) -> str:
    return f"{100 * score[key]:.2f} %" if score["unit"] == "%" else f"{score[key]:.2f} {score['unit']}"


def document(data: Mapping[str, Any]) -> str:
    return (
        "# Networks and formats\n\nWritten by `python benchmarks/networks.py` from `benchmarks/results/networks.json`; "
        "do not edit.\n\nEach network went through `fold` and every export. *Max rel. error* is max|a−b| / max|b| of "
        "the artifact, run in its own engine, against what it must compute, on 16 samples (limit 1e-4). Zoo networks "
        "have random weights, so they have no score; the others are scored on every image of their evaluation data. "
        "Core ML packages are interpreted here (scored on 1,000 images), TensorRT files computed by ONNX Runtime. "
        f"Seconds are on a busy machine.\n\n{table(data['rows'])}\n\n"
        f"Versions: {', '.join(f'{k} {v}' for k, v in data['versions'].items())}; {data['machine']}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only networks whose name contains one of these")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "networks.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rest = json.loads(options.results.read_text())["rows"] if options.results.exists() else []
    for network in networks():
        if options.words and not any(word in network.name for word in options.words):
            continue
        new = rows(network, options.data, options.formats)
        replaced = {(item["network"], item["format"]) for item in new}
        rest = [item for item in rest if (item["network"], item["format"]) not in replaced] + new
        gc.collect()
        write(options.results, rest)


def write(path: Path, rest: Sequence[Mapping[str, Any]]) -> None:
    order = [item.name for item in networks()]
    formats = ["compress", *(label.format(name) for name in FORMATS for label in LABELS.values())]
    data = {
        "rows": sorted(rest, key=lambda item: (order.index(item["network"]), formats.index(item["format"]))),
        "versions": versions(*PACKAGES, "timm", "torchvision", "transformers"),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    write_text(path, json.dumps(data, indent=1) + "\n")
    write_text(ROOT / "docs" / "networks.md", document(data))


if __name__ == "__main__":
    main()
