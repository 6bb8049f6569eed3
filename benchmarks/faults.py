"""Seeded faults: does the proof find a wrong artifact, and name the operator?

Writes results/faults.json and docs/faults.md.

    python benchmarks/faults.py                     # every format that runs or is interpreted here, 54 faults each
    python benchmarks/faults.py --formats onnx --faults 10

One change is made to one operator of the network between the exporter's simulation and the file, as a defect of a
converter would be, and the export is run as always. A fault counts as *found* when the export fails with exit
status 6, as *named* when the error's operator is the one that was changed. Clean exports must pass.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from edgepack import models, parts
from edgepack.artifact import write_text
from edgepack.compressing import compress
from edgepack.contracts import Census, Exporter, Graph
from edgepack.data import open_data
from edgepack.errors import EdgepackError, ParityError
from edgepack.exporting import export
from edgepack.graph import recapture
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Input, Task
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("onnx", "openvino", "tflite", "coreml")
Change = Callable[[GraphModule, Node], None]


class Mixed(nn.Module):
    """A little of everything: ReLU6, depthwise, attention, a weight used twice, channels joined, NCHW flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        depthwise = nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(12), nn.ReLU6())
        self.left, self.right = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 5, padding=2)
        self.shared = nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24)
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.reduce = nn.Conv2d(24, 6, 3, 2, 1)
        self.head = nn.Linear(6 * 16, 10)
        for layer in self.stem[0], self.depthwise[0]:
            nn.init.normal_(layer.weight, 0, 1.2)
        for norm in self.norm, self.stem[1], self.depthwise[1]:
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(x))
        x = torch.cat([F.relu(self.left(x)), F.gelu(self.right(x))], 1)
        x = F.max_pool2d(x, 2)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.shared(F.relu(self.shared(self.norm(tokens))))
        scores = self.query(tokens) @ self.key(tokens).transpose(1, 2) / 5
        tokens = tokens + scores.softmax(2) @ self.value(tokens)
        image = tokens.transpose(1, 2).reshape(-1, 24, 8, 8)
        scores: torch.Tensor = self.head(F.relu(self.reduce(image)).flatten(1))
        return scores


def networks(data: Path) -> dict[str, tuple[nn.Module, Task]]:
    torch.manual_seed(0)
    cifar = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "scale": 255.0}
    image = (Input("image", (1, 3, 32, 32), **cifar),)
    images = open_data({"data": "cifar10_test.npz", "samples": 64}, image, data)
    zoo = ROOT / "examples" / "zoo"
    mixed = Mixed()
    with torch.no_grad():  # statistics of real images
        for batch in images.batches(64):
            mixed.train()(torch.from_numpy(batch.inputs["image"]))
    return {
        "mixed": (mixed, Task(image, evaluation=images)),
        "resnet20": (models.load("models.py:resnet20", zoo, data / "resnet20_cifar10.safetensors"),
                     Task(image, evaluation=images)),
        "vit": (models.load("models.py:vit_cifar10", zoo, data / "vit_cifar10.safetensors"),
                Task(image, evaluation=images)),
    }  # fmt: skip


def weight(module: GraphModule, node: Node, place: int) -> torch.Tensor:
    value: torch.Tensor = module.get_parameter(node.args[place].target)  # type: ignore[union-attr, arg-type]
    return value.detach()


def rewire(module: GraphModule, node: Node, place: int, value: torch.Tensor) -> None:
    """Give one operator another tensor, and leave other readers of the old one alone."""
    name = f"fault_{node.name}_{place}"
    module.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=False))
    with module.graph.inserting_before(node):
        node.update_arg(place, module.graph.get_attr(name))


def transpose_weight(module: GraphModule, node: Node) -> None:
    old = weight(module, node, 1)
    if old.ndim == 4 and old.shape[2] > 1:
        new = old.transpose(2, 3)
    elif old.shape[0] == old.shape[1]:
        new = old.transpose(0, 1)
    else:
        new = old.transpose(0, 1).reshape(old.shape)
    rewire(module, node, 1, new)


def shift_padding(module: GraphModule, node: Node) -> None:
    (height, width) = node.args[4]  # type: ignore[misc]
    with module.graph.inserting_before(node):
        pads = [width - 1, width + 1, height - 1, height + 1]
        padded = module.graph.call_function(torch.ops.aten.constant_pad_nd.default, (node.args[0], pads, 0.0))
    node.update_arg(0, padded)
    node.update_arg(4, [0, 0])


def wrong_axis(module: GraphModule, node: Node) -> None:
    if "softmax" in str(node.target):
        node.update_arg(1, node.meta["val"].ndim - 2)
    else:
        node.update_arg(0, list(reversed(node.args[0])))  # type: ignore[arg-type]


def drop_bias(module: GraphModule, node: Node) -> None:
    node.update_arg(2, None)


def swap_scale(module: GraphModule, node: Node) -> None:
    place = 2 if "layer_norm" in str(node.target) else 1
    old = weight(module, node, place)
    rewire(module, node, place, old.roll(1, 0))


def wrong_epsilon(module: GraphModule, node: Node) -> None:
    node.update_arg(7, 1e-3)


def lose_clip(module: GraphModule, node: Node) -> None:
    node.target, node.args = torch.ops.aten.relu.default, node.args[:1]


def swap_layout(module: GraphModule, node: Node) -> None:
    source = node.args[0]
    assert isinstance(source, Node)
    order = [0, *range(2, source.meta["val"].ndim), 1]
    with module.graph.inserting_before(node):
        moved = module.graph.call_function(torch.ops.aten.permute.default, (source, order))
        same = module.graph.call_function(torch.ops.aten.contiguous.default, (moved,))
    node.update_arg(0, same)
    if "flatten" not in str(node.target):
        node.target = torch.ops.aten.reshape.default


def duplicate_weight(module: GraphModule, node: Node) -> None:
    rewire(module, node, 1, weight(module, node, 1).clone())


def fits(*words: str, if_: Callable[[Node], bool] = lambda node: True) -> Callable[[Node], bool]:
    def fit(node: Node) -> bool:
        name = str(node.target).removeprefix("aten.").partition(".")[0]
        return node.op == "call_function" and name in words and if_(node)

    return fit


def padded(node: Node) -> bool:
    return len(node.args) > 4 and node.args[4] in ([1, 1], [2, 2])


def has(place: int) -> Callable[[Node], bool]:
    return lambda node: len(node.args) > place and isinstance(node.args[place], Node)


def shared(node: Node) -> bool:
    source = node.args[1]
    return isinstance(source, Node) and (len(source.users) > 1 or _readers(node, str(source.target)) > 1)


def _readers(node: Node, name: str) -> int:
    return sum(len(item.users) for item in node.graph.find_nodes(op="get_attr", target=name))


def image_to_rows(node: Node) -> bool:
    source = node.args[0]
    if not isinstance(source, Node):
        return False
    before, after = source.meta["val"].shape, node.meta["val"].shape
    return len(before) == 4 and len(after) == 2 and min(before[1:]) > 1


FAULTS: dict[str, tuple[Change, Callable[[Node], bool]]] = {
    "weight transposed": (transpose_weight, fits("conv2d", "linear", if_=has(1))),
    "padding off by one": (shift_padding, fits("conv2d", if_=padded)),
    "wrong axis": (wrong_axis, fits("softmax", "cat")),
    "dropped bias": (drop_bias, fits("conv2d", "linear", if_=has(2))),
    "swapped scale": (swap_scale, fits("layer_norm", "batch_norm")),
    "BN epsilon": (wrong_epsilon, fits("batch_norm")),
    "ReLU6 clip lost": (lose_clip, fits("hardtanh", "relu6", "clamp")),
    "layout swapped": (swap_layout, fits("flatten", "view", "reshape", if_=image_to_rows)),
    "shared weight duplicated": (duplicate_weight, fits("conv2d", "linear", if_=shared)),
}


@dataclass(frozen=True, kw_only=True)
class Faulty(Exporter):
    """Another exporter with one fault between its simulation and its file."""

    format: ClassVar[str] = ""

    inner: str = ""
    fault: str = ""
    node: str = ""

    @property
    def exporter(self) -> Exporter:
        return parts.find(Exporter, self.inner)(precision="float32")

    def lower(self, graph: Graph, plan: Plan) -> Graph:
        return self.exporter.lower(graph, plan)

    def write(self, simulation: Graph, folder: Path) -> Census:
        if not self.fault:
            return self.exporter.write(simulation, folder)
        module = simulation.program.module(check_guards=False)
        (node,) = (item for item in module.graph.nodes if item.name == self.node)
        FAULTS[self.fault][0](module, node)
        module.graph.lint()
        module.recompile()
        return self.exporter.write(recapture(simulation, module), folder)


def faulty(format_name: str, fault: str = "", node: str = "") -> Exporter:
    kind = type("Faulty", (Faulty,), {"format": format_name, "__module__": __name__})
    built: Exporter = kind(inner=format_name, fault=fault, node=node, name="export")
    return built


def places(exporter: Exporter, out: Path) -> list[tuple[str, str]]:
    """Every (fault, operator) that fits the network as this exporter lowers it."""
    from edgepack.exporting import Source

    source = Source.open(out / "compressed")
    module = exporter.lower(source.graph, source.plan).program.module(check_guards=False)
    return [(name, node.name) for name, (_, fit) in FAULTS.items() for node in module.graph.nodes if fit(node)]


def chosen(options: Mapping[str, Sequence[tuple[str, str]]], count: int, seed: int) -> list[tuple[str, str, str]]:
    """``count`` places, kinds of fault and networks in turn, operators at random."""
    draw = random.Random(seed)
    pools: dict[str, list[tuple[str, str, str]]] = {}
    for network, pairs in options.items():
        for fault, node in pairs:
            pools.setdefault(fault, []).append((network, fault, node))
    for pool in pools.values():
        draw.shuffle(pool)
    picked: list[tuple[str, str, str]] = []
    while len(picked) < count and any(pools.values()):
        picked += [pool.pop() for pool in pools.values() if pool]
    return picked[:count]


def attempt(out: Path, exporter: Exporter) -> dict[str, Any]:
    """What the export said."""
    began = time.perf_counter()
    shutil.rmtree(out / "export", ignore_errors=True)
    found: dict[str, Any] = {"exit": 0}
    try:
        export(out, [exporter], Silent())
    except ParityError as error:
        found = {"exit": error.exit_status, "why": error.message, **error.details}
    except EdgepackError as error:
        found = {"exit": error.exit_status, "why": error.message}
    return {**found, "seconds": round(time.perf_counter() - began, 2)}


def run(format_name: str, outs: Mapping[str, Path], faults: int, clean: int) -> list[dict[str, Any]]:
    options = {name: places(faulty(format_name), out) for name, out in outs.items()}
    rows = []
    for network, fault, node in chosen(options, faults, seed=1):
        row = attempt(outs[network], faulty(format_name, fault, node))
        rows.append({"format": format_name, "network": network, "fault": fault, "at": node, **row})
        said = rows[-1]
        print(format_name, network, fault, node, "->", said["exit"], said.get("node"), said["seconds"], flush=True)  # noqa: T201
    names = sorted(outs)
    for index in range(clean):
        network = names[index % len(names)]
        row = attempt(outs[network], faulty(format_name))
        rows.append({"format": format_name, "network": network, "fault": None, "at": None, **row})
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| format | fault | in the file | found | operator named |", "| --- | --- | --- | --- | --- |"]
    for format_name in dict.fromkeys(row["format"] for row in rows):
        mine = [row for row in rows if row["format"] == format_name and row["fault"]]
        kinds = [*dict.fromkeys(row["fault"] for row in mine), "all"]
        for kind in kinds:
            some = [row for row in mine if kind in (row["fault"], "all") and not healed(row)]
            found = [row for row in some if row["exit"] == 6]
            named = sum(row["at"] in (row.get("node"), *row.get("sharers", ())) for row in found)
            lines.append(f"| {format_name} | {kind} | {len(some)} | {len(found)} | {named} |")
    return "\n".join(lines)


def healed(row: Mapping[str, Any]) -> bool:
    """The file stores the weight once all the same: there is no fault in it."""
    return bool(row["fault"] == "shared weight duplicated" and row["exit"] == 0)


def document(data: Mapping[str, Any]) -> str:
    clean = [row for row in data["rows"] if not row["fault"]]
    alarms = Counter(row["format"] for row in clean if row["exit"] != 0)
    counts = Counter(row["format"] for row in clean)
    text = ", ".join(f"{name} {alarms[name]} of {count}" for name, count in counts.items())
    return (
        "# Seeded faults\n\nWritten by `python benchmarks/faults.py` from `benchmarks/results/faults.json`; do not "
        "edit.\n\nOne operator of the network was changed between the exporter's simulation and the file, as a defect "
        "of a converter would do it. *Found*: the export failed with exit status 6. *Named*: the error names exactly "
        "the operator that was changed. Networks: ResNet-20 and ViT with trained weights, and a small mixed one. A "
        "weight that was duplicated in the graph and that the writer stored once again is no fault in the file: "
        f"{sum(map(healed, data['rows']))} such cases are left out.\n\n"
        f"{summary(data['rows'])}\n\nFalse alarms in clean exports: {text}.\n\n"
        f"Versions: {', '.join(f'{k} {v}' for k, v in data['versions'].items())}; {data['machine']}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--faults", type=int, default=54)
    parser.add_argument("--clean", type=int, default=13)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(options.results.read_text())["rows"] if options.results.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        outs = {}
        for name, (module, task) in networks(options.data).items():
            outs[name] = Path(folder) / name
            compress(module, task, [], outs[name], Silent())
            shutil.rmtree(outs[name] / "baseline")
        for format_name in options.formats:
            rows = run(format_name, outs, options.faults, options.clean)
            before = [row for row in before if row["format"] != format_name] + rows
            data = {
                "rows": before,
                "versions": versions("torch", "onnx", "onnxruntime", "openvino", "litert-torch", "coremltools"),
                "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            }
            write_text(options.results, json.dumps(data, indent=1) + "\n")
            write_text(options.results.parent.parent.parent / "docs" / "faults.md", document(data))


if __name__ == "__main__":
    main()
